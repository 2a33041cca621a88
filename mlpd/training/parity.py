"""The rows on which LightGBM's scores and the served ones would differ, if they did."""

import math

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.training.backend import import_lightgbm
from mlpd.training.exporter import ZERO
from mlpd.training.trees import Tree, TreeModel, parse_model

Floats = NDArray[np.float64]

EDGE_ROWS_MAX = 40_000
_VALUES_PER_SET = 6
_ROWS_PER_ODD = 16
_ALWAYS_ODD = (math.nan, math.inf, -math.inf, 0.0, -0.0)
_ODD_NUMBERS = (*_ALWAYS_ODD, 5e-324, -5e-324, ZERO, -ZERO, ZERO / 2, -ZERO / 2, 1e300, -1e300)
_ODD_CODES = (*_ALWAYS_ODD, -1.0, -0.5, 0.5, -(2.0**31), 2.0**31 - 1, 2.0**31, 2.0**32, 2.0**53)


def parity_rows(model_text: str, sample: Floats, *, seed: int = 0) -> Floats:
    """Return the rows to compare on, float64 [n, F]: the sample, then rows moved to the edges.

    `sample`: training vectors, 10,000 or more where there are as many.  After them come, for every
    node, sample rows that reach it (any row where none does), with its feature set to the threshold
    and the doubles beside it, or to categories in, beside and between its set; and for every
    feature NaN, infinities, denormals and odd categories (negative, fractional, beyond int32).
    Beyond EDGE_ROWS_MAX an even choice of them by `seed`.  About 1 s for 200 trees of 63 leaves.
    """
    model = parse_model(model_text)
    if sample.ndim != 2 or sample.shape[1] != len(model.feature_names) or not len(sample):  # noqa: PLR2004
        raise ValidationError(
            f"the sample is {list(sample.shape)}, expected [n, {len(model.feature_names)}]",
            code="wrong_shape",
            hint="pass training vectors of this model",
        )
    rng = np.random.default_rng(seed)
    leaves = (
        import_lightgbm()
        .Booster(model_str=model_text)
        .predict(sample, pred_leaf=True, num_threads=1)
    )
    bases, features, values = _edges(model, leaves.reshape(len(sample), -1), rng)
    if len(values) > EDGE_ROWS_MAX:
        chosen = np.sort(rng.choice(len(values), EDGE_ROWS_MAX, replace=False))
        bases, features, values = bases[chosen], features[chosen], values[chosen]
    moved = sample[bases]
    moved[np.arange(len(values)), features] = values
    return np.ascontiguousarray(np.concatenate([sample, moved]))


def _edges(
    model: TreeModel, leaves: NDArray[np.int32], rng: np.random.Generator
) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
    """Return triples of a sample row, a feature, and the value that it takes there."""
    rows = len(leaves)
    found: list[tuple[int, int, float]] = []
    odd: dict[int, tuple[float, ...]] = {}
    for tree, leaf in zip(model.trees, leaves.T, strict=True):
        categorical, reaching = tree.categorical, _reaching(tree, leaf, rng)
        for node, feature in enumerate(tree.split_feature.tolist()):
            if categorical[node]:
                members = tree.categories[int(tree.threshold[node])]
                values, odd[feature] = _around_set(members, rng), _ODD_CODES
            else:
                values, odd[feature] = _around(tree.threshold[node]), _ODD_NUMBERS
            found += [(int(reaching[node]), feature, value) for value in values]
    for feature, oddities in odd.items():
        bases = rng.integers(0, rows, (_ROWS_PER_ODD, len(oddities))).tolist()
        found += [(b, feature, v) for row in bases for b, v in zip(row, oddities, strict=True)]
    base, feature_of, value_of = zip(*found, strict=True) if found else ((), (), ())
    return np.array(base, np.intp), np.array(feature_of, np.intp), np.array(value_of, np.float64)


def _reaching(tree: Tree, leaf: NDArray[np.int32], rng: np.random.Generator) -> list[int]:
    """Return for each inner node a sample row whose path goes through it, else any row.

    `leaf`: the leaf that each sample row falls into.  Children are numbered after their parent, so
    one pass backwards hands rows up.
    """
    row_of_leaf = np.full(len(tree.leaf_value), -1)
    row_of_leaf[leaf] = np.arange(len(leaf))
    left, right = tree.left_child.tolist(), tree.right_child.tolist()
    rows = [-1] * len(left)
    for node in reversed(range(len(left))):
        below = [row_of_leaf[~c] if c < 0 else rows[c] for c in (left[node], right[node])]
        rows[node] = int(max(below))
    return [row if row >= 0 else int(rng.integers(0, len(leaf))) for row in rows]


def _around(threshold: float) -> list[float]:
    with np.errstate(over="ignore"):
        beside: Floats = np.nextafter(threshold, (-np.inf, np.inf))
    return [threshold, *beside.tolist()]


def _around_set(members: NDArray[np.int32], rng: np.random.Generator) -> list[float]:
    codes = members.astype(np.float64)
    near = np.concatenate([codes, codes + 0.75, codes + 1, codes - 1, -codes - 1])
    values: list[float] = rng.choice(near, _VALUES_PER_SET).tolist()
    return values
