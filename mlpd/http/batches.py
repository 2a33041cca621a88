"""Bodies of events to checked batches: rows, columns or an Arrow IPC stream; off the loop."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlpd.core.columns import Column, DType
from mlpd.core.errors import MlpdError, ValidationError
from mlpd.core.specs import SourceSpec
from mlpd.daemon.offline import from_series
from mlpd.features.ingest import KNOWN_AT, Batch, parse_batch, rows_to_columns
from mlpd.http.shapes import Field, Shape

if TYPE_CHECKING:
    import polars as pl

Values = Mapping[str, Sequence[Any] | Column]

TABLE = {
    "rows": Field("rows", "Events, each an object of column to value; absent columns are null."),
    "columns": Field("columns", "Or the same events as lists of equal length by column."),
}
ALL_OR_NOTHING = Field("flag", "Refuse everything if one row is wrong; by default only that row.")
BATCH = Shape({**TABLE, "all_or_nothing": ALL_OR_NOTHING})
PART = Shape(TABLE)


def parse_fields(
    source: SourceSpec, fields: Mapping[str, Any], *, now_us: int, all_or_nothing: bool
) -> Batch:
    """Return the batch in the fields `rows` or `columns`; raises as `parse_batch`."""
    rows, columns = fields["rows"], fields["columns"]
    if (rows is None) == (columns is None):
        raise ValidationError(
            f"events of source {source.name!r} come as rows or as columns, one of the two",
            code="invalid_request",
            hint='Send {"rows": [{...}, ...]} or {"columns": {"name": [...], ...}}.',
        )
    if columns is None:
        _refuse_unknown(source, rows, now_us)
        columns = rows_to_columns(source, rows)
    return parse_batch(source, columns, now_us=now_us, all_or_nothing=all_or_nothing)


def parse_arrow(source: SourceSpec, body: bytes, *, now_us: int, all_or_nothing: bool) -> Batch:
    """Return the batch in an Arrow IPC stream; imports polars and blocks: call it in a thread.

    Columns of a fitting type are taken over whole, others value by value under the rules of JSON.
    """
    dtypes = {source.timestamp: DType.TIMESTAMP, KNOWN_AT: DType.TIMESTAMP, **source.schema}
    columns = {
        series.name: read_series(series, dtypes.get(series.name)) for series in read_arrow(body)
    }
    return parse_batch(source, columns, now_us=now_us, all_or_nothing=all_or_nothing)


def read_arrow(body: bytes) -> "pl.DataFrame":
    """Return the frame in an Arrow IPC stream; raises ValidationError(code="malformed_body")."""
    import polars as pl  # noqa: PLC0415 - 70 MB that a daemon without Arrow never pays

    try:
        return pl.read_ipc_stream(body)
    except (pl.exceptions.PolarsError, OSError, ValueError) as error:
        raise _malformed(str(error)) from None
    except BaseException as error:
        # A broken stream can make polars' Rust side panic, which is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise _malformed("its metadata is damaged") from None


def _refuse_unknown(source: SourceSpec, rows: Sequence[Mapping[str, Any]], now_us: int) -> None:
    """Refuse unknown names before columns are made: n rows with n names would make n * n values."""
    names = set().union(*rows)
    if not names <= {source.timestamp, KNOWN_AT, *source.schema}:
        parse_batch(source, dict.fromkeys(sorted(names), ()), now_us=now_us)


def read_series(series: "pl.Series", dtype: DType | None) -> Sequence[Any] | Column:
    """Return a whole column where Arrow's type means the same as ours, else Python values.

    Those go through the checks of JSON: a naive time or a wrong type is refused row by row.
    """
    if dtype is None:  # an unknown column: its name alone makes the error
        return [None] * len(series)
    whole = _convert(series, dtype)
    return series.to_list() if whole is None else from_series(whole, dtype)


def _convert(series: "pl.Series", dtype: DType) -> "pl.Series | None":
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


def _malformed(problem: str) -> MlpdError:
    return ValidationError(
        f"the body is not an Arrow IPC stream: {problem[:200]}",
        code="malformed_body",
        hint="With polars: frame.write_ipc_stream(buffer).",
    )
