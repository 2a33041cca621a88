"""Looks at training data before training: what must stop a run, what its owner should know."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.training.auc import Floats, auc, midranks
from mlpd.training.trainer import Dataset

_BINS = 64
LEAK_SAMPLE_ROWS = 100_000
"""Rows looked at for leakage, evenly spaced; a sort of each feature is what the checks cost."""


@dataclass(frozen=True, slots=True)
class CheckLimits:
    """When a check speaks; shares lie in [0, 1]."""

    rows_min: int = 200
    rows_per_class_min: int = 20
    leak_auc: float = 0.99
    leak_rank_correlation: float = 0.9999
    null_share_warn: float = 0.5
    null_share_shift_warn: float = 0.2


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found: an error stops the run; `feature` is None where it concerns the labels."""

    level: Literal["error", "warning"]
    code: str
    feature: str | None
    value: float
    message: str

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def check_data(
    train: Dataset,
    valid: Dataset,
    *,
    objective: Literal["binary", "regression"],
    categorical: tuple[int, ...] = (),
    limits: CheckLimits = CheckLimits(),
) -> list[Finding]:
    """Return all that the checks find, errors first; about 1 s for 100,000 rows x 20 features.

    Errors: `too_few_rows`, `label_not_finite`, `label_not_binary`, `too_few_of_class`,
    `label_constant`, `always_null`, `label_leak`.  Warnings: `constant`, `often_null`,
    `null_share_shift`, `valid_one_class`.

    A leak is a feature that alone tells the label: `best_single_auc` above `leak_auc`, or for a
    regression `rank_correlation` with the label above `leak_rank_correlation`.
    """
    findings = list(_check_labels(train, valid, objective, limits))
    if not any(finding.level == "error" for finding in findings):
        findings += _check_features(train, valid, limits)
        findings += _check_leaks(train, objective, categorical, limits)
    return sorted(findings, key=lambda finding: finding.level != "error")


def raise_for_errors(findings: list[Finding]) -> None:
    """Raise ValidationError (`training_data`) with all errors in its details, if there are any."""
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        raise ValidationError(
            f"the training data can't be trained on: {errors[0].message}"
            + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""),
            code="training_data",
            hint="mend the features or the label of the job; every error is in the details",
            details={"findings": [finding.to_dict() for finding in errors]},
        )


def _error(code: str, feature: str | None, value: float, message: str) -> Finding:
    return Finding("error", code, feature, float(value), message)


def _warning(code: str, feature: str | None, value: float, message: str) -> Finding:
    return Finding("warning", code, feature, float(value), message)


def _check_labels(
    train: Dataset, valid: Dataset, objective: str, limits: CheckLimits
) -> Iterator[Finding]:
    if len(train) < limits.rows_min:
        text = f"{len(train)} training rows, expected at least {limits.rows_min}"
        yield _error("too_few_rows", None, len(train), text)
        return
    wrong = sum(int((~np.isfinite(part.labels)).sum()) for part in (train, valid))
    if wrong:
        text = f"{wrong} labels are null, NaN or infinite; filter those rows out of the spine"
        yield _error("label_not_finite", None, wrong, text)
    elif objective == "binary":
        yield from _check_classes(train, valid, limits)
    elif _is_constant(train.labels):
        value = train.labels[0]
        yield _error("label_constant", None, value, f"every training label is {value:g}")


def _check_classes(train: Dataset, valid: Dataset, limits: CheckLimits) -> Iterator[Finding]:
    wrong = sum(int((~np.isin(part.labels, (0, 1))).sum()) for part in (train, valid))
    if wrong:
        text = f"{wrong} labels are neither 0 nor 1, as a binary objective needs"
        yield _error("label_not_binary", None, wrong, text)
        return
    ones = int(train.labels.sum())
    for label, count in ((0, len(train) - ones), (1, ones)):
        if count < limits.rows_per_class_min:
            least = limits.rows_per_class_min
            text = f"{count} training rows have label {label}, expected at least {least}"
            yield _error("too_few_of_class", None, count, text)
    if len(valid) and _is_constant(valid.labels):
        text = f"every validation label is {valid.labels[0]:g}, so early stopping is blind"
        yield _warning("valid_one_class", None, valid.labels[0], text)


def _check_features(train: Dataset, valid: Dataset, limits: CheckLimits) -> Iterator[Finding]:
    for index, name in enumerate(train.feature_names):
        column = train.vectors[:, index]
        null = np.isnan(column)
        share = float(null.mean())
        if share == 1:
            text = f"feature {name!r} is null in every training row; was its view ever filled?"
            yield _error("always_null", name, share, text)
            continue
        if share > limits.null_share_warn:
            yield _warning("often_null", name, share, f"feature {name!r} is null in {share:.1%}")
        if _is_constant(column):
            text = f"feature {name!r} is {column[0]:g} in every training row and teaches nothing"
            yield _warning("constant", name, column[0], text)
        later = float(np.isnan(valid.vectors[:, index]).mean()) if len(valid) else share
        if abs(later - share) > limits.null_share_shift_warn:
            text = f"feature {name!r} is null in {share:.1%} of training rows, {later:.1%} later"
            yield _warning("null_share_shift", name, later - share, text)


def _check_leaks(
    train: Dataset, objective: str, categorical: tuple[int, ...], limits: CheckLimits
) -> Iterator[Finding]:
    step = -(-len(train) // LEAK_SAMPLE_ROWS)
    labels = train.labels[::step]
    for index, name in enumerate(train.feature_names):
        column = train.vectors[::step, index]
        if objective == "binary":
            value = best_single_auc(labels, column, is_categorical=index in categorical)
            limit, measure = limits.leak_auc, "AUC"
        else:
            value = rank_correlation(labels, column) if index not in categorical else 0.0
            limit, measure = limits.leak_rank_correlation, "rank correlation"
        if value > limit:
            text = f"feature {name!r} alone tells the label ({measure} {value:.4f}): was it known "
            yield _error("label_leak", name, value, text + "at the moment of prediction?")


def best_single_auc(labels: Floats, column: Floats, *, is_categorical: bool) -> float:
    """Return the best AUC in [0.5, 1] that this feature reaches alone; NaN is a value of its own.

    Tried: its own order with NaN first or last (numbers only), and the mean label per category or
    per quantile bin, learned on every second row and tried on the others, so that an identifier
    with a value per row doesn't look like a leak.
    """
    missing = np.isnan(column)
    tries = [_auc_of_means(labels, column if is_categorical else _bins(column, missing))]
    if not is_categorical:
        tries += [auc(labels, np.where(missing, end, column)) for end in (-np.inf, np.inf)]
    return max((max(found, 1 - found) for found in tries if found is not None), default=0.5)


def rank_correlation(labels: Floats, column: Floats) -> float:
    """Return |Spearman's rho| over the rows that have a value, 0 where it isn't defined."""
    present = ~np.isnan(column)
    if present.sum() <= 2:  # noqa: PLR2004 - two points always lie on a line
        return 0.0
    x, y = midranks(column[present]), midranks(labels[present])
    spread = x.std() * y.std()
    return abs(float(((x - x.mean()) * (y - y.mean())).mean() / spread)) if spread else 0.0


def _is_constant(values: Floats) -> bool:
    """Whether all values are equal; with a NaN among them they are not."""
    return bool(values.min() == values.max())


def _bins(column: Floats, missing: NDArray[np.bool_]) -> Floats:
    """Return the quantile bin of every value, NaN kept."""
    if missing.all():
        return column
    ranked = np.sort(column[~missing])
    edges = np.unique(ranked[np.arange(1, _BINS) * len(ranked) // _BINS])
    # A value that is an edge gets a bin to itself, so that a frequent value is never mixed.
    sides = [np.searchsorted(edges, column, side=side) for side in ("left", "right")]
    return np.where(missing, np.nan, sides[0] + sides[1])


def _auc_of_means(labels: Floats, groups: Floats) -> float | None:
    """Return the AUC on odd rows of each group's mean label on even rows, NaN being a group."""
    _, group = np.unique(groups, return_inverse=True, equal_nan=True)
    learned, tried = slice(0, None, 2), slice(1, None, 2)
    count = np.bincount(group[learned], minlength=group.max() + 1)
    total = np.bincount(group[learned], labels[learned], minlength=group.max() + 1)
    overall = labels[learned].mean()
    means = (total + overall) / (count + 1)
    return auc(labels[tried], means[group[tried]])
