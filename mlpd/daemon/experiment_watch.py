"""Verb watch: guardrails on live requests, and looks at metrics: stop, promote, keep a timeline.

Requests are watched as they are answered, on the loop, and an arm is stopped by the request that
gives it away.  Metrics are looked at every few seconds, worked out in a thread; a look also keeps a
point of the timeline whenever the units with an outcome have grown by 3 %.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import UnavailableError
from mlpd.core.time import Clock, format_time
from mlpd.daemon.arm_stops import ArmStops
from mlpd.daemon.experiments import Experiments
from mlpd.daemon.live_experiment import LiveExperiment
from mlpd.daemon.looks import Window
from mlpd.daemon.parts import Parts
from mlpd.experiments.guardrails import Breach, Guardrail
from mlpd.experiments.judge import Ruling, judge
from mlpd.monitoring.alerts import ALERTNAME, Measurement
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table, u64be
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

LOOK_S = 5.0
WATCHED_ROWS = 64
"""Rows of one run that are watched: the loop has other things to do."""
GROWTH = 1.03
"""Units at a point of the timeline over those at the one before: 10 to 1,000,000 are 390 points."""

_log = logging.getLogger("mlpd.experiments")


@dataclass(frozen=True, slots=True)
class Served:
    """How one arm's model answered rows of a request: who they are, how long, how well.

    `units` and `experiment` are None for rows that take no part.  `scores` is None if it failed, or
    if `is_late`: the request's deadline passed after `seconds`.
    """

    arm: str
    experiments: Sequence[str | None]
    units: Sequence[str | None]
    seconds: float
    scores: NDArray[np.float64] | None
    is_late: bool = False


class ExperimentWatch:
    """Watches all experiments; every method belongs to the loop."""

    names = frozenset({"ArmStopped", "SampleRatio"})

    def __init__(
        self,
        experiments: Experiments,
        stops: ArmStops,
        decides: Callable[[], bool],
        parts: Parts,
        environment: Environment,
        writer: Writer,
        clock: Clock,
        look_s: float = LOOK_S,
    ) -> None:
        self._experiments = experiments
        self._stops = stops
        self._decides = decides
        self._parts = parts
        self._missing: set[str] = set()
        self._environment = environment
        self._writer = writer
        self._clock = clock
        self._look_s = look_s
        self._stopping: set[asyncio.Task[None]] = set()
        self._seen: dict[str, int] = {}
        self._points: dict[str, int] = {}
        self._mismatched: dict[str, bool] = {}
        self._window = 0

    def served(self, served: Served) -> None:
        """Take in how rows were answered; about 1 us a row and guardrail, 64 rows at most."""
        rows = zip(served.experiments[:WATCHED_ROWS], served.units, strict=False)
        for place, (name, unit) in enumerate(rows):
            if name is None or unit is None:
                continue
            live = self._experiments.find(name)
            if live.kept.chosen is not None:
                continue  # it has ended since the row was assigned
            for guard, guardrail in zip(live.guards, live.spec.guardrails, strict=True):
                if guard is None:
                    continue
                fault = _is_fault(guardrail, served, place)
                if fault is None:
                    continue
                weights = live.weights_of(unit) if fault else None
                breach = guard.observe(unit, served.arm, fault=fault, weights=weights)
                if breach is not None:
                    self._stop(name, breach)

    async def run_forever(self) -> None:
        """Look at the metrics of what has changed, every few seconds; cancel it at any time."""
        while True:
            await asyncio.sleep(self._look_s)
            await self.look_at_all()

    async def look_at_all(self) -> None:
        """Look at every experiment that runs and has changed since the last look, over all members.

        Of several members the arbiter alone does.
        """
        for live in self._running() if self._decides() else ():
            name = live.spec.name
            if self._seen.get(name) != live.changed or not self._parts.is_alone:
                self._seen[name] = live.changed
                try:
                    await self._look_at(live)
                    self._missing.discard(name)
                except UnavailableError as error:  # without a member nothing is decided
                    if name not in self._missing:
                        _log.warning("experiment %s can't be looked at: %s", name, error.message)
                    self._missing.add(name)
                except Exception:  # noqa: BLE001 - one experiment must not blind the others
                    _log.exception("experiment %s could not be looked at", name)

    async def look(self, now_us: int) -> Window:
        """Return what alerts are made of: arms that cool down, and splits that don't match."""
        self._window += 1
        measured = [found for live in self._running() for found in self._measure(live, now_us)]
        return Window(self._window, measured)

    def _running(self) -> list[LiveExperiment]:
        return [live for live in self._experiments.all() if live.kept.chosen is None]

    async def timeline(self, name: str) -> list[dict[str, Any]]:
        """Return the points kept of an experiment, oldest first."""
        self._experiments.find(name)
        rows = await asyncio.to_thread(self._points_of, name)
        return [
            {
                "at": format_time(int.from_bytes(key[-8:], "big")),
                "comparisons": [dict(zip(_POINT, values, strict=True)) for values in value],
            }
            for key, value in rows
        ]

    async def close(self) -> None:
        """Wait until the arms that are being stopped are."""
        await asyncio.gather(*self._stopping, return_exceptions=True)

    def _stop(self, name: str, breach: Breach) -> None:
        task = asyncio.create_task(self._stop_arm(name, breach))
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)

    async def _stop_arm(self, name: str, breach: Breach) -> None:
        _log.warning(
            "experiment %s: arm %s is stopped by guardrail %s: %s",
            *(name, breach.arm, breach.guardrail, breach.reason),
        )
        try:
            await self._stops.stop(name, breach)
        except Exception:  # noqa: BLE001 - it holds in memory; a full disk must not end the daemon
            _log.exception("that arm %s of %s is stopped could not be stored", breach.arm, name)

    async def _look_at(self, live: LiveExperiment) -> None:
        name = live.spec.name
        frozen = await self._experiments.merged(live)
        ruling = await asyncio.to_thread(judge, frozen)
        self._mismatched[name] = ruling.sample_ratio_alarm
        self._keep_point(name, ruling)
        for breach in ruling.breaches:
            await self._stop_arm(name, breach)
        if ruling.promoted is not None and not ruling.breaches:
            arm, why = ruling.promoted
            _log.info("experiment %s: arm %s is promoted: %s", name, arm, why)
            await self._experiments.promote(name, arm, why)

    def _keep_point(self, name: str, ruling: Ruling) -> None:
        units = max((c.units for c in ruling.comparisons), default=0)
        decides = ruling.breaches or ruling.promoted
        if units == 0 or (units < GROWTH * self._last_units(name) and not decides):
            return
        self._points[name] = units
        key = _point_key(name, self._clock())
        value = msgpack.packb(
            [
                [getattr(c, field) for field in _POINT]
                for c in ruling.comparisons
                if c.difference is not None
            ]
        )

        def write(txn: WriteTransaction) -> None:
            txn.put(Table.EXPERIMENTS, key, value)

        self._writer.post(write, size_bytes=len(value))

    def _last_units(self, name: str) -> int:
        if name not in self._points:
            rows = self._points_of(name, newest=True)
            place = _POINT.index("units")
            self._points[name] = max((c[place] for _, cs in rows for c in cs), default=0)
        return self._points[name]

    def _points_of(self, name: str, *, newest: bool = False) -> list[tuple[bytes, Any]]:
        start, end = _point_key(name, 0), _point_key(name, (1 << 63) - 1)
        with self._environment.snapshot() as snapshot:
            rows = snapshot.scan(Table.EXPERIMENTS, start, end, reverse=newest)
            return [
                (key, msgpack.unpackb(value))
                for (key, value), _ in zip(rows, range(1 if newest else 100_000), strict=False)
            ]

    def _measure(self, live: LiveExperiment, now_us: int) -> list[Measurement]:
        name, group = live.spec.name, f"experiment {live.spec.name}"
        found = [
            Measurement(
                {ALERTNAME: "ArmStopped", "experiment": name, "arm": arm},
                group,
                float(now_us < until_us),
                1.0,
                _last_stop(live, arm),
            )
            for arm, until_us in live.kept.cooling.items()
        ]
        if name in self._mismatched:
            text = "units per arm don't match the weights: no result can be believed"
            labels = {ALERTNAME: "SampleRatio", "experiment": name}
            value = float(self._mismatched[name])
            found.append(Measurement(labels, group, value, 1.0, text))
        return found


_POINT = (
    *("metric", "arm", "control", "units", "value", "control_value", "difference"),
    *("low", "high", "verdict"),
)
"""What a point of the timeline keeps of a comparison."""

_FAULTS: Mapping[str, Callable[[Guardrail, Served, int], bool | None]] = {
    "errors": lambda _, served, __: None if served.is_late else served.scores is None,
    "latency": lambda guardrail, served, _: _was_slow(guardrail, served),
    "nulls": lambda _, served, place: (
        None if served.scores is None else bool(np.isnan(served.scores[place]).any())
    ),
}


def _was_slow(guardrail: Guardrail, served: Served) -> bool | None:
    """Tell whether an answer took too long, None if nobody knows: a deadline before the limit."""
    beyond = 1e3 * served.seconds > (guardrail.limit_ms or 0)
    if served.scores is not None:
        return beyond
    return True if served.is_late and beyond else None


def _is_fault(guardrail: Guardrail, served: Served, place: int) -> bool | None:
    """Tell whether a row was at fault, None if it can't be said: what failed has no score."""
    return _FAULTS[guardrail.on](guardrail, served, place)


def _last_stop(live: LiveExperiment, arm: str) -> str:
    stops = (e.why for e in reversed(live.kept.events) if (e.action, e.arm) == ("stopped", arm))
    return f"arm {arm} was stopped: {next(stops, 'for a reason no longer kept')}"


def _point_key(name: str, at_us: int) -> bytes:
    return name.encode() + b"\x00" + u64be(at_us)
