"""Child entry `served`: writes, reads and rewrites files of the prediction log.

It changes nothing in LMDB: the daemon makes what it wrote count.
"""

import hashlib
import io
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpd.core.errors import StorageFullError
from mlpd.core.time import DAY_US, format_time, system_clock
from mlpd.daemon.child import Send
from mlpd.daemon.predictions import Prediction, decode_prediction, prediction_key
from mlpd.daemon.served_files import TEMPORARY, ServedFile, load_files, next_number, served_through
from mlpd.daemon.served_frames import Placed, encode_request, from_frame, plain_columns, to_frame
from mlpd.daemon.served_left import listed_keys, load_left
from mlpd.daemon.served_pages import ServedSelection, read_file, read_page
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory, fsync_dir, fsync_file, make_dirs
from mlpd.storage.map_store import FileMapStore
from mlpd.storage.segment_files import write_parquet
from mlpd.storage.tables import Table

if TYPE_CHECKING:
    import polars as pl

_GET_ROWS = 2_000
"""Rows of one snapshot: a few milliseconds."""


def run(request: Mapping[str, Any], _: Send) -> Any:
    """Do what `work` says: `export`, `page` or `erase`; each has its own fields."""
    data = DataDirectory(Path(request["directory"]))
    with Environment.open(data.lmdb, clock=system_clock, readonly=True) as environment:
        try:
            return _WORK[request["work"]](environment, data.predictions, request)
        except OSError as error:
            raise StorageFullError(
                f"files of predictions could not be written: {error}",
                hint="Free space or mend the disk; LMDB keeps all rows until then.",
            ) from None


def export(environment: Environment, directory: Path, request: Mapping[str, Any]) -> bytes | None:
    """Write the oldest rows that no file has, of one UTC day, as a durable file; return its row.

    At most `rows_max`, and up to 31 more.  None if there are none.  When it raises OSError, it has
    removed what it wrote.
    """
    with environment.snapshot() as snapshot:
        after, number = served_through(snapshot), next_number(snapshot)
    listed = [*_list(environment, after, request["rows_max"])]
    if not listed:
        return None
    frame = to_frame([*_load(environment, listed)])
    first, last = listed[0][0], listed[-1][0]
    first_us, last_us = (int.from_bytes(position[:8], "big") for position in (first, last))
    path = f"{format_time(first_us)[:10]}/{number}.parquet"
    file = ServedFile(
        number,
        path,
        after=after.hex(),
        through=last.hex(),
        rows=len(frame),
        size_bytes=0,
        digest="",
        first_us=first_us,
        last_us=last_us,
    )
    return write(directory, file, frame).encode()


def erase(environment: Environment, directory: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Write files anew without the predictions of keys; return them, and the predictions' ids.

    `columns`: the key columns in order, `keys`: as many values each.  What `export` writes can't
    come between: the caller holds it off.
    """
    import polars as pl  # noqa: PLC0415 - in the child alone

    files, ids = [], []
    with environment.snapshot() as snapshot:
        known = load_files(snapshot)
    for file in known:
        path = directory / file.path
        doomed = _doomed(path, request["columns"], request["keys"])
        if doomed:
            frame = pl.read_parquet(path, glob=False)
            left = frame.filter(~pl.col("prediction_id").is_in(doomed))
            revision = file.revision + 1
            name = f"{path.parent.name}/{file.number}.{revision}.parquet"
            again = replace(file, path=name, rows=len(left), revision=revision)
            files.append(write(directory, again, left).encode())
            ids += doomed
    return {"files": files, "ids": ids}


def page(environment: Environment, directory: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return a page as `columns` of plain values, times in us, or with `arrow` as `data`.

    `position`: where the next one begins.
    """
    selection = ServedSelection(**request["selection"])
    frame, position = read_page(environment, directory, selection)
    if not request["arrow"]:
        return {"columns": plain_columns(frame), "position": position.hex()}
    buffer = io.BytesIO()
    frame.write_ipc_stream(buffer)
    return {"data": buffer.getvalue(), "position": position.hex()}


_WORK = {"export": export, "page": page, "erase": erase}


def read_predictions(environment: Environment, paths: DataDirectory) -> Iterator[list[Prediction]]:
    """Yield the predictions of all files, a file at a time."""
    with environment.snapshot() as snapshot:
        numbers = [file.number for file in load_files(snapshot)]
    is_shard = FileMapStore(paths.root).load() is not None
    for number in numbers:
        frame = read_file(environment, paths.predictions, number)
        if frame is not None:
            found = [*from_frame(frame)]
            yield [*_with_shards(environment, found)] if is_shard else found


def _with_shards(
    environment: Environment, predictions: Sequence[Prediction]
) -> Iterator[Prediction]:
    """Yield predictions with what files don't have: their import, sequences of other shards."""
    for start in range(0, len(predictions), _GET_ROWS):
        part = predictions[start : start + _GET_ROWS]
        with environment.snapshot() as snapshot:
            keys = [prediction_key(p.prediction_id) for p in part]
            values = snapshot.get_many(Table.PREDICTIONS, keys)
        for prediction, key, value in zip(part, keys, values, strict=True):
            if value is not None:
                row = decode_prediction(key, bytes(value))
                yield replace(prediction, brought=row.brought, others=row.others)
            else:
                yield prediction


def write(directory: Path, file: ServedFile, frame: "pl.DataFrame") -> ServedFile:
    """Write a frame under the file's name, durably; return the file with size and digest."""
    target = directory / file.path
    make_dirs(directory / TEMPORARY)
    make_dirs(target.parent)
    temporary = directory / TEMPORARY / f"{os.getpid()}-{secrets.token_hex(8)}.parquet"
    try:
        write_parquet(frame, temporary)
        fsync_file(temporary)
        with temporary.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        size_bytes = temporary.stat().st_size
        temporary.replace(target)
        fsync_dir(target.parent)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return replace(file, size_bytes=size_bytes, digest=f"sha256:{digest}")


def _list(
    environment: Environment, after: bytes, rows_max: int
) -> Iterator[tuple[bytes, list[bytes]]]:
    """Yield rows of SERVED, key and keys of predictions, while they are of one day."""
    rows, day, start = 0, None, after + b"\x00" if after else b""
    while rows < rows_max:
        found = []
        with environment.snapshot() as snapshot:
            left = load_left(snapshot)
            for _, row in zip(range(_GET_ROWS), snapshot.scan(Table.SERVED, start), strict=False):
                found.append(row)
        if not found:
            return
        for position, value in found:
            this = int.from_bytes(position[:8], "big") // DAY_US
            if rows >= rows_max or (day is not None and this != day):
                return
            day = this
            keys = listed_keys(position, value, left)
            rows += len(keys)
            yield position, keys
        start = found[-1][0] + b"\x00"


def _load(
    environment: Environment, listed: Sequence[tuple[bytes, list[bytes]]]
) -> Iterator[Placed]:
    """Yield the predictions that are there: an erasure, or retention, may have been before."""
    places = [(position, key) for position, keys in listed for key in keys]
    for start in range(0, len(places), _GET_ROWS):
        part = places[start : start + _GET_ROWS]
        with environment.snapshot() as snapshot:
            values = snapshot.get_many(Table.PREDICTIONS, [key for _, key in part])
        for (position, key), value in zip(part, values, strict=True):
            if value is not None:
                yield position, decode_prediction(key, bytes(value))


def _doomed(path: Path, columns: Sequence[str], keys: Sequence[Sequence[Any]]) -> list[str]:
    """Return the ids of a file's predictions that were asked with a key, or assigned by it."""
    import polars as pl  # noqa: PLC0415 - in the child alone

    frame = pl.read_parquet(path, columns=["prediction_id", "unit", "request"], glob=False)
    wanted = [encode_request(dict(zip(columns, key, strict=True))) for key in keys]
    texts = [text[1:-1].split(", ", 1)[0] if len(columns) == 1 else "" for text in wanted]
    units = [key[0] for key in keys if len(key) == 1 and isinstance(key[0], str)]
    near = pl.col("unit").is_in(units)
    for text in set(texts):
        near |= pl.col("request").str.contains(text, literal=True)
    asked = [[*json.loads(text).values()] for text in wanted]
    return [
        prediction_id
        for prediction_id, unit, request in frame.filter(near.fill_null(value=False)).iter_rows()
        if unit in units or [json.loads(request).get(name) for name in columns] in asked
    ]
