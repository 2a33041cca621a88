"""Bandits at work: on their timetable each looks at what its old units say, and moves weights."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable

from mlpd.core.time import Clock, span_us
from mlpd.daemon.experiments import Experiments
from mlpd.daemon.live_experiment import LiveExperiment
from mlpd.experiments.analysis import MAX_PHASES
from mlpd.experiments.bandit import Bandit, Choice, choose, matured_pairs
from mlpd.experiments.records import Pair

LOOK_S = 5.0
_SLICE_UNITS = 500
"""Units per turn of the loop: below 1 ms."""

_log = logging.getLogger("mlpd.experiments")


class Bandits:
    """Moves the weights of all bandits, where `decides` says so; every method is the loop's."""

    def __init__(self, experiments: Experiments, decides: Callable[[], bool], clock: Clock) -> None:
        self._experiments = experiments
        self._decides = decides
        self._clock = clock
        self._looked_us: dict[str, int] = {}

    async def run_forever(self) -> None:
        """Look every few seconds; cancel it at any time."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Move each bandit whose time has come; what fails is tried again when it comes again."""
        for live in self._experiments.all() if self._decides() else ():
            bandit = live.spec.bandit
            if bandit is None or live.kept.chosen is not None:
                continue
            now_us = self._clock()
            if not self._is_due(live, bandit, now_us):
                continue
            self._looked_us[live.spec.name] = now_us
            try:
                await self._move(live, bandit, now_us)
            except Exception:  # noqa: BLE001 - one bandit must not hold up the others
                _log.exception("the weights of experiment %s could not be moved", live.spec.name)

    def _is_due(self, live: LiveExperiment, bandit: Bandit, now_us: int) -> bool:
        """Tell whether weights may move: they stay for their time, over restarts, too.

        What lies in the future was written before the clock was put back: nobody waits for that.
        """
        known = live.kept.phases[-1].started_us, self._looked_us.get(live.spec.name, 0)
        past = (at_us for at_us in known if at_us <= now_us)
        return now_us >= max(past, default=0) + span_us(bandit.every_s)

    async def _move(self, live: LiveExperiment, bandit: Bandit, now_us: int) -> None:
        name, phases = live.spec.name, len(live.kept.phases)
        choice = await self._choose(live, bandit, now_us - span_us(bandit.delay_s))
        live.choice = choice
        if choice.shares is not None:
            _log.info("experiment %s: %s", name, choice.why)
            await self._experiments.move(name, choice.shares, choice.why, phases=phases)

    async def _choose(self, live: LiveExperiment, bandit: Bandit, before_us: int) -> Choice:
        frozen = await live.frozen()
        if await asyncio.to_thread(lambda: frozen.result().sample_ratio.alarm):
            return Choice({}, {}, None, "units per arm don't match the weights")
        spec, phases = live.spec, live.kept.phases
        if len(phases) >= MAX_PHASES:
            return Choice({}, {}, None, f"it has had {len(phases)} phases: weights stay")
        names = [metric.name for metric in spec.metrics]
        index = 0 if bandit.metric is None else names.index(bandit.metric)
        metric = spec.metrics[index]
        pairs: defaultdict[tuple[int, str], list[Pair]] = defaultdict(list)
        records = list(live.records.values())
        for start in range(0, len(records), _SLICE_UNITS):
            part = records[start : start + _SLICE_UNITS]
            for key, pair in matured_pairs(part, index, metric, before_us):
                pairs[key].append(pair)
            await asyncio.sleep(0)
        shares = [phase.weights for phase in phases]
        return await asyncio.to_thread(
            choose, bandit, metric, spec.weights, pairs, draw=len(phases), phases=shares
        )
