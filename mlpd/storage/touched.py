"""Which entities commits touched: told by the writer, asked by whoever keeps what was read.

A commit is noted before it can be seen, so whoever has a snapshot finds all commits in it noted.
"""

import threading
from collections import deque
from collections.abc import Set as AbstractSet

from mlpd.storage.tables import Table

ENTITIES_MAX = 1_024
"""A commit that touches more has touched anything: keeping a set of 100,000 took 15 ms."""
KEPT_MAX = 16_384
"""Entities kept, of all commits that nobody has taken yet."""
ROWS_OF_ENTITIES = (Table.ONLINE, Table.TILES)
_ENTITY_AT = 6  # u16be slot || u32be view id || entity

Touched = set[bytes] | None
"""The entities whose rows or tiles one write transaction changes; None: any."""


def touch(touched: set[bytes], table: Table, key: bytes) -> Touched:
    """Return `touched` with the entity of a key that is put or deleted; 0.2 us."""
    if table in ROWS_OF_ENTITIES:
        touched.add(key[_ENTITY_AT:])
        if len(touched) > ENTITIES_MAX:
            return None
    return touched


class TouchedLog:
    """What commits touched since they were last asked for; bounded, any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._commits: deque[tuple[int, Touched]] = deque()
        self._kept = 0
        self._forgotten_id = 0
        self._has_forgotten = False

    def note(self, txn_id: int, entities: Touched) -> None:
        """Keep what a transaction touched that is about to be committed, in their order."""
        if entities is not None and not entities:
            return
        with self._lock:
            self._kept += 1 if entities is None else len(entities)
            if self._kept > KEPT_MAX:
                self._commits.clear()
                self._kept, self._forgotten_id, self._has_forgotten = 0, txn_id, True
            else:
                self._commits.append((txn_id, entities))

    def take(self, txn_id: int) -> AbstractSet[bytes] | None:
        """Return what commits up to this one touched since the last `take`, None for anything."""
        if not self._commits and not self._has_forgotten:  # the usual case, without the lock
            return frozenset()
        with self._lock:
            is_known = not self._has_forgotten
            if txn_id >= self._forgotten_id:
                self._has_forgotten = False
            found = set[bytes]()
            while self._commits and self._commits[0][0] <= txn_id:
                _, entities = self._commits.popleft()
                self._kept -= 1 if entities is None else len(entities)
                is_known &= entities is not None
                found |= entities or frozenset()
            return found if is_known else None
