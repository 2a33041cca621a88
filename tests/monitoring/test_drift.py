"""Reports: states, families of tests, degenerate windows, and what is only shown."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from mlpd.core.errors import ValidationError
from mlpd.core.time import DAY_US, HOUR_US
from mlpd.monitoring.counting import CountLayout, Counts, PlainKernels
from mlpd.monitoring.divergence import adjust_benjamini_hochberg, chi_square_p, psi_adjusted
from mlpd.monitoring.drift import P_MAX, ROWS_MIN, WARN_PSI, DriftReport, rebased, report
from mlpd.monitoring.reference import ReferenceProfile, bin_index, build_reference

Matrix = NDArray[np.float64]
NAMES = ["normal", "flag", "code"]


def sample(rows: int, seed: int, shift: float = 0.0) -> Matrix:
    rng = np.random.default_rng(seed)
    return np.column_stack([
        rng.normal(shift, size=rows),
        (rng.random(rows) < 0.3).astype(float),
        rng.integers(0, 6, rows).astype(float),
    ])  # fmt: skip


REFERENCE = sample(5000, 1)
PROFILE = build_reference(
    REFERENCE,
    names=NAMES,
    kinds=["numeric", "numeric", "categorical"],
    scores=np.random.default_rng(1).random(5000),
    gains=[6.0, 3.0, 1.0],
)


def count(
    vectors: Matrix, scores: Matrix | None = None, profile: ReferenceProfile = PROFILE
) -> Counts:
    if scores is None:
        scores = np.random.default_rng(2).random(len(vectors))
    counts = Counts(CountLayout(profile))
    rows = np.column_stack([vectors, scores]) if profile.score is not None else vectors
    counts.add_rows(np.ascontiguousarray(rows), kernels=PlainKernels())
    return counts


def compare(vectors: Matrix, scores: Matrix | None = None) -> DriftReport:
    return report(PROFILE, count(vectors, scores))


def by_name(found: DriftReport) -> dict[str, str]:
    return {feature.name: feature.state for feature in found.features}


def test_the_same_distribution_is_ok() -> None:
    found = compare(sample(1000, 3))
    assert (found.state, found.drifted, found.drifted_share) == ("ok", [], 0.0)
    assert found.prediction is not None
    assert found.prediction.state == "ok"


def test_counts_identical_to_the_reference_are_exactly_zero() -> None:
    counts = count(REFERENCE, np.random.default_rng(1).random(5000))
    for column in (*report(PROFILE, counts).features, report(PROFILE, counts).prediction):
        assert column is not None
        assert (column.psi, column.psi_adjusted, column.js) == (0.0, 0.0, 0.0)
        assert column.p_adjusted == pytest.approx(1.0)
        assert column.ks in (0.0, None)
        assert column.w1_sigma is None or column.w1_sigma == pytest.approx(0.0, abs=1e-12)


def test_a_shift_warns_then_alerts_and_names_the_feature() -> None:
    # PSI of a normal shifted by d is about d squared.
    assert by_name(compare(sample(2000, 4, 0.38)))["normal"] == "warn"
    found = compare(sample(2000, 4, 0.8))
    assert by_name(found) == {"normal": "alert", "flag": "ok", "code": "ok"}
    assert found.state == "alert"
    assert found.drifted == ["normal"]
    assert found.drifted_share == pytest.approx(0.6)
    assert found.features[0].w1_sigma == pytest.approx(0.8, abs=0.25)  # ten bins, long tails
    assert found.features[0].ks == pytest.approx(2 * stats.norm.cdf(0.4) - 1, abs=0.03)


def test_fewer_than_a_hundred_rows_are_never_ok() -> None:
    for rows in (0, 1, ROWS_MIN - 1):
        found = compare(sample(rows, 5, 9.0))
        assert found.state == "insufficient"
        assert set(by_name(found).values()) == {"insufficient"}
        assert found.drifted_share is None
    assert compare(sample(ROWS_MIN, 5, 9.0)).state == "alert"


def test_a_calibrated_threshold_above_the_fixed_ones_silences() -> None:
    loud = replace(PROFILE, features=(replace(PROFILE.features[0], thresholds=((DAY_US, 2.0),)),
                                      *PROFILE.features[1:]))  # fmt: skip
    counts = count(sample(2000, 4, 0.8))
    assert report(PROFILE, counts).features[0].state == "alert"
    assert report(loud, counts).features[0].state == "ok"


def test_a_calibrated_threshold_below_the_fixed_ones_changes_nothing() -> None:
    quiet = replace(PROFILE, features=(replace(PROFILE.features[0], thresholds=((DAY_US, 0.001),)),
                                       *PROFILE.features[1:]))  # fmt: skip
    assert report(quiet, count(sample(2000, 6, 0.2))).features[0].state == "ok"


def test_a_window_is_held_against_the_threshold_of_its_width() -> None:
    of_widths = ((HOUR_US, 2.0), (DAY_US, 0.3))
    profile = replace(PROFILE, features=(replace(PROFILE.features[0], thresholds=of_widths),
                                         *PROFILE.features[1:]))  # fmt: skip
    counts = count(sample(2000, 4, 0.8))  # psi is about 0.6
    hour = report(profile, counts, width_us=HOUR_US).features[0]
    assert (hour.state, hour.threshold) == ("ok", 2.0)
    day = report(profile, counts, width_us=7 * DAY_US).features[0]
    assert (day.state, day.threshold) == ("alert", 0.3)
    assert report(profile, counts).features[0] == day


def test_a_large_effect_in_few_rows_without_significance_is_ok() -> None:
    # One row of a code new to the reference out of 100 has p > 0.01 after adjustment.
    found = compare(sample(110, 12))
    assert max(feature.psi for feature in found.features) > 0.05
    assert found.state == "ok"


def test_p_values_are_adjusted_over_the_features_and_the_score_apart() -> None:
    found = compare(sample(500, 7, 0.1))
    expected = stats.false_discovery_control([feature.p for feature in found.features])
    assert [f.p_adjusted for f in found.features] == pytest.approx(expected.tolist())
    assert found.prediction is not None
    assert found.prediction.p_adjusted == found.prediction.p


def test_prediction_drift_alone_is_an_alert_of_the_model() -> None:
    found = compare(sample(1000, 8), np.random.default_rng(8).random(1000) ** 3)
    assert found.drifted == []
    assert found.prediction is not None
    assert (found.prediction.state, found.state) == ("alert", "alert")


def test_a_feed_that_breaks_off_is_drift() -> None:
    vectors = sample(500, 9)
    vectors[:, 0] = np.nan
    feature = compare(vectors).features[0]
    assert feature.state == "alert"
    assert (feature.missing_share, feature.reference_missing_share) == (1.0, 0.0)
    assert feature.mean is feature.ks is feature.w1_sigma is None


def test_a_new_category_is_finite_drift_and_counted() -> None:
    vectors = sample(500, 10)
    vectors[:250, 2] = 77.0
    feature = compare(vectors).features[2]
    assert feature.state == "alert"
    assert feature.new_share == 0.5
    assert np.isfinite(feature.psi)


def test_one_far_outlier_is_no_drift_and_counted_out_of_range() -> None:
    vectors = sample(1000, 11)
    vectors[0, 0] = 1e6
    feature = compare(vectors).features[0]
    assert feature.state == "ok"
    assert feature.out_of_range_share == 0.001
    assert feature.w1_sigma is not None
    assert feature.w1_sigma < 2000  # 1e6 / 1000 rows, not a tenth of the rows stretched to 1e6


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, -np.inf, 1e6, 1e308, -1.7e308])
@pytest.mark.parametrize("constant", [0.0, np.nan, 1e300])
def test_constant_references_and_windows_give_a_finite_report(
    value: float, constant: float
) -> None:
    profile = build_reference(
        np.full((300, 3), constant), names=NAMES, kinds=["numeric", "numeric", "categorical"]
    )
    found = report(profile, count(np.full((300, 3), value), profile=profile))
    same = value == constant or (np.isnan(value) and np.isnan(constant))
    assert found.state == ("ok" if same else "alert")
    json.dumps(found.to_dict(), allow_nan=False)


@given(st.integers(0, 10_000), st.integers(0, 300), st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_any_window_gives_a_json_report(seed: int, rows: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    vectors = sample(rows, seed, rng.normal())
    odd = rng.choice([np.nan, np.inf, -np.inf, 1e6, -1e300, 0.5], vectors.shape)
    vectors = np.where(rng.random(vectors.shape) < share, odd, vectors)
    found = compare(vectors)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["rows"] == rows
    assert all(feature.psi >= 0 and 0 <= feature.p_adjusted <= 1 for feature in found.features)


def test_a_profile_without_gains_weighs_features_alike() -> None:
    profile = build_reference(
        REFERENCE, names=NAMES, kinds=["numeric", "numeric", "categorical"], gains=[0, 0, 0]
    )
    found = report(profile, count(sample(500, 4, 2.0), profile=profile))
    assert found.drifted_share == pytest.approx(1 / 3)
    assert found.prediction is None


def test_a_rebased_profile_compares_with_the_last_window() -> None:
    last_week, today = count(sample(3000, 13, 1.5)), count(sample(1000, 14, 1.5))
    assert report(PROFILE, today).state == "alert"
    rolling = rebased(PROFILE, last_week)
    found = report(rolling, today)
    assert found.state == "ok"
    assert found.reference_rows == 3000
    assert found.features[0].reference_mean == pytest.approx(1.5, abs=0.1)
    identical = report(rolling, last_week)
    assert all(feature.psi == 0.0 for feature in identical.features)


IDS = np.arange(2**60, 2**60 + 5_000 * 2**10, 2**10).astype(np.float64)
"""int64 ids that count up, as float64s that can still tell them apart."""


@pytest.mark.parametrize(
    ("reference", "live", "kind", "state", "look"),
    [
        ([7.0] * 300, [7.0] * 300, "numeric", "ok", "constant"),
        ([7.0] * 300, [8.0] * 300, "numeric", "alert", "out_of_range"),
        (list(range(300)), [5.0] * 300, "numeric", "alert", "stuck"),
        ([7.0] * 300, list(range(300)), "numeric", "alert", "out_of_range"),
        (list(range(300)), [np.nan] * 300, "numeric", "alert", "all_missing"),
        ([np.nan] * 300, [np.nan] * 300, "numeric", "ok", "no_reference"),
        ([np.nan] * 300, [1.0] * 300, "numeric", "alert", "no_reference"),
        ([], [1.0] * 300, "numeric", "insufficient", "no_reference"),
        (list(range(300)), [], "numeric", "insufficient", "empty"),
        (list(range(300)), [5.0], "numeric", "insufficient", "stuck"),
        ([1.0, 2.0] * 150, [1.0, 77.0] * 150, "categorical", "alert", "usual"),
        ([1.0, 2.0] * 150, [77.0] * 300, "categorical", "alert", "new_categories"),
        (list(range(300)), [*range(299), 1e6], "numeric", "ok", "usual"),
        (IDS[:2500], IDS[2500:], "numeric", "alert", "out_of_range"),
        (IDS[:2500], IDS[2500:], "categorical", "alert", "new_categories"),
    ],
)
def test_degenerate_columns_have_states_and_looks_of_their_own(
    reference: list[float], live: list[float], kind: str, state: str, look: str
) -> None:
    profile = build_reference(
        np.array(reference, np.float64)[:, None],
        names=["x"],
        kinds=[kind],  # type: ignore[list-item]
    )
    counts = Counts(CountLayout(profile))
    counts.add_rows(np.array(live, np.float64)[:, None], kernels=PlainKernels())
    found = report(profile, counts)
    assert (found.features[0].state, found.features[0].look) == (state, look)
    assert found.state == state
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("rows", [200, 1_000])
def test_no_drift_is_called_drift_in_at_most_one_of_500_feature_windows(rows: int) -> None:
    """The fixed thresholds alone; 8,000 feature-windows, so that 16 would be the bound."""
    rng = np.random.default_rng(rows)
    width, windows = 20, 400
    training = np.column_stack([
        *rng.normal(size=(10, 20_000)),
        *rng.integers(0, 5, (5, 20_000)),  # atoms
        *rng.zipf(1.5, (5, 20_000)) % 200,  # categories with a long tail
    ]).astype(np.float64)  # fmt: skip
    kinds = ["numeric"] * 15 + ["categorical"] * 5
    profile = build_reference(
        training[:10_000],
        names=[f"f{i}" for i in range(width)],
        kinds=kinds,  # type: ignore[arg-type]
    )
    columns = [bin_index(column, training[10_000:, i]) for i, column in enumerate(profile.features)]
    flagged = 0
    for _ in range(windows):
        picked = rng.integers(0, 10_000, rows)
        live = [np.bincount(c[picked], minlength=p.bins)
                for c, p in zip(columns, profile.features, strict=True)]  # fmt: skip
        pairs = [(np.array(p.counts), c) for p, c in zip(profile.features, live, strict=True)]
        adjusted = adjust_benjamini_hochberg([chi_square_p(*pair) for pair in pairs])
        flagged += sum(
            p <= P_MAX and float(psi_adjusted(*pair)) >= WARN_PSI
            for p, pair in zip(adjusted, pairs, strict=True)
        )
    assert flagged <= 0.002 * width * windows


def test_counts_of_another_profile_are_refused() -> None:
    other = build_reference(
        sample(400, 20), names=NAMES, kinds=["numeric", "numeric", "categorical"]
    )
    with pytest.raises(ValidationError, match="other bins"):
        report(PROFILE, count(sample(10, 1), profile=other))
