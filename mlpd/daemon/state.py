"""The catalog that runs now: stored with the data, swapped as one reference."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack

from mlpd.features.catalog import EMPTY_DOCUMENT, Catalog, build_catalog
from mlpd.storage.tables import Table
from mlpd.storage.transactions import Snapshot, WriteTransaction

CURRENT_KEY = b"current"
"""Row of the DEFINITIONS table that holds the running catalog's state; see docs/formats/lmdb.md."""


class CatalogState:
    """Owner of the running catalog.

    `catalog` may be read from any thread; it changes on the writer thread alone, inside the
    transaction that stores it, so that every ingest operation sees the catalog of its place in the
    log.
    """

    def __init__(self, kernels: Any, cache: Path) -> None:
        self._kernels = kernels
        self._cache = cache
        self.catalog = self.build(EMPTY_DOCUMENT, version=0, view_ids={}, next_view_id=1)

    def build(
        self,
        document: Mapping[str, Any],
        *,
        version: int,
        view_ids: Mapping[str, int],
        next_view_id: int,
    ) -> Catalog:
        """Return a catalog that does not run yet; blocks while new transforms are compiled."""
        return build_catalog(
            document,
            version=version,
            view_ids=view_ids,
            next_view_id=next_view_id,
            kernels=self._kernels,
            cache=self._cache,
        )

    def restore(self, state: Mapping[str, Any]) -> Catalog:
        """Return the catalog of a stored state."""
        return self.build(**state)

    def load(self, snapshot: Snapshot) -> None:
        """Run the catalog that was applied last; called at start."""
        stored = snapshot.get(Table.DEFINITIONS, CURRENT_KEY)
        if stored is not None:
            self.catalog = self.restore(msgpack.unpackb(stored))

    def store(self, txn: WriteTransaction, catalog: Catalog) -> None:
        """Store `catalog` as the running one and keep its version in the history."""
        packed = msgpack.packb(catalog.to_state())
        txn.put(Table.DEFINITIONS, CURRENT_KEY, packed)
        txn.put(Table.DEFINITIONS, b"v" + catalog.version.to_bytes(4, "big"), packed)
