"""Links: from the raw score of a tree ensemble to what LightGBM's `predict` returns, to the bit.

`exp` is libm's, one value at a time: numpy's vectorised one differs by an ulp on 3 % of values.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.core.kernels import load_kernels

Floats = NDArray[np.float64]

KERNEL_MODULE = "mlpd.serving.link_kernel"
"""Declares the native links; named in the list that the daemon precompiles at start."""

NATIVE_FROM = 16
"""Values from which the kernel's call costs less than a Python loop; see docs/paths/predict.md."""


class Link:
    """Applies one link; any thread may call it.

    `spec` is what the exporter wrote: `{"kind": "identity" | "reg_sqrt" | "exp" | "softmax"}` or
    `{"kind": "sigmoid", "scale": s}` (with several outputs that is LightGBM's `multiclassova`),
    each with `"average_of": n` for a random forest, whose raw scores are sums over n rounds.
    Raises ValidationError(code="unknown_link") for anything else.  Constructing blocks for a
    compile when the kernel cache is cold: do it in a thread.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.spec: Final = dict(spec)
        self._apply = _build(self.spec)

    def __call__(self, raw: Floats) -> Floats:
        """Return a new array of the scores of `raw`, float64 [n, K]; 1 to 3 us for one row."""
        return self._apply(raw)


def _build(spec: Mapping[str, Any]) -> Callable[[Floats], Floats]:
    match spec:
        case {"average_of": int(rounds), **rest} if rounds > 0:
            apply = _build(rest)
            return lambda raw: apply(raw / rounds)
        case {"kind": "identity", **rest} if not rest:
            return np.copy
        case {"kind": "reg_sqrt", **rest} if not rest:
            return _reg_sqrt
        case {"kind": "exp", **rest} if not rest:
            return _exponential()
        case {"kind": "softmax", **rest} if not rest:
            return _softmax()
        case {"kind": "sigmoid", "scale": int() | float() as scale, **rest} if not rest:
            return _sigmoid(float(scale))
    raise ValidationError(
        f"the link {dict(spec)!r} is unknown",
        code="unknown_link",
        hint='Known: identity, reg_sqrt, exp, softmax and {"kind": "sigmoid", "scale": s}.',
    )


def _reg_sqrt(raw: Floats) -> Floats:
    sign = (raw > 0).astype(np.float64) - (raw < 0)
    scores: Floats = sign * raw * raw
    return scores


def _exponential() -> Callable[[Floats], Floats]:
    native = load_kernels(KERNEL_MODULE).exponential

    def apply(raw: Floats) -> Floats:
        if raw.size < NATIVE_FROM:
            return _array([_exp(x) for x in raw.ravel().tolist()], raw)
        flat, scores = _flat_pair(raw)
        native(flat, scores)
        return scores.reshape(raw.shape)

    return apply


def _sigmoid(scale: float) -> Callable[[Floats], Floats]:
    native = load_kernels(KERNEL_MODULE).sigmoid

    def apply(raw: Floats) -> Floats:
        if raw.size < NATIVE_FROM:
            return _array([1.0 / (1.0 + _exp(-scale * x)) for x in raw.ravel().tolist()], raw)
        flat, scores = _flat_pair(raw)
        native(flat, scores, scale)
        return scores.reshape(raw.shape)

    return apply


def _softmax() -> Callable[[Floats], Floats]:
    native = load_kernels(KERNEL_MODULE).softmax

    def apply(raw: Floats) -> Floats:
        flat, scores = _flat_pair(raw)
        native(flat, scores, raw.shape[1])
        return scores.reshape(raw.shape)

    return apply


def _exp(x: float) -> float:
    """Return libm's exp(x): infinity where Python's own raises."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _array(values: list[float], raw: Floats) -> Floats:
    return np.array(values).reshape(raw.shape)


def _flat_pair(raw: Floats) -> tuple[Floats, Floats]:
    return np.ascontiguousarray(raw).reshape(-1), np.empty(raw.size)
