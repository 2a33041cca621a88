"""Frames that somebody sent, to columns: whole where the types mean the same, else as JSON is."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mlpd.core.columns import Column, DType
from mlpd.core.errors import MlpdError, ValidationError
from mlpd.core.lists import MAX_LIST_BYTES
from mlpd.storage.frames import explode, from_series, lists_from

if TYPE_CHECKING:
    import polars as pl


def read_arrow(body: bytes) -> "pl.DataFrame":
    """Return the frame in an Arrow IPC stream; raises ValidationError(code="malformed_body")."""
    import polars as pl  # noqa: PLC0415 - 70 MB that a daemon without Arrow never pays

    return read_frame(lambda: pl.read_ipc_stream(body), "an Arrow IPC stream")


def read_frame(read: "Callable[[], pl.DataFrame]", what: str) -> "pl.DataFrame":
    """Return what `read` does; ValidationError(code="malformed_body") where it can't be read."""
    import polars as pl  # noqa: PLC0415 - see read_arrow

    try:
        return read()
    except (pl.exceptions.PolarsError, OSError, ValueError) as error:
        raise _malformed(what, str(error)) from None
    except BaseException as error:
        # A broken stream can make polars' Rust side panic, which is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise _malformed(what, "its metadata is damaged") from None


def read_series(series: "pl.Series", dtype: DType | None) -> Sequence[Any] | Column:
    """Return a whole column where Arrow's type means the same as ours, else Python values.

    Those go through the checks of JSON: a naive time or a wrong type is refused row by row.
    """
    if dtype is None:  # an unknown column: its name alone makes the error
        return [None] * len(series)
    if dtype.element is not None:
        column = _lists(series, dtype, dtype.element)
    else:
        whole = convert_series(series, dtype)
        column = None if whole is None else from_series(whole, dtype)
    return series.to_list() if column is None else column


def _lists(series: "pl.Series", dtype: DType, element: DType) -> Column | None:
    """Return lists as a column if all of them are what `dtype` takes, else None."""
    import polars as pl  # noqa: PLC0415 - see read_arrow

    if not isinstance(series.dtype, pl.List | pl.Array):
        return None
    flat, lengths = explode(series.drop_nulls())
    elements = convert_series(flat, element)
    fits = dtype.length is None or bool((lengths == dtype.length).all())
    if elements is None or elements.null_count() or not fits:
        return None
    valid = series.is_not_null().to_numpy() if series.null_count() else None
    column = lists_from(dtype, elements, lengths, valid)
    return column if max(map(len, column.values), default=0) <= MAX_LIST_BYTES else None


def convert_series(series: "pl.Series", dtype: DType) -> "pl.Series | None":
    """Return a series in our type where its own means the same, else None."""
    import polars as pl  # noqa: PLC0415 - see read_arrow

    found = series.dtype
    if isinstance(found, pl.Datetime):
        aware = dtype is DType.TIMESTAMP and found.time_zone is not None
        return series.cast(pl.Datetime("us", "UTC")) if aware else None
    if found.is_signed_integer():
        return series.cast(pl.Int64) if dtype in (DType.INT64, DType.TIMESTAMP) else None
    if isinstance(found, pl.Categorical | pl.Enum):
        return series.cast(pl.String) if dtype is DType.STRING else None
    return series if (str(found), dtype) in _SAME else None


_SAME = {
    ("Boolean", DType.BOOL),
    ("Float32", DType.FLOAT32),
    ("Float32", DType.FLOAT64),
    ("Float64", DType.FLOAT64),
    ("String", DType.STRING),
    ("Binary", DType.BYTES),
}
"""Arrow types, by their polars name, whose values a column takes as they are."""


def _malformed(what: str, problem: str) -> MlpdError:
    return ValidationError(
        f"the body is not {what}: {problem[:200]}",
        code="malformed_body",
        hint="With polars: frame.write_ipc_stream(buffer).",
    )
