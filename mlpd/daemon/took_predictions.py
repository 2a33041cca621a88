"""Predictions that come with slots: given sequences of this log, stored, listed, counted later.

A prediction says which sequence of the log it saw.  Its rows came here in their order, so what it
saw is told by the last of them: that row's sequence here takes the place of the source's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np

from mlpd.daemon.moved_predictions import Item, Row, Served
from mlpd.daemon.predictions import (
    ARM,
    EXPERIMENT,
    PHASE,
    SEQUENCE,
    UNIT,
    arrival_key,
    brought_along,
    list_served,
    prediction_facts,
)
from mlpd.daemon.unit_outcomes import split_key
from mlpd.storage.environment import Environment
from mlpd.storage.lineage import read_imports
from mlpd.storage.moved_keys import OUTCOMES, UNITS, hash_of, load_sequences
from mlpd.storage.moves_store import Arriving
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

_REMOVED = 500

Unit = tuple[str, str, str, int]
"""Experiment, unit, arm, phase."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """Rows as they are stored here, outcomes, and the units that the rows are of."""

    rows: Sequence[Row]
    outcomes: Sequence[Item]
    units: Sequence[Unit]


def map_rows(environment: Environment, arriving: Arriving, chunk: Served) -> Mapped:
    """Return what a chunk brings; all history that its predictions saw is here.  Blocks.

    10 us per row, and 1 ms for each 100,000 rows of the history.  Raises ValueError for rows of
    other slots, and what a row raises that is none.
    """
    flags = arriving.flags
    if any(not flags[key[0] << 8 | key[1]] for key, *_ in chunk.rows):
        raise ValueError("predictions of other slots came")
    facts = [None if value is None else prediction_facts(value) for _, value, _ in chunk.rows]
    with environment.snapshot() as snapshot:
        theirs, ours = load_sequences(snapshot)
        one = next(one for one in read_imports(snapshot) if one.number == arriving.number)
    before = np.concatenate([[one.since or 0], ours])
    seen = [0 if found is None else found[SEQUENCE] for found in facts]
    sequences = before[np.searchsorted(theirs, seen, "right")].tolist()
    rows = [
        (key, None if value is None else brought_along(value, sequence, arriving.number), label)
        for (key, value, label), sequence in zip(chunk.rows, sequences, strict=True)
    ]
    units = {
        (found[EXPERIMENT], found[UNIT]): (found[ARM], found[PHASE])
        for found in reversed([found for found in facts if found is not None])
        if found[EXPERIMENT] is not None and found[UNIT] is not None
    }
    return Mapped(rows, chunk.outcomes, [(*unit, *how) for unit, how in units.items()])


def store_rows(txn: WriteTransaction, mapped: Mapped) -> int:
    """Store what a chunk brings; returns how many predictions are new here."""
    new = []
    for key, value, label in mapped.rows:
        if value is not None:
            if txn.get(Table.PREDICTIONS, key) is None:
                new.append(key)
            txn.put(Table.PREDICTIONS, key, value)
        _put_label(txn, key, label)
    list_served(txn, new)
    for experiment, unit, *_ in mapped.units:
        txn.put(Table.META, UNITS + _unit_hash(experiment, unit), b"")
    for key, value in mapped.outcomes:
        _put_outcome(txn, key, value)
    return len(new)


def _put_label(txn: WriteTransaction, key: bytes, label: bytes | None) -> None:
    if label is None:
        txn.delete(Table.LABELS, key)
        return
    is_orphan = txn.get(Table.PREDICTIONS, key) is None
    if is_orphan and txn.get(Table.LABELS, key) is None:
        txn.put(Table.ORPHANS, arrival_key(txn.known_us, key), b"")
    txn.put(Table.LABELS, key, label)


def _put_outcome(txn: WriteTransaction, key: bytes, value: bytes | None) -> None:
    """Store an outcome, if its unit came: others of that shard are not of these slots."""
    experiment, unit, _ = split_key(key)
    if value is None or txn.get(Table.META, UNITS + _unit_hash(experiment, unit)) is None:
        return
    brought = OUTCOMES + hash_of(key)
    if txn.get(Table.META, brought) is None and txn.get(Table.UNITS, key) is not None:
        return  # the unit has been here as well, with the same outcome
    txn.put(Table.META, brought, key)
    txn.put(Table.UNITS, key, value)


def _unit_hash(experiment: str, unit: str) -> bytes:
    return hash_of(experiment.encode(), unit.encode())


async def remove_outcomes(writer: Writer) -> None:
    """Remove the outcomes that came with a move that was cancelled."""
    while await writer.write(partial(_remove, rows_max=_REMOVED)):
        pass


def _remove(txn: WriteTransaction, *, rows_max: int) -> int:
    found = [*islice(_brought(txn), rows_max)]
    for listed, key in found:
        txn.delete(Table.UNITS, key)
        txn.delete(Table.META, listed)
    return len(found)


def _brought(txn: WriteTransaction) -> Iterator[tuple[bytes, bytes]]:
    return iter(txn.scan(Table.META, OUTCOMES, OUTCOMES[:-1] + b"0"))
