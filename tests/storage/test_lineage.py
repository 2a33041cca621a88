"""For which slots rows count, after any sequence of imports, cancellations and parts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.time import system_clock
from mlpd.storage.environment import Environment
from mlpd.storage.lineage import Import, Lineage, load_lineage, next_number, note_part, read_imports
from mlpd.storage.writer import Writer

SLOTS = range(4)
slot_sets = st.sets(st.sampled_from(SLOTS), min_size=1).map(lambda found: tuple(sorted(found)))
acts = st.lists(
    st.tuples(st.sampled_from(["live", "part", "import_", "cancel"]), slot_sets), max_size=12
)


class Model:
    """Rows with the slots for which each counts, by what happened."""

    def __init__(self) -> None:
        self.imports: list[Import] = []
        self.rows: dict[int, set[int]] = {}
        self.owned, self.sequence = set(SLOTS), 0

    def live(self, slots: tuple[int, ...]) -> None:
        self._add(2, self.owned)
        del slots

    def part(self, slots: tuple[int, ...]) -> None:
        first, last = self._add(2, self.owned & set(slots))
        self.imports.append(Import(len(self.imports) + 1, slots).with_rows(first, last))

    def import_(self, slots: tuple[int, ...], *, cancelled: bool = False) -> None:
        """The slots leave, and come back by an import with live rows in between."""
        since = self.sequence
        self.owned -= set(slots)
        for counting in self.rows.values():
            counting -= set(slots)
        one = Import(len(self.imports) + 1, slots, since)
        for count in (1, 2):
            ends = self._add(count, set() if cancelled else set(slots))
            one = one.with_rows(*ends)
            self._add(1, self.owned)
        if not cancelled:
            one = Import(one.number, slots, since, self.sequence, one.ranges)
            self.owned |= set(slots)
        self.imports.append(one)

    def cancel(self, slots: tuple[int, ...]) -> None:
        self.import_(slots, cancelled=True)

    def _add(self, count: int, slots: set[int]) -> tuple[int, int]:
        first = self.sequence + 1
        self.sequence += count
        self.rows |= {row: set(slots) for row in range(first, self.sequence + 1)}
        return first, self.sequence


@given(acts)
def test_a_row_counts_for_what_it_was_brought_for(story: list[tuple[str, tuple[int, ...]]]) -> None:
    model = Model()
    for act, slots in story:
        getattr(model, act)(slots)
    lineage, owned = Lineage(tuple(model.imports)), sorted(model.owned)
    sequences = np.array(list(model.rows), np.int64)
    for slot in owned:
        found = lineage.counts(np.full(len(sequences), slot), sequences)
        assert found.tolist() == [slot in counting for counting in model.rows.values()], slot
    groups = lineage.origins(owned)
    assert sorted(slot for group in groups for slot in group) == owned
    for group in groups:
        for counting in model.rows.values():  # it counts for all of them that it concerns, or none
            assert counting & set(group) in (set(), set(group))


def test_imports_are_kept_and_neighbouring_parts_are_one(tmp_path: object) -> None:
    environment = Environment.open(str(tmp_path), clock=system_clock)
    writer = Writer(environment)
    try:
        with environment.snapshot() as snapshot:
            assert load_lineage(snapshot) is None
        one = Import(1, (0, 1, 7), since=5, live_from=9, ranges=((6, 7), (9, 9)))
        writer.write_blocking(one.store)
        for first, last in ((10, 11), (12, 12), (15, 15)):
            writer.write_blocking(lambda txn, f=first, t=last: note_part(txn, (7,), f, t))
        with environment.snapshot() as snapshot:
            assert next_number(snapshot) == 3
            assert [*read_imports(snapshot)] == [one, Import(2, (7,), ranges=((10, 12), (15, 15)))]
    finally:
        writer.close()
        environment.close()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_ranges_join_where_they_touch(number: int) -> None:
    one = Import(number, (1,)).with_rows(1, 2).with_rows(3, 3).with_rows(5, 6)
    assert one.ranges == ((1, 3), (5, 6))
