"""Verb audit: is what was served what the log says?  Recomputed in a child, bit for bit."""

import asyncio
import json
from typing import Any

from mlpd.core.errors import MlpdError
from mlpd.core.time import Clock, format_time
from mlpd.daemon.offline import offline_request
from mlpd.daemon.predictions import PredictionLog
from mlpd.daemon.process import Child
from mlpd.daemon.state import CatalogState
from mlpd.registry.models import Registry
from mlpd.registry.origin import Origin
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.writer import Writer


class Audit:
    """Runs the consistency audit and keeps what the last one found; one at a time."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        state: CatalogState,
        registry: Registry,
        log: PredictionLog,
        paths: DataDirectory,
        clock: Clock,
    ) -> None:
        self._environment = environment
        self._writer = writer
        self._state = state
        self._registry = registry
        self._log = log
        self._paths = paths
        self._clock = clock
        self._lock = asyncio.Lock()
        self._last: dict[str, Any] | None = None
        self.rows = {"match": 0, "mismatch": 0, "unavailable": 0}

    def last(self) -> dict[str, Any] | None:
        """Return what the last audit since the start found, or None."""
        return self._last

    async def run(self, limit: int | None = None) -> dict[str, Any]:
        """Recompute up to `limit` logged predictions (None: all) and compare every value."""
        async with self._lock:
            self._log.flush()
            await self._writer.write(lambda _: None)  # what was flushed is stored now
            with self._environment.snapshot() as snapshot:
                through = snapshot.sequence
                catalog = self._state.read_catalog(snapshot)
            request = {
                **offline_request(self._paths, catalog, through),
                "limit": limit,
                "versions": await self._versions(),
            }
            async with Child("audit", request) as child:
                found: dict[str, Any] = await child.result()
            self._last = {**found, "at": format_time(self._clock())}
            self.rows["mismatch"] += found["mismatched_rows"]
            self.rows["match"] += found["rows_compared"] - found["mismatched_rows"]
            self.rows["unavailable"] += found["unavailable"]
            return self._last

    async def _versions(self) -> dict[str, Any]:
        """Return encoder and service of every version that can be read."""
        found = {}
        for model in self._registry.models():
            for version in self._registry.versions(model.name):
                if version.is_deleted:
                    continue
                try:
                    encoder = await self._registry.load_file(
                        model.name, version.number, "encoder.json"
                    )
                    lineage = await self._registry.load_lineage(model.name, version.number)
                except MlpdError:
                    continue  # quarantined or damaged: its rows count as unavailable
                if isinstance(lineage, Origin):
                    continue  # has no features to recompute
                found[version.reference] = {
                    "encoder": json.loads(encoder),
                    "service": lineage.service,
                    "service_hash": lineage.service_hash,
                }
        return found
