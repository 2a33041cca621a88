"""The leader's lease: who may change what members share, and run schedules; with a fencing token.

Embedded, the lock is that of the arbiter's data directory (`lock.py`), and the lease a row in it:
whoever takes it over writes the next term, and each later change is made in a transaction that
looks whether the term is still its own.  An engine would keep the same in its key-value store.
"""

from typing import NamedTuple, Protocol

import msgpack

from mlpd.storage.tables import Table
from mlpd.storage.transactions import Snapshot, WriteTransaction

_LEASE = b"leader"


class Lease(NamedTuple):
    """A fencing token, which only grows: the epoch of the leader's map, and how often it was taken.

    Of two leaders the one with the greater token is the later.
    """

    epoch: int
    term: int


class LeaderStore(Protocol):
    """Keeps the last lease."""

    def acquire(self, txn: WriteTransaction, epoch: int) -> Lease:
        """Take the lease: its token is greater than all before; from then on those are fenced."""
        ...

    def current(self, reader: Snapshot | WriteTransaction) -> Lease | None:
        """Return the last lease, None before the first."""
        ...


class TableLeaderStore:
    """The lease as a row of the META table."""

    def acquire(self, txn: WriteTransaction, epoch: int) -> Lease:
        """As `LeaderStore.acquire`; durable with the transaction."""
        before = self.current(txn) or Lease(0, 0)
        taken = Lease(max(epoch, before.epoch), before.term + 1)
        txn.put(Table.META, _LEASE, msgpack.packb([*taken]))
        return taken

    def current(self, reader: Snapshot | WriteTransaction) -> Lease | None:
        """As `LeaderStore.current`; about 1 us."""
        stored = reader.get(Table.META, _LEASE)
        return None if stored is None else Lease(*msgpack.unpackb(stored))
