"""Bodies of events to checked batches: rows, columns or an Arrow IPC stream; off the loop."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlpd.core.columns import Column
from mlpd.core.errors import ValidationError
from mlpd.core.specs import SourceSpec
from mlpd.daemon.arrow import read_arrow, read_series
from mlpd.features.ingest import Batch, parse_batch, rows_to_columns, wire_types
from mlpd.http.shapes import Field, Shape

Values = Mapping[str, Sequence[Any] | Column]

TABLE = {
    "rows": Field(
        "rows",
        "Events, each an object of column to value; absent columns are null; one whose `__deleted` "
        "is true deletes its entity's latest values.",
    ),
    "columns": Field("columns", "Or the same events as lists of equal length by column."),
}
ALL_OR_NOTHING = Field("flag", "Refuse everything if one row is wrong; by default only that row.")
BATCH = Shape({**TABLE, "all_or_nothing": ALL_OR_NOTHING})
PART = Shape(TABLE)


def parse_fields(
    source: SourceSpec, fields: Mapping[str, Any], *, now_us: int, all_or_nothing: bool
) -> Batch:
    """Return the batch in the fields `rows` or `columns`; raises as `parse_batch`."""
    check_form(source.name, fields)
    rows, columns = fields["rows"], fields["columns"]
    if columns is None:
        _refuse_unknown(source, rows, now_us)
        columns = rows_to_columns(source, rows)
    return parse_batch(source, columns, now_us=now_us, all_or_nothing=all_or_nothing)


def check_form(source: str, fields: Mapping[str, Any]) -> None:
    """Raise ValidationError unless there are either `rows` or `columns`."""
    if (fields["rows"] is None) == (fields["columns"] is None):
        raise ValidationError(
            f"events of source {source!r} come as rows or as columns, one of the two",
            code="invalid_request",
            hint='Send {"rows": [{...}, ...]} or {"columns": {"name": [...], ...}}.',
        )


def check_parts(sources: Mapping[Any, Any]) -> Mapping[str, Any]:
    """Return the parts of a batch of several sources, by name; raises ValidationError for none."""
    if sources and all(isinstance(name, str) for name in sources):
        return sources
    raise ValidationError(
        "'sources' names no source", code="invalid_request", hint='{"sources": {"NAME": {...}}}'
    )


def parse_arrow(source: SourceSpec, body: bytes, *, now_us: int, all_or_nothing: bool) -> Batch:
    """Return the batch in an Arrow IPC stream; imports polars and blocks: call it in a thread.

    Columns of a fitting type are taken over whole, others value by value under the rules of JSON.
    """
    dtypes = wire_types(source)
    columns = {
        series.name: read_series(series, dtypes.get(series.name)) for series in read_arrow(body)
    }
    return parse_batch(source, columns, now_us=now_us, all_or_nothing=all_or_nothing)


def _refuse_unknown(source: SourceSpec, rows: Sequence[Mapping[str, Any]], now_us: int) -> None:
    """Refuse unknown names before columns are made: n rows with n names would make n * n values."""
    names = set().union(*rows)
    if not names <= wire_types(source).keys():
        parse_batch(source, dict.fromkeys(sorted(names), ()), now_us=now_us)
