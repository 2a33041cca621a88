"""Summaries of a feature's values: how many, how large, which ones; of what is present alone."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column, DType
from mlpd.core.time import format_time
from mlpd.features.status import Status

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
TOP = 10
"""Values that a summary of categories names."""

_STATUSES = {status.name.lower(): int(status) for status in Status}
_CATEGORIES = (DType.STRING, DType.BYTES, DType.BOOL)


def summarize(column: Column, statuses: NDArray[np.uint8]) -> dict[str, Any]:
    """Return the summary of a column of n values whose statuses are uint8 [n], as JSON values.

    How many have each status; then of those that are PRESENT, as the type has it:

    - numbers: `nan`, and of the others `min`, `max`, `mean`, `std` (ddof 1) and `quantiles`, which
      are values that occur: the smallest with at least that share of values at or below it;
    - times: `min`, `max` and `quantiles`;
    - lists and vectors: least, greatest and mean number of elements in `lengths`;
    - texts, bytes (as hex) and booleans: `distinct`, and in `top` the most frequent with `rows`.
    """
    found: dict[str, Any] = {"type": str(column.dtype)}
    found |= {name: int((statuses == code).sum()) for name, code in _STATUSES.items()}
    values = column.values[statuses == int(Status.PRESENT)]
    if column.dtype in _CATEGORIES:
        return found | _categories(values)
    if column.dtype.element is not None:
        present = np.flatnonzero(statuses == int(Status.PRESENT))
        return found | {"lengths": _lengths(column.take(present).to_list())}
    if column.dtype is DType.TIMESTAMP:
        return found | _map(_order(values), lambda value: format_time(int(value)))
    known = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    with np.errstate(over="ignore", invalid="ignore"):  # infinities have no mean
        mean = float(known.mean(dtype=np.float64)) if len(known) else None
        std = float(known.std(ddof=1, dtype=np.float64)) if len(known) > 1 else None
    order = _map(_order(known), lambda value: value.item())
    return found | {"nan": len(values) - len(known), "mean": mean, "std": std, **order}


def quantiles(values: NDArray[Any], shares: Sequence[float] = QUANTILES) -> list[Any]:
    """Return for each share the smallest value with at least that share at or below it.

    Hyndman and Fan 1996, definition 1: every one is a value that occurs, so int64 stay exact.

    >>> quantiles(np.array([5, 1, 2, 3]), [0.25, 0.5, 1.0])
    [1, 2, 5]
    """
    ordered = np.sort(values)
    places = (max(0, int(np.ceil(share * len(ordered))) - 1) for share in shares)
    return [ordered[place].item() for place in places]


def _order(values: NDArray[Any]) -> dict[str, Any]:
    if not len(values):
        return {"min": None, "max": None, "quantiles": {}}
    names = map(str, QUANTILES)
    found = dict(zip(names, map(values.dtype.type, quantiles(values)), strict=True))
    return {"min": values.min(), "max": values.max(), "quantiles": found}


def _map(order: dict[str, Any], show: Any) -> dict[str, Any]:
    """Return what `_order` gave with every value shown."""
    ends = {name: None if order[name] is None else show(order[name]) for name in ("min", "max")}
    return {**ends, "quantiles": {name: show(v) for name, v in order["quantiles"].items()}}


def _lengths(values: Sequence[Any]) -> dict[str, Any]:
    lengths = np.array([len(value) for value in values], np.int64)
    if not len(lengths):
        return {"min": None, "max": None, "mean": None}
    least, most = int(lengths.min()), int(lengths.max())
    return {"min": least, "max": most, "mean": float(lengths.mean())}


def _categories(values: NDArray[Any]) -> dict[str, Any]:
    counts = Counter(v.hex() if isinstance(v, bytes) else v for v in values.tolist())
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    top = [{"value": value, "rows": rows} for value, rows in ordered[:TOP]]
    return {"distinct": len(counts), "top": top}
