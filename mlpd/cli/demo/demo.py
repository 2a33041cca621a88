"""The main job on a running daemon: backfill, training, replay, audit; from nothing to findings."""

import os
import time
from dataclasses import dataclass
from typing import Any, Final

from mlpd.cli.demo import steps
from mlpd.cli.demo.findings import Findings, Trained, observe
from mlpd.cli.demo.flights import build_events, data_folder, read_flights
from mlpd.cli.demo.memory import MemoryWatch
from mlpd.cli.demo.process import Running
from mlpd.cli.demo.replay import Act, Replay
from mlpd.cli.demo.timeline import Tick, Timeline, build_timeline, month_us
from mlpd.cli.output import note, progress
from mlpd.client import Client
from mlpd.core.time import DAY_US

FIRST_MONTH: Final = 10
"""Before October everything is history; from here on the demo lives through it."""
SHADOW_MONTH: Final = 11
EXPERIMENT_MONTH: Final = 12

TIMEOUT_S: Final = 600.0
"""For one call; the consistency audit of a quarter takes the longest."""
_BAR_TICKS: Final = 50


@dataclass(frozen=True, slots=True)
class Scope:
    """How much is done: all of it, or a slice that shows the same in less time.

    `months`: how many of October, November and December are replayed.  `days`: only the first so
    many of each.  `history_us`: the import begins here.  `retrain_us`: the second model's training
    begins so long before November, while the replay goes on.
    """

    months: int = 3
    days: int = 31
    history_us: int = 0
    retrain_us: int = 8 * DAY_US
    latency_requests: int = 2_000

    @property
    def end_us(self) -> int:
        """End of the replay, exclusive."""
        return month_us(FIRST_MONTH + self.months)


def run_demo(daemon: Running, scope: Scope, started_s: float) -> Findings:
    """Do the main job on a daemon, or a router over several, without data; takes minutes.

    `started_s`: from where on, on `time.monotonic()`, the duration counts.
    """
    client = Client(daemon.address, timeout_s=TIMEOUT_S, by="mlpd demo")
    with MemoryWatch(os.getpid()) as memory, client:
        client.wait_ready()
        steps.apply_definitions(client)
        daemon.settle()
        folder = data_folder()
        flights = read_flights(folder)
        events = build_events(folder, flights)
        start_us = month_us(FIRST_MONTH)
        imported = steps.backfill(client, events, scope.history_us, start_us)
        timeline = build_timeline(flights, events, start_us, scope.end_us, days=scope.days)
        del flights, events
        champion = steps.train(client, steps.JOB, "training the first model")
        steps.start_serving(client, champion["version"])
        daemon.settle()
        ablation_id = steps.start_run(client, steps.ABLATION_JOB)
        retraining = _Retraining(client)
        replay = Replay(client, steps.ROUTE, timeline, _acts(daemon, client, scope, retraining))
        replay_s = _run(replay)
        ablation = steps.finish_run(client, ablation_id, "training without features")
        trained = Trained(champion, ablation, retraining.result)
        observed = observe(client, start_us, scope.end_us)
        latency_ms = _latency(daemon, timeline, scope.latency_requests)
        note("Comparing every logged prediction with the log ...")
        audit = client.run_consistency()
    return Findings(
        imported=imported,
        replayed=replay.totals,
        replay_s=replay_s,
        trained=trained,
        observed=observed,
        audit=audit,
        latency_ms=latency_ms,
        duration_s=time.monotonic() - started_s,
        memory_bytes=memory.peak_bytes,
        data_dir=str(daemon.root),
        url=daemon.url,
    )


class _Retraining:
    """The second model: trained beside the replay, a shadow once November has come."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._run_id = ""
        self.result: dict[str, Any] | None = None

    def begin(self) -> None:
        self._run_id = steps.start_run(self._client, steps.JOB)

    def become_shadow(self) -> None:
        self.result = steps.finish_run(self._client, self._run_id, "training the second model")
        steps.start_shadow(self._client, self.result["version"])


def _acts(daemon: Running, client: Client, scope: Scope, retraining: _Retraining) -> list[Act]:
    """Return what the user does during the replay, as far as its months reach."""
    november_us, december_us = month_us(SHADOW_MONTH), month_us(EXPERIMENT_MONTH)
    acts = []
    if scope.end_us > november_us:
        acts = [
            Act(november_us - scope.retrain_us, retraining.begin),
            Act(november_us, retraining.become_shadow),
            Act(november_us, daemon.settle),
        ]
    if scope.end_us > december_us:
        acts += [
            Act(december_us, lambda: steps.start_experiment(client)),
            Act(december_us, daemon.settle),
        ]
    return acts


def _run(replay: Replay) -> float:
    """Run the replay with a progress bar; returns its seconds."""
    total = len(replay.timeline.flights["carrier"])
    started_s = time.monotonic()
    with progress("replaying October to December", total, unit="predictions") as bar:
        shown = 0

        def on_tick(tick: Tick) -> None:
            nonlocal shown
            if tick.stop - shown >= _BAR_TICKS:
                bar.advance(tick.stop - shown)
                shown = tick.stop

        replay.on_tick = on_tick
        replay.run()
    return time.monotonic() - started_s


def _latency(daemon: Running, timeline: Timeline, requests: int) -> list[float]:
    """Measure over TCP, as a service elsewhere would ask, with the last flights' rows."""
    ticks = timeline.ticks[-requests:]
    rows = [row for tick in ticks for row in timeline.rows(tick)][-requests:]
    at_us = max(timeline.ticks[-1].t_us, timeline.labels[-1].time_us) + 1
    with Client(daemon.url, by="mlpd demo") as client:
        return steps.measure_latency(client, rows, at_us)
