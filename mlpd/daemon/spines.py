"""Spines: what a join's rows must bring, and a spine that came as a file, for child processes."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mlpd.core.columns import Columns, DType
from mlpd.core.convert import column_of
from mlpd.core.errors import TooLargeError, ValidationError
from mlpd.core.media import ARROW, ARROW_FILE, PARQUET
from mlpd.core.specs import Closure
from mlpd.daemon.arrow import convert_series, read_frame
from mlpd.features.assemble import wrong_given
from mlpd.storage.frames import polars_type, to_series

if TYPE_CHECKING:
    import polars as pl

EVENT_TIME = "event_time"
SEQUENCE = "sequence"
ROWS_MAX = 10_000_000
"""A spine is in the child's memory as a whole: about 16 bytes per row, keys and times."""

_NAMES = {ARROW: "an Arrow IPC stream", ARROW_FILE: "an Arrow IPC file", PARQUET: "Parquet"}


def spine_types(closure: Closure) -> dict[str, DType]:
    """Return the types of all columns that a spine may have."""
    fixed = {EVENT_TIME: DType.TIMESTAMP, SEQUENCE: DType.INT64}
    return {**fixed, **closure.key_columns, **closure.service.request}


def check_names(closure: Closure, names: Iterable[str]) -> None:
    """Raise ValidationError(code="unknown_column") for one that no spine of it has."""
    known = spine_types(closure)
    for name in names:
        if name not in known:
            raise ValidationError(
                f"the spine has the unknown column {name!r}",
                code="unknown_column",
                hint=f"It takes {', '.join(known)}; the answer keeps its order.",
            )


def check_rows(rows: int) -> None:
    """Raise TooLargeError(code="spine_too_large")."""
    if rows > ROWS_MAX:
        raise TooLargeError(
            f"the spine has {rows:,} rows; the limit is {ROWS_MAX:,}",
            code="spine_too_large",
            hint="Send it in parts.",
        )


def check_spine(closure: Closure, types: Mapping[str, DType], mode: str) -> None:
    """Raise ValidationError unless a spine with columns of these types can be joined."""
    if types.get(EVENT_TIME) is not DType.TIMESTAMP:
        raise ValidationError(
            "the spine needs the timestamp column 'event_time'",
            code="missing_timestamp",
            hint="Features are those of a row's event_time; give it an offset, as UTC has.",
        )
    if (mode == "as_of_sequence") != (SEQUENCE in types):
        raise ValidationError(
            "the spine brings the int64 column 'sequence' with as_of_sequence, and only then",
            code="missing_sequence",
        )
    for name, dtype in {**closure.key_columns, **closure.service.request}.items():
        if types.get(name) is not dtype:
            raise wrong_given(closure, name, types.get(name))


def frame_of(columns: Columns) -> "pl.DataFrame":
    """Return columns as a frame."""
    import polars as pl  # noqa: PLC0415 - in the child alone

    return pl.DataFrame([to_series(name, column) for name, column in columns.items()])


def read_spine_file(path: Path, kind: str, closure: Closure) -> "pl.DataFrame":
    """Return a spine's frame, each column in the type that `closure` gives it.

    Values of other types go through the checks of JSON, row by row.  Raises ValidationError and
    TooLargeError.
    """
    import polars as pl  # noqa: PLC0415 - in the child alone

    if kind == ARROW:
        frame = read_frame(lambda: pl.read_ipc_stream(path), _NAMES[kind])
    else:
        scan = pl.scan_parquet if kind == PARQUET else pl.scan_ipc
        lazy = scan(path, glob=False)
        count = read_frame(lambda: lazy.select(pl.len()).collect(), _NAMES[kind])
        check_rows(int(count.item()))
        frame = read_frame(lazy.collect, _NAMES[kind])
    check_rows(frame.height)
    check_names(closure, frame.columns)
    types = spine_types(closure)
    return pl.DataFrame([_typed(series, types[series.name]) for series in frame.rechunk()])


def _typed(series: "pl.Series", dtype: DType) -> "pl.Series":
    whole = convert_series(series, dtype)
    if whole is not None:
        return whole.cast(polars_type(dtype))
    return to_series(series.name, column_of(dtype, series.to_list(), series.name))
