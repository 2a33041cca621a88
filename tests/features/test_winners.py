"""Winners of point-in-time joins equal brute force: any order, any ties, all modes, both ends."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.columns import DType
from mlpd.core.convert import column_of
from mlpd.core.errors import InternalError, ValidationError
from mlpd.core.specs import EntitySpec
from mlpd.features.key_codes import shared_codes
from mlpd.features.stamps import Stamps
from mlpd.features.winners import Closed, Mode, find_winners
from mlpd.storage.frames import FrameColumns, to_series

MODES: list[Mode] = ["as_known", "as_corrected", "as_of_sequence"]
ENDS: list[Closed] = ["right", "left"]

# (code, event time, lateness), with few values each: ties everywhere
EVENTS = st.lists(
    st.tuples(st.integers(-1, 2), st.integers(0, 12), st.sampled_from([0, 0, 1, 5])), max_size=40
)
ROWS = st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 18), st.integers(0, 41)), max_size=30)


@given(events=EVENTS, rows=ROWS, order=st.randoms(use_true_random=False), one=st.booleans())
@pytest.mark.parametrize("closed", ENDS)
@pytest.mark.parametrize("mode", MODES)
def test_winners_are_those_of_brute_force(
    mode: Mode, closed: Closed, events: list[Any], rows: list[Any], order: Any, one: bool
) -> None:
    numbered = [(c, t, t + late, i + 1) for i, (c, t, late) in enumerate(events)]
    order.shuffle(numbered)
    asked = [(c, t, rows[0][2] if one else s) for c, t, s in rows]
    found = winners(numbered, asked, mode, closed)
    assert found == [expected(numbered, row, mode, closed) for row in asked]


def winners(
    events: Sequence[tuple[int, ...]], rows: Sequence[tuple[int, ...]], mode: Mode, closed: Closed
) -> list[int]:
    codes, *stamps = np.array(events, np.int64).reshape(-1, 4).T.copy()
    spine_codes, t_us, sequences = np.array(rows, np.int64).reshape(-1, 3).T.copy()
    found = find_winners(
        codes, Stamps(*stamps), spine_codes, t_us, sequences, mode=mode, closed=closed
    )
    return found.tolist()


def expected(
    events: Sequence[tuple[int, ...]], row: tuple[int, ...], mode: Mode, closed: Closed
) -> int:
    code, t, sequence = row
    seen = [
        (stamp, index)
        for index, (c, *stamp) in enumerate(events)
        if c == code >= 0
        and (stamp[0] < t or closed == "right")
        and (mode != "as_corrected" or stamp[0] <= t)
        and (mode != "as_known" or stamp[1] <= t)
        and (mode != "as_of_sequence" or stamp[2] <= sequence)
    ]
    return max(seen)[1] if seen else -1


def test_many_rows_of_one_entity_in_any_order_find_their_events() -> None:
    rng = np.random.default_rng(3)
    n = 3000
    times = np.sort(rng.integers(0, 10 * n, n))
    stamps = Stamps(times, times, np.arange(1, n + 1))
    t_us = rng.integers(-5, 10 * n + 5, n)
    codes = np.zeros(n, np.int64)
    found = find_winners(codes, stamps, codes, t_us, None, mode="as_known")
    assert found.tolist() == (np.searchsorted(times, t_us, "right") - 1).tolist()


def test_no_events_and_no_rows_are_fine() -> None:
    none = np.empty(0, np.int64)
    stamps = Stamps(none, none, none)
    one = np.zeros(1, np.int64)
    for mode in MODES:
        assert find_winners(none, stamps, none, none, none, mode=mode).tolist() == []
        assert find_winners(none, stamps, one, one, one, mode=mode).tolist() == [-1]


def test_sequences_are_asked_for_and_codes_checked() -> None:
    one = np.zeros(1, np.int64)
    stamps = Stamps(one, one, one)
    with pytest.raises(ValidationError) as refused:
        find_winners(one, stamps, one, one, None, mode="as_of_sequence")
    assert refused.value.code == "missing_sequence"
    with pytest.raises(InternalError):
        find_winners(one - 2, stamps, one, one, None, mode="as_known")


PARTS = {
    "code": (DType.STRING, st.sampled_from([None, "", "a", "a\x00", "1", "ü" * 300])),
    "row": (DType.INT64, st.sampled_from([None, 0, 1, -1, 2**63 - 1, -(2**63)])),
    "0": (DType.BYTES, st.sampled_from([None, b"", b"\x00", b"\xff"])),
}
KEYS = st.tuples(*(values for _, values in PARTS.values()))


@given(
    left=st.lists(KEYS, max_size=12),
    right=st.lists(KEYS, max_size=12),
    names=st.lists(st.sampled_from(sorted(PARTS)), min_size=1, unique=True),
    framed=st.booleans(),
)
def test_codes_are_equal_where_keys_are(
    left: list[Any], right: list[Any], names: list[str], framed: bool
) -> None:
    entity = EntitySpec("thing", tuple((name, PARTS[name][0]) for name in names))
    sides = [table(rows, framed) for rows in (left, right)]
    codes = [side.tolist() for side in shared_codes(entity, *sides)]
    keys = [[tuple(row[list(PARTS).index(n)] for n in names) for row in s] for s in (left, right)]
    asked = dict.fromkeys(key for key in keys[1] if None not in key)
    for side in (0, 1):
        assert [code >= 0 for code in codes[side]] == [key in asked for key in keys[side]]
    found = {k: c for k, c in zip(keys[1], codes[1], strict=True) if c >= 0}
    assert len(set(found.values())) == len(found)
    assert all(found[k] == c for k, c in zip(keys[0], codes[0], strict=True) if c >= 0)


def table(rows: list[Any], framed: bool) -> Any:
    import polars as pl  # noqa: PLC0415

    types = {name: dtype for name, (dtype, _) in PARTS.items()}
    columns = {n: column_of(t, [row[i] for row in rows]) for i, (n, t) in enumerate(types.items())}
    if not framed:
        return columns
    return FrameColumns(pl.DataFrame([to_series(n, c) for n, c in columns.items()]), types)
