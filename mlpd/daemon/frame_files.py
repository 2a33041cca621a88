"""Joined frames into files of any format, for child processes: one slice in memory at a time."""

import errno
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack

from mlpd.core.convert import bytes_text
from mlpd.core.errors import MlpdError, StorageFullError
from mlpd.core.media import ARROW, ARROW_FILE, JSON, PARQUET
from mlpd.storage.arrow_stream import StreamFile

if TYPE_CHECKING:
    import polars as pl

_SLICE_ROWS = 65_536
_DISK_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS))


def write_frames(frames: "Iterator[pl.DataFrame]", kind: str, path: Path) -> int:
    """Write frames of one schema, at least one, as one file of media type `kind`.

    Returns the rows.  JSON and msgpack: `{"columns": {name: values}}`, times in microseconds UTC;
    a stream of the frames lies beside the file meanwhile, and one column at a time in memory.
    Raises StorageFullError.
    """
    with _disk_errors():
        first = next(frames)
        counted = _Counted(chain((first,), frames))
        if kind == ARROW:
            _stream(counted, path)
        elif kind == PARQUET:
            _sink(counted, first, lambda lazy: lazy.sink_parquet(path, row_group_size=_SLICE_ROWS))
        elif kind == ARROW_FILE:
            _sink(counted, first, lambda lazy: lazy.sink_ipc(path))
        else:
            spooled = path.with_suffix(".spooled")
            _stream(counted, spooled)
            with path.open("wb") as file:
                write = _write_json if kind == JSON else _write_msgpack
                write(file.write, spooled, first.columns, counted.rows)
            spooled.unlink()
    return counted.rows


def _stream(frames: "Iterable[pl.DataFrame]", path: Path) -> None:
    with StreamFile(path) as stream:
        for frame in frames:
            stream.write(frame)


class _Counted:
    """Frames as they come, and how many rows they had."""

    def __init__(self, frames: "Iterator[pl.DataFrame]") -> None:
        self._frames = frames
        self.rows = 0
        self.failure: BaseException | None = None

    def __iter__(self) -> "Iterator[pl.DataFrame]":
        try:
            for frame in self._frames:
                self.rows += len(frame)
                yield frame
        except BaseException as error:
            self.failure = error
            raise


def _sink(
    frames: _Counted, first: "pl.DataFrame", sink: "Callable[[pl.LazyFrame], object]"
) -> None:
    """Let polars write frames while they are made; their own errors come out as they are."""
    from polars.exceptions import PolarsError  # noqa: PLC0415 - in the child alone
    from polars.io.plugins import register_io_source  # noqa: PLC0415

    def source(*_: Any) -> "Iterator[pl.DataFrame]":
        return iter(frames)

    try:
        sink(register_io_source(source, schema=first.schema))
    except (PolarsError, MlpdError):
        if frames.failure is not None:
            raise frames.failure from None
        raise


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Tell of a full or failing disk as what it is, where polars wraps it, too."""
    from polars.exceptions import PolarsError  # noqa: PLC0415 - in the child alone

    try:
        yield
    except (OSError, PolarsError) as error:
        number = getattr(error, "errno", None)
        if number is None and (found := re.search(r"os error (\d+)", str(error))):
            number = int(found[1])
        if number not in _DISK_ERRORS:
            raise
        raise StorageFullError(
            f"the join can't write its files: {str(error)[:200]}",
            hint="A large join needs room in the data directory for its events and its result.",
        ) from error


def _write_json(write: Callable[[bytes], object], path: Path, names: list[str], rows: int) -> None:
    write(b'{"columns":{')
    for number, name in enumerate(names):
        write(b"," * (number > 0) + json.dumps(name, ensure_ascii=False).encode() + b":[")
        for start, values in _column(path, name, rows):
            text = json.dumps(values, default=bytes_text, separators=(",", ":"), ensure_ascii=False)
            write(b"," * (start > 0) + text[1:-1].encode())
        write(b"]")
    write(b"}}")


def _write_msgpack(
    write: Callable[[bytes], object], path: Path, names: list[str], rows: int
) -> None:
    packer = msgpack.Packer()
    write(packer.pack_map_header(1) + packer.pack("columns") + packer.pack_map_header(len(names)))
    for name in names:
        write(packer.pack(name) + packer.pack_array_header(rows))
        for _, values in _column(path, name, rows):
            write(b"".join(map(packer.pack, values)))


def _column(path: Path, name: str, rows: int) -> Iterator[tuple[int, list[Any]]]:
    """Yield (first row, plain values) of one column of a stream, slice by slice."""
    import polars as pl  # noqa: PLC0415 - in the child alone

    column = pl.read_ipc_stream(path, columns=[name])[name].to_physical()
    for start in range(0, rows, _SLICE_ROWS):
        yield start, column[start : start + _SLICE_ROWS].to_list()
