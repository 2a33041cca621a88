"""The certificate of a plugin's model: served scores are the trainer's, within its own bound."""

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import DefinitionError, ValidationError
from mlpd.core.trainers import Bound, FittedModel, Floats

RELATIVE_MAX = 1e-3
"""A trainer whose scores may be further off than this has none that mean anything."""

_ODD_NUMBERS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, 1e300, -1e300)
_ROWS_PER_ODD = 16
_BATCHED_ROWS, _BATCHES = 257, (1, 2, 17)


def sample_rows(vectors: Floats, categorical: Mapping[int, int], *, most: int) -> Floats:
    """Return the rows that a trainer's scores are judged on: the last ones, then odd ones.

    Odd: for every feature, rows with NaN, infinities, zeros, a denormal and 1e300 in it; categories
    are odd as NaN alone, since nothing else that is no code reaches a model.
    """
    sample = np.ascontiguousarray(vectors[-most:])
    moved = [sample]
    for feature in range(sample.shape[1]):
        for odd in (math.nan,) if feature in categorical else _ODD_NUMBERS:
            rows = sample[np.linspace(0, len(sample) - 1, _ROWS_PER_ODD).astype(int)]
            rows[:, feature] = odd
            moved.append(rows)
    return np.concatenate(moved)


def certify_scores(fitted: FittedModel, found: Floats) -> dict[str, Any]:
    """Return the certificate: `found` [n, K] are the served scores of `fitted.rows`.

    It travels with the version as parity.json.  `different` counts rows outside the bound (which of
    0 and 0 means any other bit), `bit_equal` rows with the same bits; `verdict` is `bit_equal`,
    `within` or `different`.  `worst_difference` is None where one of two isn't finite.
    `rows_digest` and `scores_digest`: sha256 of float64 little-endian bytes, row by row; the scores
    are the trainer's.  Never raises over a difference.

    Raises ValidationError: `wrong_shape` for no rows or scores of another shape, `bound_too_wide`.
    """
    expected = np.ascontiguousarray(fitted.scores, np.float64)
    if not len(expected) or found.shape != expected.shape:
        raise ValidationError(
            f"the served scores are {list(found.shape)}, the trainer's {list(expected.shape)}",
            code="wrong_shape",
            hint="no rows prove nothing; serve the model that was judged",
        )
    check_bound(fitted.bound, expected)
    same = _bits(found) == _bits(expected)
    gaps = np.where(same, 0.0, _gaps(found, expected))
    different = int((~(same | _within(gaps, expected, fitted.bound))).any(axis=1).sum())
    worst = float(gaps.max())
    return {
        "rows": len(expected),
        "different": different,
        "bit_equal": int(same.all(axis=1).sum()),
        "worst_difference": worst if math.isfinite(worst) else None,
        "bound": {"absolute": fitted.bound.absolute, "relative": fitted.bound.relative},
        "rows_digest": _digest(fitted.rows),
        "scores_digest": _digest(expected),
        "tree_digest": fitted.digest,
        "trainer": fitted.trainer,
        "verdict": "different" if different else "bit_equal" if same.all() else "within",
    }


def check_fitted(fitted: FittedModel, sample: Floats) -> None:
    """Raise DefinitionError(code="invalid_plugin") for what no trainer may give back."""
    shape = (len(fitted.rows), fitted.outputs)
    if not len(sample) <= len(fitted.rows) or fitted.rows.shape[1:] != sample.shape[1:]:
        raise _broken(f"it judged {list(fitted.rows.shape)} rows, expected {list(sample.shape)}")
    if _bits(fitted.rows[: len(sample)]).tobytes() != _bits(sample).tobytes():
        raise _broken("it judged other rows than the sample it was given")
    if fitted.scores.shape != shape:
        raise _broken(f"its scores are {list(fitted.scores.shape)}, expected {list(shape)}")
    if not fitted.digest or "num_threads" not in fitted.params:
        raise _broken("it tells no digest, or no num_threads among its params")


def check_batches(run: Callable[[Floats], Floats], rows: Floats) -> None:
    """Raise ValidationError(code="plugin_graph") if a row's bits depend on the rows beside it.

    `run` gives raw scores.  Serving batches whatever comes together: a score must not tell.
    """
    some = np.ascontiguousarray(rows[np.linspace(0, len(rows) - 1, _BATCHED_ROWS).astype(int)])
    whole = _bits(run(some))
    for size in _BATCHES:
        parts = [run(some[i : i + size]) for i in range(0, len(some), size)]
        if (_bits(np.concatenate(parts)) != whole).any():
            raise ValidationError(
                f"the trainer's ONNX model gives a row other bits in a batch of {size}",
                code="plugin_graph",
                hint="Sigmoid, Softmax, Exp, Tanh and ReduceSum do that in onnxruntime: end the "
                "graph before the last of them and name the link; inside use Relu and MatMul.",
            )


def check_bound(bound: Bound, scores: Floats) -> None:
    """Raise ValidationError(code="bound_too_wide") unless the bound is small beside the scores."""
    finite = np.abs(scores[np.isfinite(scores)])
    most = RELATIVE_MAX * max(1.0, float(finite.max(initial=0.0)))
    if not (0 <= bound.relative <= RELATIVE_MAX and 0 <= bound.absolute <= most):
        raise ValidationError(
            f"the trainer allows its served scores to be off by {bound.absolute:g} and "
            f"{bound.relative:g} of their size; at most {most:g} and {RELATIVE_MAX:g} are taken",
            code="bound_too_wide",
            hint="Export the model more exactly, or state the bound that it really has.",
        )


def _gaps(found: Floats, expected: Floats) -> Floats:
    """Return how far scores are apart: infinite where one is NaN, or infinite, alone."""
    with np.errstate(invalid="ignore", over="ignore"):
        gaps: Floats = np.abs(found - expected)
    gaps[np.isnan(found) & np.isnan(expected)] = 0.0
    gaps[np.isnan(gaps)] = np.inf
    return gaps


def _within(gaps: Floats, expected: Floats, bound: Bound) -> NDArray[np.bool_]:
    if bound == Bound():
        return np.zeros(gaps.shape, np.bool_)
    with np.errstate(over="ignore"):
        room = bound.absolute + bound.relative * np.abs(expected)
    return np.isfinite(gaps) & (gaps <= room)


def _bits(values: Floats) -> NDArray[np.int64]:
    return np.ascontiguousarray(values, np.float64).view(np.int64)


def _digest(values: Floats) -> str:
    return f"sha256:{hashlib.sha256(np.ascontiguousarray(values, '<f8').tobytes()).hexdigest()}"


def _broken(problem: str) -> DefinitionError:
    return DefinitionError(
        f"the trainer breaks its contract: {problem}",
        code="invalid_plugin",
        hint="docs/paths/plugins.md tells what a trainer must hold.",
    )
