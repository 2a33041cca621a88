"""Cuts through rows in time order: what is judged comes later, groups stay whole, gaps are kept."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.errors import ValidationError
from mlpd.core.specs import CrossValidationSpec
from mlpd.training.split import Timeline, split_folds, split_last, split_rows

TIMES = st.lists(st.integers(0, 60), min_size=8, max_size=80).map(sorted)
SIZES = st.lists(st.integers(1, 5), min_size=8, max_size=40)


def check(timeline: Timeline, before: slice, after: slice, gap: int) -> None:
    """Every row of `before` is older than every one of `after`, by the gap, and no group is cut."""
    t = timeline.t_us
    assert before.stop <= after.start
    assert t[before].max() <= t[after].min() - gap
    for edge in (before.start, before.stop, after.start, after.stop):
        assert edge == len(t) or edge in timeline.starts
    left_out = t[before.stop : after.start]
    assert (left_out > t[after.start] - gap).all()  # no row more than the gap asks for


@given(TIMES, st.sampled_from([0, 0, 3, 10]), st.sampled_from([0.15, 0.3]))
def test_train_valid_and_test_follow_each_other(times: list[int], gap: int, share: float) -> None:
    timeline, n = Timeline.of(np.array(times)), len(times)
    try:
        parts = split_rows(timeline, valid_share=share, test_share=share, gap_us=gap)
    except ValidationError as error:
        assert error.code == "empty_part"
        return
    assert parts["test"] == slice(n - round(n * share), n)
    assert parts["valid"].start == parts["test"].start - round(n * share)
    if gap:
        check(timeline, parts["train"], parts["valid"], gap)
        check(timeline, parts["valid"], parts["test"], gap)
    else:
        assert parts["train"] == slice(0, parts["valid"].start)


@given(SIZES, st.sampled_from([0, 2]), st.sampled_from([0.2, 0.3]))
def test_no_group_is_cut(sizes: list[int], gap: int, share: float) -> None:
    starts = np.cumsum(sizes) - sizes
    times = np.arange(sum(sizes))
    timeline = Timeline.of(times, np.array(sizes))
    assert timeline.starts.tolist() == starts.tolist()
    try:
        parts = split_rows(timeline, valid_share=share, test_share=share, gap_us=gap)
        cut = split_last(timeline, parts["train"], share=share, gap_us=gap)
    except ValidationError as error:
        assert error.code == "empty_part"
        return
    for before, after in ((parts["train"], parts["valid"]), (parts["valid"], parts["test"]), cut):
        check(timeline, before, after, gap)


@given(
    st.lists(st.integers(0, 1_000), min_size=40, max_size=120, unique=True).map(sorted),
    st.integers(2, 6),
    st.sampled_from(["expanding", "rolling"]),
    st.sampled_from([0, 5, 60]),
)
def test_folds_judge_each_row_once_on_what_came_before(
    times: list[int], folds: int, window: str, gap: int
) -> None:
    timeline, end = Timeline.of(np.array(times)), len(times) - 7
    spec = CrossValidationSpec(folds, window)  # type: ignore[arg-type]  # one of the two
    try:
        found = split_folds(timeline, end, spec, gap)
    except ValidationError as error:
        assert error.code == "empty_part"
        assert times[round(end / (folds + 1))] - gap < times[0]  # it takes all before fold 1
        return
    assert len(found) == folds
    judged = [row for _, rows in found for row in range(rows.start, rows.stop)]
    first = round(end / (folds + 1))
    assert judged == list(range(first, end))
    for past, later in found:
        check(timeline, past, later, gap)
        rows = past.stop - past.start
        assert past.start == 0 if window == "expanding" else rows <= first


def test_a_part_without_rows_is_an_error() -> None:
    timeline = Timeline.of(np.arange(20))
    with pytest.raises(ValidationError, match="train part"):
        split_rows(timeline, valid_share=0.3, test_share=0.3, gap_us=30)
    with pytest.raises(ValidationError, match="fold 1 of 2"):
        split_folds(timeline, 20, CrossValidationSpec(2), gap_us=9)
