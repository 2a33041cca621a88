"""Checks that take a child process, by schedule: features together, and how losses have moved.

When an interval of the wall clock is over, each version that has served is checked over it; alerts
are made of what was found.
"""

import asyncio
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from mlpd.core.config import AlertsConfig
from mlpd.core.time import DAY_US, Clock, parse_time
from mlpd.daemon.drift import Drift, DriftQuery
from mlpd.daemon.looks import Window
from mlpd.daemon.monitor import Monitor
from mlpd.daemon.performance import Analysis
from mlpd.daemon.served_looks import DAYS_BACK_MAX, Boundaries
from mlpd.monitoring.alerts import ALERTNAME, Measurement

LOOK_S = 60.0
"""How often the clock is asked whether an interval is over."""

_log = logging.getLogger("mlpd.checks")


class ScheduledChecks:
    """Runs the checks, and is a look of the alerts; on the loop.  `start` and `stop` once each."""

    names = frozenset({"ConceptDrift", "MultivariateDrift"})

    def __init__(
        self,
        drift: Drift,
        analysis: Analysis,
        monitor: Monitor,
        config: AlertsConfig,
        every_us: int,
        clock: Clock,
    ) -> None:
        self._drift = drift
        self._analysis = analysis
        self._monitor = monitor
        self._config = config
        self._every_us = every_us
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self._window: Window | None = None

    def start(self) -> None:
        """Begin to check by schedule."""
        self._task = asyncio.create_task(self._run_forever())

    async def stop(self) -> None:
        """Stop checking; a child under way ends."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def look(self, now_us: int) -> Window | None:  # noqa: ARG002 - a round is a window
        """Return what the last round measured, once."""
        window, self._window = self._window, None
        return window

    async def run_once(self, start_us: int, end_us: int) -> None:
        """Check [start, end) of whatever was served in it, and all losses of its models.

        What fails is logged and not measured: its alerts stay as they are.
        """
        served, measured = self._monitor.versions_served(), list[Measurement]()
        for model, number in served:
            query = DriftQuery(version=number, start_us=start_us, end_us=end_us)
            try:
                found = await self._drift.check(model, query)
                measured += _together(found, self._config.classifier_auc)
            except Exception:  # noqa: BLE001 - a check never stops the others
                _log.exception("%s@%d could not be checked", model, number)
        for model in sorted({model for model, _ in served}):
            try:
                judged = await self._analysis.run(model)
                numbers = {number for name, number in served if name == model}
                measured += _concepts(judged, numbers, self._clock() - DAYS_BACK_MAX * DAY_US)
            except Exception:  # noqa: BLE001 - as above
                _log.exception("losses of %s could not be judged", model)
        self._window = Window(start_us, measured)

    async def _run_forever(self) -> None:
        boundaries = Boundaries(self._every_us, self._clock())
        while True:
            await asyncio.sleep(min(LOOK_S, self._every_us / 1e6))
            closed = boundaries.closed(self._clock())
            if closed is not None:
                await self.run_once(*closed)


def _together(found: Mapping[str, Any], auc_max: float) -> Iterator[Measurement]:
    """Yield what the checks of features together measured; nothing where rows were too few."""
    rebuilt, told = found["reconstruction"], found["classifier"]["auc"]
    rows = f"{found['rows']} rows since {found['start']}"
    if rebuilt["state"] in ("ok", "alert") and rebuilt["threshold"] > 0.0:
        text = (
            f"rows are {rebuilt['error']:.4g} off the principal components of training, "
            f"{rebuilt['reference_error']:.4g} in training ({rows})"
        )
        yield _check(found, "reconstruction", rebuilt["error"], rebuilt["threshold"], text)
    if told is not None:
        text = (
            f"a classifier tells {rows} from the {found['reference_rows']} before: AUC "
            f"{told['value']:.3f}, at least {told['low']:.3f}"
        )
        yield _check(found, "classifier", told["low"], auc_max, text)


def _check(
    found: Mapping[str, Any], check: str, value: float, threshold: float, text: str
) -> Measurement:
    labels = {"model": found["model"], "version": str(found["version"]), "check": check}
    group = f"model {found['model']}"
    return Measurement({ALERTNAME: "MultivariateDrift", **labels}, group, value, threshold, text)


def _concepts(
    judged: Mapping[str, Any], numbers: set[int], oldest_us: int
) -> Iterator[Measurement]:
    """Yield by version that serves whether its losses have grown; nothing while nobody can tell."""
    for version in judged["versions"]:
        concept, model = version["concept"], judged["model"]
        last = concept["sequence"][-1] if concept["sequence"] else None
        if version["version"] not in numbers or last is None:
            continue
        if parse_time(f"{last['day']}T00:00:00Z", "day") < oldest_us:
            continue
        text = (
            f"the mean loss of {last['rows']} labels up to {last['day']} is {last['loss']:.4g}, "
            f"{concept['reference_loss']:.4g} on held-out rows"
        )
        if concept["state"] == "worse":
            text = f"worse since {concept['since']}: {text}"
        labels = {"model": model, "version": str(version["version"])}
        is_worse = float(concept["state"] == "worse")
        yield Measurement(
            {ALERTNAME: "ConceptDrift", **labels}, f"model {model}", is_worse, 1.0, text
        )
