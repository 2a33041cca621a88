"""Verb expire: history that a source keeps no longer goes; decisions/retention-of-history.md.

A child writes segments anew without it; one transaction puts them in the place of the former ones
and moves the source's horizon.  What a kill leaves is removed at the next start, and done again.
"""

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

from mlpd.core.errors import MlpdError
from mlpd.core.time import DAY_US, Clock, format_duration, format_time
from mlpd.daemon.definitions import DefinitionsVerb
from mlpd.daemon.predictions import KEY_BYTES, PredictionLog, arrival_key, decode_prediction
from mlpd.daemon.process import Child
from mlpd.daemon.state import CatalogState
from mlpd.features.catalog import Catalog
from mlpd.storage.compactor import Compactor
from mlpd.storage.environment import Environment
from mlpd.storage.expire import Expiry
from mlpd.storage.files import DataDirectory
from mlpd.storage.horizons import Horizon, load_horizons, move_horizon
from mlpd.storage.segments import (
    Manifest,
    Removal,
    decode_manifest,
    load_manifests,
    replace_manifests,
)
from mlpd.storage.tables import Table
from mlpd.storage.transactions import Snapshot, WriteTransaction
from mlpd.storage.writer import Writer

STEPS = 10
"""The cut moves on by this part of a retention, and by a day at most."""
EXPIRE_S = 60.0
"""How often is looked whether a cut is due."""
SERVED_MAX = 64
"""Rows of SERVED looked at for one that is still there: erasures leave some empty."""

_log = logging.getLogger("mlpd.expire")


class Expire:
    """Lets old history go, source by source; one instance per daemon, on the loop."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        state: CatalogState,
        definitions: DefinitionsVerb,
        compactor: Compactor,
        predictions: PredictionLog,
        paths: DataDirectory,
        clock: Clock,
    ) -> None:
        self._environment = environment
        self._writer = writer
        self._state = state
        self._definitions = definitions
        self._compactor = compactor
        self._predictions = predictions
        self._paths = paths
        self._clock = clock
        self._cuts: dict[str, int] = {}
        """Where each source was cut last, whether or not that took anything away."""
        self.removed = 0
        """Rows that went since the start."""

    async def run_forever(self) -> None:
        """Look for what is due every minute; cancel it at any time."""
        while True:
            try:
                await self.run()
            except MlpdError as error:
                _log.warning("old history could not be removed: %s", error.message)
            await asyncio.sleep(EXPIRE_S)

    async def run(self) -> int:
        """Let go of all that is due; return how many rows that were."""
        removed = 0
        for source in sorted(self._state.catalog.definitions.sources):
            if self._is_due(source):
                removed += await self._expire(source)
        return removed

    def describe(self) -> dict[str, dict[str, str | None]]:
        """Return, for sources that let history go, their `retention` and where it `begins`."""
        with self._environment.snapshot() as snapshot:
            horizons = load_horizons(snapshot)
        sources = self._state.catalog.definitions.sources
        declared = {n: s.retention_us for n, s in sources.items() if s.retention_us is not None}
        return {
            name: {
                "retention": format_duration(declared[name]) if name in declared else None,
                "begins": format_time(horizons[name].before_us) if name in horizons else None,
            }
            for name in sorted({*declared, *horizons})
        }

    def _is_due(self, source: str) -> bool:
        before_us = _cut(self._state.catalog, source, self._clock())
        last_us = self._cuts.get(source)
        if before_us is None or last_us is None:
            return before_us is not None
        retention_us = self._state.catalog.definitions.source(source).retention_us or 0
        return before_us - last_us >= min(retention_us // STEPS, DAY_US)

    async def _expire(self, source: str) -> int:
        async with self._definitions.exclusive(), self._compactor.paused():
            self._predictions.flush()
            await self._writer.write(lambda _: None)  # what was flushed is stored now
            expiry = await asyncio.to_thread(self._find, source)
            if expiry is None:
                return 0
            manifests = await self._rewrite(expiry)
            if manifests:
                switch = partial(_switch, expiry=expiry, manifests=manifests)
                self._compactor.keep_replaced(await self._writer.write(switch))
        removed = sum(r.rows for r in _removals(expiry, manifests))
        self._cuts[source] = expiry.before_us
        self.removed += removed
        return removed

    def _find(self, source: str) -> Expiry | None:
        """Return what of a source may go, None if no segment has any of it; in a thread."""
        catalog = self._state.catalog
        before_us = _cut(catalog, source, self._clock())
        if before_us is None:
            return None
        with self._environment.snapshot() as snapshot:
            through = self._first_seen(snapshot, before_us)
            manifests = load_manifests(snapshot)
        views = catalog.views_by_source[source]
        entities = [dict(view.entity.keys) for view in views if view.view.kind == "latest"]
        unique = [keys for i, keys in enumerate(entities) if keys not in entities[:i]]
        expiry = Expiry(source, before_us, through, unique)
        if any(expiry.may_touch(s) for m in manifests for s in m.segments):
            return expiry
        self._cuts[source] = before_us
        return None

    def _first_seen(self, snapshot: Snapshot, before_us: int) -> int:
        """Return the sequence that the first prediction logged since had seen, else the newest."""
        start = arrival_key(before_us, b"")
        for _, keys in islice(snapshot.scan(Table.SERVED, start), SERVED_MAX):
            parts = (keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES))
            rows = ((key, snapshot.get(Table.PREDICTIONS, key)) for key in parts)
            seen = [decode_prediction(key, value).sequence for key, value in rows if value]
            if seen:
                return min(seen)
        return int(snapshot.sequence)

    async def _rewrite(self, expiry: Expiry) -> list[Manifest]:
        request = {
            "directory": str(self._paths.root),
            "source": expiry.source,
            "before_us": expiry.before_us,
            "through": expiry.through,
            "entities": [[[n, str(dtype)] for n, dtype in k.items()] for k in expiry.entities],
        }
        return [decode_manifest(encoded) for encoded in await self._run_child(request)]

    async def _run_child(self, request: dict[str, Any]) -> list[bytes]:
        async with Child("expire", request) as child:
            done: list[bytes] = await child.result()
            return done


def _cut(catalog: Catalog, source: str, now_us: int) -> int | None:
    """Return before which time rows of a source may go, None if it keeps all.

    Pinned views may look further back than the definitions of now allow.
    """
    spec = catalog.definitions.sources.get(source)
    if spec is None or spec.retention_us is None:
        return None
    reaches = [view.view.reach_us for view in catalog.views_by_source[source]]
    return now_us - max([spec.retention_us, *reaches])


def _switch(txn: WriteTransaction, *, expiry: Expiry, manifests: Sequence[Manifest]) -> list[str]:
    stale = replace_manifests(txn, manifests)
    last = max(removal.last_sequence for removal in _removals(expiry, manifests))
    move_horizon(txn, expiry.source, Horizon(expiry.before_us, last))
    return stale


def _removals(expiry: Expiry, manifests: Sequence[Manifest]) -> list[Removal]:
    found = (removal for manifest in manifests for removal in manifest.removed)
    return [r for r in found if r.cause == expiry.cause and r.source == expiry.source]
