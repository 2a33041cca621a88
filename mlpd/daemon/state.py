"""The catalogs that run: stored with the data, found by the version that a transaction sees."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack

from mlpd.features.catalog import EMPTY_DOCUMENT, Catalog, build_catalog, read_state
from mlpd.storage.changes import note
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.transactions import Snapshot, WriteTransaction

_DEFINITIONS = Table.DEFINITIONS  # a local name: looking a member up in its enum costs 0.1 us
CURRENT_KEY = b"current"
"""Row of the DEFINITIONS table that holds the running catalog's state; see docs/formats/lmdb.md."""


VERSION_KEY = b"running"
"""Row of the DEFINITIONS table that holds the running version alone, u32be, and from its second
revision on u32be that."""

RESERVED_KEY = b"reserved"
"""Row of the DEFINITIONS table: u32be, the first view id that no building of a view has taken."""

CATALOGS_KEPT = 4
"""Catalogs at hand: the one that runs, one that an apply is about to store, and former ones that
snapshots may still show."""


class CatalogState:
    """Owner of the running catalog; any thread may ask it.

    What runs is what is committed, so the transaction tells: `catalog_in` gives an ingest operation
    the catalog of its place in the log, and a read the one that belongs to its snapshot.
    `catalog` is the newest that was seen committed, for whatever reads no features.
    """

    def __init__(self, kernels: Any, cache: Path) -> None:
        self._kernels = kernels
        self._cache = cache
        self.catalog = self.build(EMPTY_DOCUMENT, version=0, view_ids={}, next_view_id=1)
        self._at_start = self.catalog
        self._known: dict[bytes, Catalog] = {}

    def build(
        self,
        document: Mapping[str, Any],
        *,
        version: int,
        view_ids: Mapping[str, int],
        next_view_id: int,
        revision: int = 0,
        pinned: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Catalog:
        """Return a catalog that does not run yet; blocks while new transforms are compiled."""
        return build_catalog(
            document,
            version=version,
            view_ids=view_ids,
            next_view_id=next_view_id,
            kernels=self._kernels,
            cache=self._cache,
            revision=revision,
            pinned=pinned,
        )

    def restore(self, stored: bytes) -> Catalog:
        """Return the catalog of a stored state."""
        return self.build(**read_state(stored))

    def load(self, snapshot: Snapshot) -> None:
        """Run the catalog that was applied last; called at start."""
        stored = snapshot.get(Table.DEFINITIONS, CURRENT_KEY)
        if stored is not None:
            self.catalog = self._at_start = self.restore(stored)
            self._keep(self.catalog)

    def catalog_in(self, seen: Snapshot | WriteTransaction) -> Catalog:
        """Return the catalog that runs in a snapshot or write transaction.  About 0.3 us."""
        version = seen.get(_DEFINITIONS, VERSION_KEY)
        if version is None:  # nothing was applied since the row is written
            return self._at_start
        catalog = self._known.get(version)
        if catalog is None:  # a snapshot that has lived through several applies
            stored = seen.get(_DEFINITIONS, b"v" + version)
            assert stored is not None, f"no definitions of version {version.hex()}"
            catalog = self.restore(stored)
        return catalog

    def read_catalog(self, snapshot: Snapshot) -> Catalog:
        """Return the catalog that belongs to a snapshot, which is committed: follow it."""
        catalog = self.catalog_in(snapshot)
        if catalog.key > self.catalog.key:
            self.catalog = catalog
        return catalog

    def follow(self, environment: Environment) -> None:
        """Make `catalog` the one that is committed now."""
        with environment.snapshot() as snapshot:
            self.read_catalog(snapshot)

    def next_view_id(self, snapshot: Snapshot) -> int:
        """Return the first view id that no rows can have, also not those of a view half built."""
        reserved = snapshot.get(_DEFINITIONS, RESERVED_KEY) or b""
        return max(self.catalog.next_view_id, int.from_bytes(reserved, "big"))

    def reserve(self, txn: WriteTransaction, catalog: Catalog) -> None:
        """Take the view ids of `catalog` for good, before the first row under one is written."""
        txn.put(_DEFINITIONS, RESERVED_KEY, catalog.next_view_id.to_bytes(4, "big"))

    def store(self, txn: WriteTransaction, catalog: Catalog) -> None:
        """Store `catalog` as the running one and keep its version in the history."""
        self._keep(catalog)
        packed = msgpack.packb(catalog.to_state())
        txn.put(Table.DEFINITIONS, CURRENT_KEY, packed)
        note(txn, Table.DEFINITIONS, CURRENT_KEY)
        txn.put(Table.DEFINITIONS, VERSION_KEY, _key(catalog))
        txn.put(Table.DEFINITIONS, b"v" + _key(catalog), packed)

    def learn(self, stored: bytes) -> None:
        """Have at hand the catalog of a state that is about to be committed; blocks, compiling."""
        self._keep(self.restore(stored))

    def _keep(self, catalog: Catalog) -> None:
        """Have `catalog` at hand for transactions that see its version.

        If its transaction fails, none ever does, and the next one of this version replaces it.
        """
        others = [(key, known) for key, known in self._known.items() if key != _key(catalog)]
        self._known = dict([*others[1 - CATALOGS_KEPT :], (_key(catalog), catalog)])


def _key(catalog: Catalog) -> bytes:
    return b"".join(n.to_bytes(4, "big") for n in catalog.key[: 2 if catalog.revision else 1])
