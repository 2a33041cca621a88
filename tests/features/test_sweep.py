"""The rows of one view are found, all of them and no others, however small the steps."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.hashing import SLOTS
from mlpd.core.time import system_clock
from mlpd.features.sweep import find_rows
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.writer import Writer

VIEW = 7
Row = tuple[int, int, int]
"""Slot, view id, entity."""


def key(slot: int, view_id: int, entity: int) -> bytes:
    return slot.to_bytes(2, "big") + view_id.to_bytes(4, "big") + entity.to_bytes(4, "big")


def sweep(environment: Environment, writer: Writer, *, rows_max: int, seeks_max: int) -> set[bytes]:
    """Remove the view's rows step by step and return them."""
    found: list[bytes] = []
    slot: int | None = 0
    while slot is not None:
        with environment.snapshot() as snapshot:
            keys, slot = find_rows(snapshot, VIEW, slot, rows_max=rows_max, seeks_max=seeks_max)
        assert len(keys) <= rows_max
        writer.write_blocking(lambda txn, keys=keys: [txn.delete(Table.ONLINE, k) for k in keys])
        found += keys
    assert len(found) == len(set(found))
    return set(found)


@pytest.mark.parametrize(("rows_max", "seeks_max"), [(1, 1), (3, 2), (100, 256), (10_000, 100_000)])
@given(
    rows=st.sets(
        st.tuples(
            st.sampled_from([0, 1, 2, 255, 256, 9_000, SLOTS - 2, SLOTS - 1]),
            st.sampled_from([1, VIEW - 1, VIEW, VIEW + 1, 1_000]),
            st.integers(0, 5),
        ),
        max_size=60,
    )
)
def test_every_row_of_the_view_is_found_once(
    tmp_path_factory: pytest.TempPathFactory, rows_max: int, seeks_max: int, rows: set[Row]
) -> None:
    check(tmp_path_factory.mktemp("sweep"), rows, rows_max, seeks_max)


def check(directory: Path, rows: set[Row], rows_max: int, seeks_max: int) -> None:
    keys = [key(*row) for row in rows]
    with Environment.open(directory, clock=system_clock) as environment:
        writer = Writer(environment)
        try:
            writer.write_blocking(lambda txn: [txn.put(Table.ONLINE, k, b"v") for k in keys])
            found = sweep(environment, writer, rows_max=rows_max, seeks_max=seeks_max)
            with environment.snapshot() as snapshot:
                left = {k for k, _ in snapshot.scan(Table.ONLINE)}
        finally:
            writer.close()
    assert found == {key(*row) for row in rows if row[1] == VIEW}
    assert left == set(keys) - found
