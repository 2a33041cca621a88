"""Features together: components that fit, relations that break, and what a classifier tells."""

import json

import numpy as np
import pytest
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.monitoring.multivariate import Components, encode, fit_components
from mlpd.monitoring.reference import ReferenceProfile, build_reference
from mlpd.training.domain import domain_auc

Matrix = NDArray[np.float64]
DAYS, ROWS = 30, 200


def sample(seed: int, rows: int, *, together: bool = True) -> Matrix:
    """Return two numbers that go together (or don't), one alone, and a category."""
    rng = np.random.default_rng(seed)
    first, noise = rng.normal(size=(2, rows))
    second = 0.98 * first + 0.2 * noise if together else rng.normal(size=rows)
    found = np.column_stack([first, second, rng.normal(size=rows), rng.integers(0, 4, rows)])
    found[rng.random(rows) < 0.05, 2] = np.nan
    return found


TRAINING = sample(1, DAYS * ROWS)
PROFILE: ReferenceProfile = build_reference(
    TRAINING, names=["a", "b", "c", "d"], kinds=["numeric", "numeric", "numeric", "categorical"]
)
FITTED = fit_components(PROFILE, TRAINING, np.repeat(np.arange(DAYS), ROWS))


def error_of(vectors: Matrix) -> float:
    return float(FITTED.errors(encode(PROFILE, vectors)).mean())


def test_windows_like_training_stay_under_the_threshold() -> None:
    assert FITTED.threshold is not None
    above = [error_of(sample(seed, ROWS)) > FITTED.threshold for seed in range(100, 200)]
    assert sum(above) <= 2


def test_features_that_stop_going_together_are_seen_though_each_is_as_it_was() -> None:
    assert FITTED.threshold is not None
    assert error_of(sample(3, ROWS, together=False)) > FITTED.threshold


def test_one_far_outlier_and_missing_values_are_no_drift() -> None:
    vectors = sample(4, ROWS)
    vectors[0, 0] = 1e12
    vectors[1] = np.nan
    vectors[2, 0] = np.inf
    assert FITTED.threshold is not None
    assert error_of(vectors) < FITTED.threshold * 1.1


def test_components_survive_json_and_refuse_another_format() -> None:
    document = json.loads(json.dumps(FITTED.to_dict(), allow_nan=False))
    again = Components.from_dict(document)
    assert again.to_dict() == FITTED.to_dict()
    rows = encode(PROFILE, sample(5, 50))
    assert again.errors(rows).tolist() == FITTED.errors(rows).tolist()
    with pytest.raises(ValidationError, match="format"):
        Components.from_dict({**document, "format": 0})


@pytest.mark.parametrize("vectors", [np.full((5, 4), np.nan), np.ones((1, 4)), np.zeros((40, 4))])
def test_degenerate_training_rows_have_components_without_a_threshold(vectors: Matrix) -> None:
    kinds = ["numeric", "numeric", "numeric", "categorical"]
    profile = build_reference(vectors, names=list("abcd"), kinds=kinds)  # type: ignore[arg-type]
    found = fit_components(profile, vectors, np.zeros(len(vectors), np.int64))
    assert found.threshold is None
    assert np.isfinite(found.errors(encode(profile, sample(6, 9)))).all()


def test_a_classifier_tells_samples_apart_only_where_they_differ() -> None:
    alike = domain_auc(sample(7, 1_000), sample(8, 1_000))
    other = domain_auc(sample(7, 1_000), sample(8, 1_000, together=False))
    assert alike is not None
    assert other is not None
    assert alike.low <= 0.5 <= alike.high
    assert other.low > 0.6
    assert domain_auc(sample(7, 2), sample(8, 100)) is None
