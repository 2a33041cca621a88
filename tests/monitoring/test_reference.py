"""Edges, categories, calibration and the profile's exact round trip."""

import json
import math
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.core.time import DAY_US, HOUR_US
from mlpd.monitoring.divergence import psi_adjusted
from mlpd.monitoring.reference import (
    CATEGORIES_MAX,
    FeatureKind,
    ReferenceProfile,
    bin_index,
    build_edges,
    build_reference,
)

ODD = st.one_of(
    st.floats(),
    st.sampled_from([0.0, -0.0, 1.0, 1e6, math.nan, math.inf, -math.inf, 1.7976931348623157e308]),
)


def plain_quantile(ordered: list[float], tenth: int) -> float:
    """Return the smallest x of the sample with F(x) >= tenth/10."""
    for index, value in enumerate(ordered):
        if (index + 1) * 10 >= tenth * len(ordered):
            return value
    raise AssertionError


def plain_edges(values: list[float]) -> list[float]:
    ordered = sorted(value for value in values if math.isfinite(value))
    distinct = sorted(set(ordered))
    cuts: list[float] = []
    if len(distinct) > 10:
        cuts = [plain_quantile(ordered, tenth) for tenth in range(1, 10)]
        atoms = [value for value in set(cuts) if cuts.count(value) >= 2]
    else:
        atoms = distinct
    edges = {*cuts, *atoms, *(math.nextafter(value, math.inf) for value in atoms)}
    return sorted(edge for edge in edges if math.isfinite(edge))


def profile_one(
    values: NDArray[np.float64],
    kind: FeatureKind = "numeric",
    t_us: NDArray[np.int64] | None = None,
) -> ReferenceProfile:
    return build_reference(values[:, None], names=["x"], kinds=[kind], t_us=t_us)


@given(st.lists(ODD, max_size=60) | st.lists(st.integers(0, 15).map(float), max_size=200))
def test_edges_are_what_plain_python_gives(values: list[float]) -> None:
    assert build_edges(np.array(values, np.float64)).tolist() == plain_edges(values)


def test_a_value_of_two_quantiles_is_an_atom_between_its_gaps() -> None:
    values = np.concatenate([np.zeros(900), np.arange(1.0, 101.0)])
    edges = build_edges(values).tolist()
    assert edges[:2] == [0.0, 5e-324]
    column = profile_one(values).features[0]
    assert column.counts == (0, 900, 100, 0)


def test_deciles_of_distinct_values_hold_a_tenth_each() -> None:
    column = profile_one(np.random.default_rng(0).permutation(1000).astype(np.float64)).features[0]
    assert sum(column.counts) == 1000
    assert all(abs(count - 100) <= 1 for count in column.counts[:-1])
    assert column.counts[-1] == 0


def test_shape_is_of_finite_values_and_missing_has_the_last_bin() -> None:
    column = profile_one(np.array([1.0, 3.0, np.nan, np.inf, -np.inf, 1e6])).features[0]
    assert (column.low, column.high) == (1.0, 1e6)
    assert column.mean == pytest.approx((4 + 1e6) / 3)
    assert column.counts[0] == 1  # -inf, below every edge
    assert column.counts[-2] == 1  # +inf, above every atom
    assert column.counts[-1] == 1
    assert sum(column.counts) == 6


@pytest.mark.parametrize("values", [[], [np.nan] * 5, [7.0] * 5, [np.inf, np.nan], [2.0]])
@pytest.mark.parametrize("kind", ["numeric", "categorical"])
def test_degenerate_columns_have_a_profile(values: list[float], kind: FeatureKind) -> None:
    array = np.array(values, np.float64)
    profile = profile_one(array, kind, np.zeros(len(values), np.int64))
    column = profile.features[0]
    assert sum(column.counts) == len(values)
    assert column.thresholds == ()
    assert ReferenceProfile.from_dict(profile.to_dict()) == profile


def test_the_hundred_most_frequent_codes_have_bins_and_the_rest_share_other() -> None:
    codes = np.repeat(np.arange(130.0), np.arange(130, 0, -1))  # code 0 is the most frequent
    rng = np.random.default_rng(4)
    column = profile_one(rng.permutation(codes), "categorical").features[0]
    assert column.bins == CATEGORIES_MAX + 3
    assert column.counts[:3] == (130, 129, 128)
    assert column.counts[-3:] == (sum(range(1, 31)), 0, 0)
    probe = np.array([0.0, 99.0, 100.0, 129.0, 130.0, -1.0, 0.5, np.nan, np.inf])
    assert bin_index(column, probe).tolist() == [0, 99, 100, 100, 101, 101, 101, 102, 101]


def test_equally_frequent_codes_are_kept_in_order_of_the_code() -> None:
    codes = np.tile(np.arange(150.0), 2)
    column = profile_one(codes, "categorical").features[0]
    probe = bin_index(column, np.arange(150.0))
    assert probe.tolist() == [min(code, 100) for code in range(150)]


def test_threshold_is_mean_plus_three_deviations_over_windows_of_enough_rows() -> None:
    """Each tenth of the windows against the rows outside of it."""
    rng = np.random.default_rng(5)
    values = rng.normal(size=25 * 200 + 50)
    windows = np.repeat(np.arange(26), 200)[: len(values)]  # the last one has 50 rows
    column = profile_one(values, t_us=windows * DAY_US).features[0]
    index = bin_index(column, values)
    drifts = []
    for part in ([0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [12, 13, 14], [15, 16], [17, 18],
                 [19, 20], [21, 22], [23, 24]):  # fmt: skip
        rest = np.bincount(index[~np.isin(windows, part)], minlength=column.bins)
        of_part = [np.bincount(index[windows == w], minlength=column.bins) for w in part]
        drifts += [float(psi_adjusted(rest, counts)) for counts in of_part]
    assert column.threshold(DAY_US) == pytest.approx(np.mean(drifts) + 3 * np.std(drifts, ddof=1))


def test_each_width_of_window_has_its_own_threshold_where_it_has_windows_enough() -> None:
    """Four hours of 150 rows a day, each at its own level: an hour is a narrow band of a day."""
    rng = np.random.default_rng(8)
    hours = np.concatenate([day * 24 + np.array([2, 8, 14, 20]) for day in range(30)])
    t_us = np.repeat(hours, 150) * HOUR_US
    values = rng.normal(size=len(t_us)) + np.repeat(hours % 24, 150)
    column = profile_one(values, t_us=t_us).features[0]
    assert [width for width, _ in column.thresholds] == [HOUR_US, 6 * HOUR_US, DAY_US]
    of_hour, of_day = column.threshold(HOUR_US), column.threshold(DAY_US)
    assert of_hour is not None
    assert of_day is not None
    assert of_hour > 10 * of_day
    assert column.threshold(2 * HOUR_US) == column.threshold(1) == of_hour
    assert column.threshold(DAY_US - 1) == column.threshold(6 * HOUR_US)
    assert column.threshold(30 * DAY_US) == of_day
    assert profile_one(values).features[0].threshold(DAY_US) is None


def test_thresholds_of_days_alone_are_stored_as_they_always_were() -> None:
    values = np.random.default_rng(9).normal(size=20 * 300)
    plain = profile_one(values)
    column = replace(plain.features[0], thresholds=((DAY_US, 0.5),))
    days = replace(plain, features=(column,)).to_dict()
    assert (days["format"], days["features"][0]["threshold"]) == (1, 0.5)
    assert "thresholds" not in days["features"][0]
    column = replace(column, thresholds=((HOUR_US, 2.0), (DAY_US, 0.5), (7 * DAY_US, 0.1)))
    more = replace(plain, features=(column,))
    assert more.to_dict()["format"] == 2
    assert ReferenceProfile.from_dict(json.loads(json.dumps(more.to_dict()))) == more
    assert ReferenceProfile.from_dict(days).features[0].thresholds == ((DAY_US, 0.5),)


def test_fewer_than_twenty_windows_calibrate_nothing() -> None:
    values = np.random.default_rng(6).normal(size=19 * 150)
    t_us = np.arange(len(values)) // 150 * DAY_US
    assert profile_one(values, t_us=t_us).features[0].thresholds == ()


@given(st.lists(st.tuples(ODD, ODD), max_size=80))
def test_profile_survives_json_and_msgpack_to_the_bit(rows: list[tuple[float, float]]) -> None:
    vectors = np.array(rows, np.float64).reshape(-1, 2)
    profile = build_reference(
        vectors, names=["a", "b"], kinds=["numeric", "categorical"], gains=[0.1, 3.0]
    )
    for encode, decode in ((json.dumps, json.loads), (msgpack.packb, msgpack.unpackb)):
        back = ReferenceProfile.from_dict(decode(encode(profile.to_dict())))
        assert back == profile
        assert back.digest() == profile.digest()


def test_digest_changes_with_a_single_count() -> None:
    values = np.arange(100.0)
    assert profile_one(values).digest() != profile_one(np.append(values, 5.0)).digest()


def test_a_score_gets_a_profile_of_its_own() -> None:
    rng = np.random.default_rng(7)
    profile = build_reference(
        rng.random((50, 2)), names=["a", "b"], kinds=["numeric"] * 2, scores=rng.random(50)
    )
    assert profile.score is not None
    assert [column.name for column in profile.columns] == ["a", "b", "score"]
    assert sum(profile.score.counts) == 50


def test_wrong_shapes_and_formats_are_refused() -> None:
    vectors = np.zeros((3, 2))
    with pytest.raises(ValidationError, match="names has 1"):
        build_reference(vectors, names=["a"], kinds=["numeric"] * 2)
    with pytest.raises(ValidationError, match="scores has 2"):
        build_reference(vectors, names=["a", "b"], kinds=["numeric"] * 2, scores=np.zeros(2))
    with pytest.raises(ValidationError, match="float64"):
        build_reference(np.zeros(3), names=["a"], kinds=["numeric"])
    with pytest.raises(ValidationError, match="format 9"):
        ReferenceProfile.from_dict({"format": 9})
