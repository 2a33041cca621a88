"""Changes: in which order rows of what members share changed last, each by its own revision.

A row is noted in the transaction that changes it.  Only its last revision is kept, so that whoever
asks for what came after some revision gets every row once, as it is now.  docs/formats/lmdb.md has
the bytes; docs/paths/follow.md says who asks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import msgpack

from mlpd.storage.tables import Table, from_u64be, u64be
from mlpd.storage.transactions import Snapshot, WriteTransaction

_POSITION, _ROW, _REVISION = b"f", b"k", b"r"
_AFTER_REVISIONS = b"s"

Reader = Snapshot | WriteTransaction


class Change(NamedTuple):
    """A row that changed: `value` as it is now, None if it is gone."""

    revision: int
    table: Table
    key: bytes
    value: bytes | None


@dataclass(frozen=True, slots=True)
class Position:
    """How far a member of `cluster` has followed its arbiter.

    `definitions`: the arbiter's version of the definitions that it applied last, 0 for none.
    `leader`: the greatest fencing token that an arbiter has shown.
    """

    cluster: str
    revision: int = 0
    definitions: int = 0
    leader: tuple[int, int] = (0, 0)


def note(txn: WriteTransaction, table: Table, key: bytes) -> None:
    """Give a row that this transaction puts or deletes the next revision.  About 5 us."""
    row = _ROW + table.encode() + b"\x00" + key
    revision = u64be(newest_revision(txn) + 1)
    before = txn.get(Table.CHANGES, row)
    if before is not None:
        txn.delete(Table.CHANGES, _REVISION + before)
    txn.put(Table.CHANGES, row, revision)
    txn.put(Table.CHANGES, _REVISION + revision, row[1:])


def newest_revision(reader: Reader) -> int:
    """Return the revision of the latest change, 0 before the first.  About 3 us."""
    for key, _ in reader.scan(Table.CHANGES, _REVISION, _AFTER_REVISIONS, reverse=True):
        return from_u64be(key[1:])
    return 0


def changes_after(reader: Reader, revision: int, rows_max: int, bytes_max: int) -> list[Change]:
    """Return the first changes after a revision, in order; at least one if there is any.

    No more than `rows_max`, and none after values of `bytes_max` in all.
    """
    found, size_bytes = list[Change](), 0
    for change in islice(_changes(reader, revision), rows_max):
        found.append(change)
        size_bytes += len(change.key) + len(change.value or b"")
        if size_bytes >= bytes_max:
            break
    return found


def _changes(reader: Reader, revision: int) -> Iterator[Change]:
    start = _REVISION + u64be(revision + 1)
    for key, row in reader.scan(Table.CHANGES, start, _AFTER_REVISIONS):
        name, _, row_key = row.partition(b"\x00")
        table = Table(name.decode())
        yield Change(from_u64be(key[1:]), table, row_key, reader.get(table, row_key))


def load_position(reader: Reader) -> Position | None:
    """Return how far this member has followed, None if it never did."""
    stored = reader.get(Table.CHANGES, _POSITION)
    if stored is None:
        return None
    cluster, revision, definitions, *leader = msgpack.unpackb(stored)
    return Position(cluster, revision, definitions, (leader[0], leader[1]))


def store_position(txn: WriteTransaction, position: Position) -> None:
    """Note how far this member has followed."""
    numbers = position.revision, position.definitions, *position.leader
    packed = msgpack.packb([position.cluster, *numbers])
    txn.put(Table.CHANGES, _POSITION, packed)
