"""Served rows that left with their slots: by slot and moment, on disk, until nothing is left."""

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.hashing import SLOTS
from mlpd.daemon.served_left import forget_left, listed_keys, load_left, note_left
from mlpd.storage.moves_store import Arriving, store_arriving
from mlpd.storage.transactions import WriteTransaction


class _Table(dict[bytes, bytes]):
    """META as a dict: what these functions ask of a transaction."""

    known_us = 0

    def get(self, _: Any, key: bytes) -> bytes | None:  # type: ignore[override]
        return super().get(key)

    def put(self, _: Any, key: bytes, value: bytes) -> None:
        self[key] = value

    def delete(self, _: Any, key: bytes) -> bool:
        return self.pop(key, None) is not None

    def scan(self, _: Any, start: bytes, stop: bytes) -> Any:
        return iter([(k, v) for k, v in sorted(self.items()) if start <= k < stop])


moves = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True), max_size=6)


@given(moves, st.lists(st.tuples(st.integers(0, 9), st.integers(0, 700)), max_size=30))
def test_a_row_is_gone_if_its_slot_left_after_it_came(
    left: list[list[int]], rows: list[tuple[int, int]]
) -> None:
    txn: Any = _Table()
    for number, slots in enumerate(left, start=1):
        txn.known_us = 100 * number
        note_left(txn, sorted(slots))
    found = load_left(txn)
    if found is None:
        assert not left
        return
    slots, arrived_us = (np.array([row[i] for row in rows], np.int64) for i in (0, 1))
    wanted = [
        any(slot in gone and came <= 100 * number for number, gone in enumerate(left, start=1))
        for slot, came in rows
    ]
    assert found.gone(slots, arrived_us).tolist() == wanted
    for (slot, came), gone in zip(rows, wanted, strict=True):
        key = slot.to_bytes(2, "big") + bytes(14)
        assert listed_keys(came.to_bytes(8, "big") + key, key, found) == [key] * (not gone)
    assert forget_left(txn, 101, 10) == (1 if left else 0)
    assert forget_left(txn, 10_000, 2) == min(2, len(left) - 1)


async def test_rows_of_slots_that_arrive_are_not_looked_at_yet(open_daemon: Any) -> None:
    async with open_daemon() as daemon:

        def begin(txn: WriteTransaction) -> None:
            note_left(txn, [3])
            store_arriving(txn, Arriving("m", (7, 8), "a", "d", 1))

        await daemon.writer.write(begin)
        with daemon.environment.snapshot() as snapshot:
            found = load_left(snapshot)
        assert found is not None
        late_us = np.full(SLOTS, 2**62)
        assert np.flatnonzero(found.gone(np.arange(SLOTS), late_us)).tolist() == [7, 8]
        await daemon.writer.write(lambda txn: store_arriving(txn, None))
        await daemon.retention.run()  # the note is young: it stays
        with daemon.environment.snapshot() as snapshot:
            found = load_left(snapshot)
        assert found is not None
        assert np.flatnonzero(found.gone(np.arange(SLOTS), np.zeros(SLOTS, np.int64))).tolist() == [
            3
        ]
