"""Child entry `page`: a page of events that lie in segments, or of any as Arrow."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpd.core.columns import DType, encode_columns, height
from mlpd.core.specs import SourceSpec
from mlpd.core.time import system_clock
from mlpd.daemon.at_home import Home, home_of
from mlpd.daemon.child import Send
from mlpd.daemon.offline import event_columns
from mlpd.daemon.pages import NO_STAMPS, Page, Selection, form, read_tail
from mlpd.features.stamps import stamps_of
from mlpd.features.tombstones import DELETED
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.frames import polars_type, to_series
from mlpd.storage.lineage import load_lineage
from mlpd.storage.log import RecordKind, compacted_through
from mlpd.storage.offline import RESCANS
from mlpd.storage.segments import (
    EVENT_TIME,
    KNOWN_TIME,
    SEQUENCE,
    Manifest,
    Segment,
    load_manifests,
)

if TYPE_CHECKING:
    import polars as pl


def run(request: Mapping[str, Any], _: Send) -> Any:
    """Return a page of segments: encoded `columns`, the last `sequence` that was looked at.

    With `arrow`: one of segments and tail, filled up to its limit, as an Arrow IPC stream.
    """
    data = DataDirectory(Path(request["directory"]))
    schema = {name: DType(dtype) for name, dtype in request["schema"].items()}
    source = SourceSpec(request["source"], request["timestamp"], schema)
    selection = Selection(**request["selection"])
    with Environment.open(data.lmdb, clock=system_clock, readonly=True) as environment:
        home = None
        if request["home"] is not None:
            with environment.snapshot() as snapshot:
                home = home_of(request["home"], load_lineage(snapshot))
        where = environment, data.segments
        if request["arrow"]:
            return _stream([*read_pages(*where, source, selection, home)], source)
        page = read_segments(*where, source, selection, home)
    return {"columns": encode_columns(page.columns), "sequence": page.sequence}


def _stream(pages: Sequence[Page], source: SourceSpec) -> bytes:
    import polars as pl  # noqa: PLC0415 - in the child alone

    parts = [page.columns for page in pages] or [form(source, {}, NO_STAMPS)]
    frames = [pl.DataFrame([to_series(name, c) for name, c in part.items()]) for part in parts]
    buffer = io.BytesIO()
    pl.concat(frames).write_ipc_stream(buffer)
    return buffer.getvalue()


def read_pages(
    environment: Environment,
    directory: Path,
    source: SourceSpec,
    selection: Selection,
    home: Home | None,
) -> Iterator[Page]:
    """Yield pages until they hold the limit, or all there is."""
    while selection.after < selection.through and selection.limit:
        with environment.snapshot() as snapshot:
            is_compacted = selection.after < compacted_through(snapshot)
        read = partial(read_segments, environment, directory)
        page = read(source, selection, home) if is_compacted else None
        page = page or read_tail(environment, source, selection, home)
        if page is not None:  # else the tail has just been compacted
            yield page
            left = selection.limit - height(page.columns)
            selection = replace(selection, after=page.sequence, limit=left)


def read_segments(
    environment: Environment,
    directory: Path,
    source: SourceSpec,
    selection: Selection,
    home: Home | None,
) -> Page:
    """Return a page of segments, read again if they were written anew meanwhile."""
    for _ in range(RESCANS):
        try:
            frame, sequence = read_page(environment, directory, source, selection, home)
            break
        except FileNotFoundError:
            continue
    else:
        frame, sequence = read_page(environment, directory, source, selection, home)
    columns = event_columns(frame, source.schema, source.schema)
    found = form(source, columns, stamps_of(frame), selection.numbered_from or 0)
    return Page(found, sequence, selection.through)


def read_page(
    environment: Environment,
    directory: Path,
    source: SourceSpec,
    selection: Selection,
    home: Home | None,
) -> "tuple[pl.DataFrame, int]":
    """Return the rows, and how far this came; holds the rows of a page and of one manifest."""
    import polars as pl  # noqa: PLC0415 - in the child alone

    with environment.snapshot() as snapshot:
        manifests = load_manifests(snapshot)
    frames = [_read([], directory, source, selection)]
    rows, sequence = 0, selection.after
    for manifest in manifests:
        if manifest.last_sequence <= selection.after or rows >= selection.rows_max:
            continue
        if manifest.first_sequence > selection.through:
            break
        found = _read(_segments(manifest, source, selection), directory, source, selection)
        if home is not None:
            columns = event_columns(found, source.schema, home.keys)
            found = found.filter(home.find(columns, found[SEQUENCE].to_numpy()))
        frames.append(found)
        rows += len(found)
        sequence = min(manifest.last_sequence, selection.through)
    frame = pl.concat(frames)
    if len(frame) > selection.rows_max:
        frame = frame[: selection.rows_max]
        sequence = int(frame[SEQUENCE][-1])
    return frame, sequence


def _segments(manifest: Manifest, source: SourceSpec, selection: Selection) -> list[Segment]:
    return [
        segment
        for segment in manifest.segments
        if (segment.kind, segment.source) == (RecordKind.EVENTS, source.name)
        and segment.last_sequence > selection.after
        and segment.first_sequence <= selection.through
        and (selection.start_us is None or segment.max_event_us >= selection.start_us)
        and (selection.end_us is None or segment.min_event_us < selection.end_us)
    ]


def _read(
    segments: Sequence[Segment], directory: Path, source: SourceSpec, selection: Selection
) -> "pl.DataFrame":
    import polars as pl  # noqa: PLC0415 - in the child alone

    columns: dict[str, pl.DataType] = {
        name: pl.Int64() for name in (EVENT_TIME, KNOWN_TIME, SEQUENCE)
    }
    types = {**source.schema, DELETED: DType.BOOL}
    columns |= {name: polars_type(dtype) for name, dtype in types.items()}
    wanted = (pl.col(SEQUENCE) > selection.after) & (pl.col(SEQUENCE) <= selection.through)
    if selection.start_us is not None:
        wanted &= pl.col(EVENT_TIME) >= selection.start_us
    if selection.end_us is not None:
        wanted &= pl.col(EVENT_TIME) < selection.end_us
    frames = [
        pl.read_parquet(directory / segment.path, glob=False).filter(wanted) for segment in segments
    ]
    frame = pl.concat([pl.DataFrame(schema=columns), *frames], how="diagonal")
    return frame.select(list(columns)).sort(SEQUENCE)
