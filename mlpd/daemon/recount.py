"""Verb recount: performance, experiments and outcomes go along when slots come or go.

All three are sums over what is stored of the slots that this shard owns.  The log of predictions is
the truth: what came with slots is taken in from there, what left is taken out, and a start finds
the same.
"""

import asyncio

from mlpd.daemon.outcomes import Outcomes
from mlpd.daemon.ownership import Ownership
from mlpd.daemon.predictions import PredictionLog
from mlpd.daemon.unit_outcomes import UnitOutcomes
from mlpd.storage.environment import Environment
from mlpd.storage.moved_keys import read_outcomes


class Recount:
    """Follows the map; one instance per daemon, on the loop."""

    def __init__(
        self,
        environment: Environment,
        ownership: Ownership,
        predictions: PredictionLog,
        outcomes: Outcomes,
        units: UnitOutcomes,
    ) -> None:
        self._environment = environment
        self._ownership = ownership
        self._predictions = predictions
        self._outcomes = outcomes
        self._units = units
        self._lock = asyncio.Lock()

    async def start(self) -> int:
        """Take in what is stored; returns how many predictions.  Once, before all else."""
        async with self._lock:
            rows = await self._outcomes.rebuild(self._environment, self._ownership.mapped)
            await self._units.rebuild()
        return rows

    async def run(self) -> None:
        """Count what is owned now; at once where that is counted already."""
        async with self._lock:
            flags = self._ownership.mapped
            if self._outcomes.counts(flags):
                return
            self._units.pause()
            gained: list[int] = []
            try:
                gained = await self._outcomes.go_by(
                    self._environment, flags, self._predictions.settle
                )
            finally:
                await self._units.take_in(self._brought() if gained else [])

    async def run_forever(self) -> None:
        """Follow the map; cancel it at any time."""
        changed = self._ownership.changed
        while True:
            await changed.wait()
            changed.clear()
            await self.run()

    def _brought(self) -> list[bytes]:
        with self._environment.snapshot() as snapshot:
            return read_outcomes(snapshot)
