"""Lineage: for which slots the rows of a log count, once slots came to this shard from another.

An event of several entities may then lie in one log twice, each copy for other slots.  It is told
by sequence and slot alone; docs/decisions/moving-slots.md says why, docs/formats/lmdb.md has the
bytes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from mlpd.core.hashing import SLOTS
from mlpd.core.shards import format_runs, parse_runs
from mlpd.storage.tables import Table, from_u64be, u64be
from mlpd.storage.transactions import Snapshot, WriteTransaction

PREFIX = b"moved/"
"""Before the number of an import in META."""

Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Import:
    """Rows of the log that count for certain `slots` alone.

    `ranges`: their first and last sequences, ascending.  `since`: for slots that moved here, the
    newest sequence when their import began; `live_from`: the one when it was sealed, after which
    rows that just come count for the slots; None before, and for an import that was cancelled: its
    rows count for none.  Both are None for rows that were sent for these slots alone (`is_part`).
    """

    number: int
    slots: tuple[int, ...]
    since: int | None = None
    live_from: int | None = None
    ranges: tuple[tuple[int, int], ...] = ()

    @property
    def is_part(self) -> bool:
        """Whether these are rows of senders that split them anew, not of an import."""
        return self.since is None

    def with_rows(self, first: int, last: int) -> "Import":
        """Return it with one more range, behind all others."""
        *before, end = self.ranges or ((0, -1),)
        joined = ((end[0], last),) if end[1] == first - 1 else (end, (first, last))
        return replace(self, ranges=(*before, *(r for r in joined if r[0])))

    def store(self, txn: WriteTransaction) -> None:
        """Write it to META."""
        txn.put(Table.META, PREFIX + u64be(self.number), msgpack.packb(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Return what `decode_import` reads, beside its number."""
        return {
            "slots": format_runs(self.slots),
            "since": self.since,
            "live_from": self.live_from,
            "ranges": self.ranges,
        }


@dataclass(frozen=True)
class Lineage:
    """For which slots rows count; a value, any thread."""

    imports: tuple[Import, ...]
    _since: Int64s = field(init=False, repr=False)
    _live_from: Int64s = field(init=False, repr=False)
    _latest: Int64s = field(init=False, repr=False)
    _firsts: Int64s = field(init=False, repr=False)
    _lasts: Int64s = field(init=False, repr=False)
    _of: Int64s = field(init=False, repr=False)
    _sets: NDArray[np.bool_] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        since, live_from, latest = (np.zeros(SLOTS, np.int64) for _ in range(3))
        sets = np.zeros((len(self.imports), SLOTS), np.bool_)
        for index, one in enumerate(self.imports):
            slots = list(one.slots)
            if one.since is not None and one.live_from is not None:
                since[slots], live_from[slots], latest[slots] = one.since, one.live_from, one.number
            sets[index, slots] = one.is_part or one.live_from is not None
        ranges = sorted((*r, index) for index, one in enumerate(self.imports) for r in one.ranges)
        firsts, lasts, of = np.array(ranges, np.int64).reshape(-1, 3).T
        for name, value in (
            ("_since", since), ("_live_from", live_from), ("_latest", latest), ("_sets", sets),
            ("_firsts", firsts), ("_lasts", lasts), ("_of", of),
        ):  # fmt: skip
            object.__setattr__(self, name, value)

    def counts(self, slots: Int64s, sequences: Int64s) -> NDArray[np.bool_]:
        """Tell of which rows the event counts for a slot: one slot each, int64 [n]; 0.1 us each."""
        if not len(self._firsts):
            unmarked: NDArray[np.bool_] = sequences > self._live_from[slots]
            return unmarked
        at = np.searchsorted(self._firsts, sequences, "right") - 1
        is_marked = (at >= 0) & (sequences <= self._lasts[at])
        imported = self._sets[self._of[at], slots] & (sequences > self._since[slots])
        return np.where(is_marked, imported, sequences > self._live_from[slots])

    def brought_for_others(self, slots: Int64s, sequences: Int64s) -> NDArray[np.bool_]:
        """Tell of which rows an import that counts brought the event, but not for its `slots`."""
        if not len(self._firsts):
            return np.zeros(len(sequences), np.bool_)
        at = np.searchsorted(self._firsts, sequences, "right") - 1
        is_marked = (at >= 0) & (sequences <= self._lasts[at])
        is_live: NDArray[np.bool_] = np.any(self._sets, axis=1)
        answer: NDArray[np.bool_] = is_marked & is_live[self._of[at]]
        return answer & ~self._sets[self._of[at], slots]

    def is_whole(self, slots: Int64s, sequences: Int64s) -> NDArray[np.bool_]:
        """Tell where a number of this log tells all that a slot had seen: not before it came."""
        answer: NDArray[np.bool_] = self._live_from[slots] <= sequences
        return answer

    def has(self, slot: int, sequences: Sequence[int]) -> bool:
        """Tell whether one of an event's rows counts for a slot.

        Without a sequence: whether what was here from the beginning does.
        """
        if not sequences:
            return not self._live_from[slot]
        rows = np.array(sequences, np.int64)
        return bool(self.counts(np.full(len(rows), slot), rows).any())

    def came_by(self, slots: Int64s) -> Int64s:
        """Return the number of the import by which each slot came last, 0 where by none."""
        return self._latest[slots]

    def with_companions(self, slots: Iterable[int]) -> list[int]:
        """Return slots with all others that came by the same imports, ascending.

        What was refused before these came was refused for all of them: so few sets are told apart.
        """
        wanted = np.array([*slots], np.int64)
        numbers = np.unique(self._latest[wanted])
        together = np.isin(self._latest, numbers[numbers > 0])
        together[wanted] = True
        found: list[int] = np.flatnonzero(together).tolist()
        return found

    def origins(self, slots: Iterable[int]) -> list[list[int]]:
        """Return slots, ascending, in groups for which the same rows count."""
        parts = [(one, set(one.slots)) for one in self.imports if one.is_part]
        found: dict[tuple[int, ...], list[int]] = {}
        for slot in slots:
            since = int(self._since[slot])
            of_parts = (
                one.number for one, part in parts if slot in part and one.ranges[-1][1] > since
            )
            found.setdefault((int(self._latest[slot]), *of_parts), []).append(slot)
        return list(found.values())


def read_imports(reader: Snapshot | WriteTransaction) -> Iterator[Import]:
    """Yield the imports, the oldest first."""
    for key, value in reader.scan(Table.META, PREFIX, PREFIX[:-1] + b"0"):
        yield decode_import(from_u64be(key[len(PREFIX) :]), msgpack.unpackb(value))


def decode_import(number: int, fields: Mapping[str, Any]) -> Import:
    """Return the import that `Import.to_dict` gave."""
    return Import(
        number,
        tuple(parse_runs(fields["slots"])),
        fields["since"],
        fields["live_from"],
        tuple((first, last) for first, last in fields["ranges"]),
    )


def encode_lineage(lineage: Lineage | None) -> list[Any]:
    """Return what `decode_lineage` reads: pairs of number and fields."""
    imports = () if lineage is None else lineage.imports
    return [[one.number, one.to_dict()] for one in imports]


def decode_lineage(value: Iterable[Any]) -> Lineage | None:
    """Return a lineage that another shard told of its own; None for none."""
    imports = tuple(decode_import(number, fields) for number, fields in value)
    return Lineage(imports) if imports else None


def load_lineage(reader: Snapshot | WriteTransaction) -> Lineage | None:
    """Return the lineage, None where no slot ever came from elsewhere; 5 us then."""
    imports = tuple(read_imports(reader))
    return Lineage(imports) if imports else None


def next_number(reader: Snapshot | WriteTransaction) -> int:
    """Return the number of the next import."""
    return max((one.number for one in read_imports(reader)), default=0) + 1


def note_part(txn: WriteTransaction, slots: Iterable[int], first: int, last: int) -> None:
    """Note that rows which were just appended count for these slots alone."""
    wanted, imports = tuple(slots), [*read_imports(txn)]
    newest = imports[-1] if imports else None
    if newest is None or not newest.is_part or newest.slots != wanted:
        newest = Import(next_number(txn), wanted)
    newest.with_rows(first, last).store(txn)
