"""Looks at training data before training: what must stop a run, what its owner should know."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.core.specs import CLASSES_MAX, Objective
from mlpd.training.auc import Floats, auc, midranks
from mlpd.training.ranking import GRADES_MAX
from mlpd.training.trainer import Dataset

_BINS = 64
LEAK_SAMPLE_ROWS = 100_000
"""Rows looked at for leakage, evenly spaced; a sort of each feature is what the checks cost."""
LEAK_CLASSES_MAX = 5
"""Classes that a feature is tried on alone, the most frequent ones."""


@dataclass(frozen=True, slots=True)
class CheckLimits:
    """When a check speaks; shares lie in [0, 1]."""

    rows_min: int = 200
    rows_per_class_min: int = 20
    groups_min: int = 20
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
    objective: Objective,
    categorical: tuple[int, ...] = (),
    limits: CheckLimits = CheckLimits(),
) -> list[Finding]:
    """Return all that the checks find, errors first; about 1 s for 100,000 rows x 20 features.

    Errors: `too_few_rows`, `label_not_finite`, `label_not_binary`, `label_not_class`,
    `too_many_classes`, `too_few_of_class`, `label_not_grade`, `too_few_groups`, `nothing_to_order`,
    `label_constant`, `always_null`, `label_leak`.  Warnings: `constant`, `often_null`,
    `null_share_shift`, `valid_one_class`.

    A leak is a feature that alone tells the label: `best_single_auc` above `leak_auc` (of a class
    against the others, of a grade above 0), or for a regression `rank_correlation` with the label
    above `leak_rank_correlation`.
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
        yield from _check_binary(train, valid, limits)
    elif objective == "multiclass":
        yield from _check_classes(train, valid, limits)
    elif objective == "ranking":
        yield from _check_grades(train, valid, limits)
    elif _is_constant(train.labels):
        value = train.labels[0]
        yield _error("label_constant", None, value, f"every training label is {value:g}")


def _check_binary(train: Dataset, valid: Dataset, limits: CheckLimits) -> Iterator[Finding]:
    wrong = sum(int((~np.isin(part.labels, (0, 1))).sum()) for part in (train, valid))
    if wrong:
        text = f"{wrong} labels are neither 0 nor 1, as a binary objective needs"
        yield _error("label_not_binary", None, wrong, text)
        return
    yield from _check_counts(train, valid, 2, limits)


def _check_classes(train: Dataset, valid: Dataset, limits: CheckLimits) -> Iterator[Finding]:
    labels = np.concatenate([train.labels, valid.labels])
    wrong = int(((labels != np.floor(labels)) | (labels < 0)).sum())
    if wrong:
        text = f"{wrong} labels are no class numbers 0, 1, 2 ..., as a multiclass objective needs"
        yield _error("label_not_class", None, wrong, text)
        return
    classes = int(labels.max()) + 1
    if classes > CLASSES_MAX:
        text = f"the labels reach {classes - 1}; classes are numbered from 0 to {CLASSES_MAX - 1}"
        yield _error("too_many_classes", None, classes, text)
        return
    yield from _check_counts(train, valid, classes, limits)


def _check_counts(
    train: Dataset, valid: Dataset, classes: int, limits: CheckLimits
) -> Iterator[Finding]:
    counts = np.bincount(train.labels.astype(np.intp), minlength=classes)
    for label, count in enumerate(counts.tolist()):
        if count < limits.rows_per_class_min:
            least = limits.rows_per_class_min
            text = f"{count} training rows have label {label}, expected at least {least}"
            yield _error("too_few_of_class", None, count, text)
    if len(valid) and _is_constant(valid.labels):
        text = f"every validation label is {valid.labels[0]:g}, so early stopping is blind"
        yield _warning("valid_one_class", None, valid.labels[0], text)


def _check_grades(train: Dataset, valid: Dataset, limits: CheckLimits) -> Iterator[Finding]:
    wrong = sum(int((~np.isin(p.labels, range(GRADES_MAX))).sum()) for p in (train, valid))
    if wrong:
        text = f"{wrong} labels are no grades 0, 1, 2 ... {GRADES_MAX - 1}, as a ranking needs"
        yield _error("label_not_grade", None, wrong, text)
        return
    if train.groups is not None and len(train.groups) < limits.groups_min:
        text = f"{len(train.groups)} groups to train on, expected at least {limits.groups_min}"
        yield _error("too_few_groups", None, len(train.groups), text)
        return
    for part, name in ((train, "training"), (valid, "validation")):
        if len(part) and part.groups is not None and not _has_order(part.labels, part.groups):
            text = f"no group of {name} rows has two different grades, so there is nothing to order"
            yield _error("nothing_to_order", None, len(part.groups), text)


def _has_order(labels: Floats, sizes: NDArray[np.int64]) -> bool:
    starts = np.cumsum(sizes) - sizes
    spread = np.maximum.reduceat(labels, starts) - np.minimum.reduceat(labels, starts)
    return bool((spread > 0).any())


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
    train: Dataset, objective: Objective, categorical: tuple[int, ...], limits: CheckLimits
) -> Iterator[Finding]:
    step = -(-len(train) // LEAK_SAMPLE_ROWS)
    labels = train.labels[::step]
    sides = _sides(labels, objective)
    for index, name in enumerate(train.feature_names):
        column, is_categorical = train.vectors[::step, index], index in categorical
        if objective == "regression":
            value = 0.0 if is_categorical else rank_correlation(labels, column)
            limit, measure = limits.leak_rank_correlation, "rank correlation"
        else:
            tries = [best_single_auc(s, column, is_categorical=is_categorical) for s in sides]
            value, limit, measure = max(tries), limits.leak_auc, "AUC"
        if value > limit:
            text = f"feature {name!r} alone tells the label ({measure} {value:.4f}): was it known "
            yield _error("label_leak", name, value, text + "at the moment of prediction?")


def _sides(labels: Floats, objective: Objective) -> list[Floats]:
    """Return the labels as questions of yes (1) and no (0) that a feature may answer alone."""
    if objective == "multiclass":
        counts = np.bincount(labels.astype(np.intp))
        frequent = np.argsort(-counts, kind="stable")[:LEAK_CLASSES_MAX]
        return [(labels == k).astype(np.float64) for k in frequent]
    return [(labels > 0).astype(np.float64)]


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
