"""Checks of the prediction log's files: all there, whole, and with every vector that left LMDB."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import MlpdError
from mlpd.daemon.predictions import decode_prediction
from mlpd.daemon.served_files import ServedFile, find_unnamed, load_files
from mlpd.daemon.served_frames import POSITION
from mlpd.storage.check import Problem, scan_parts
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table

Keys = NDArray[np.void]
_KEY = "V16"


@dataclass(frozen=True, slots=True)
class ServedReport:
    """What is wrong, and what was looked at; files that nothing names are harmless."""

    problems: list[Problem]
    counts: dict[str, int]


def check_served(environment: Environment, directory: Path) -> ServedReport:
    """Verify digest, rows and range of every file, and that no moved row is without its vector.

    LMDB is read first: what moves meanwhile has its file already.  Holds 16 bytes a row.
    """
    moved = _moved(environment)
    problems: list[Problem] = []
    keys: list[Keys] = [np.empty(0, _KEY)]
    try:
        with environment.snapshot() as snapshot:
            files = load_files(snapshot)
    except MlpdError as error:
        return ServedReport([Problem(error.code, "files", error.message)], {})
    for file in files:
        found = _check_file(environment, directory, file, keys)
        problems += [] if found is None else [found]
    lost = np.setdiff1d(moved, np.concatenate(keys)) if not problems else moved[:0]
    problems += [
        Problem("vector_missing", f"prediction {key.hex()}", "no file has its vector")
        for key in map(bytes, lost.tolist())
        if _is_there(environment, key)
    ]
    counts = {
        "files": len(files),
        "rows": sum(file.rows for file in files),
        "bytes": sum(file.size_bytes for file in files),
        "moved": len(moved),
        "unnamed_files": len(find_unnamed(files, directory)),
    }
    return ServedReport(problems, counts)


def _check_file(
    environment: Environment, directory: Path, file: ServedFile, keys: list[Keys]
) -> Problem | None:
    path = directory / file.path
    try:
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        if not _is_named(environment, file):
            return None  # it was too old, or written anew, meanwhile
        return Problem("served_file_missing", file.path, f"it can't be read: {error.strerror}")
    if f"sha256:{digest}" != file.digest:
        return Problem("served_file_damaged", file.path, "its digest is not the one noted")
    difference = next(_differences(path, file, keys), None)
    return None if difference is None else Problem("served_file_differs", file.path, difference)


def _differences(path: Path, file: ServedFile, keys: list[Keys]) -> Iterator[str]:
    import polars as pl  # noqa: PLC0415 - in the child alone

    frame = pl.read_parquet(path, columns=[POSITION, "prediction_id"], glob=False)
    if len(frame) != file.rows:
        yield f"it has {len(frame)} rows, {file.rows} are noted"
    after, through = bytes.fromhex(file.after), bytes.fromhex(file.through)
    if len(frame) and not after < frame[POSITION].min() <= frame[POSITION].max() <= through:  # type: ignore[operator]  # bytes
        yield "its rows are not of the range noted"
    ids = b"".join(map(bytes.fromhex, frame["prediction_id"].to_list()))
    raw = np.frombuffer(ids, np.uint8).reshape(-1, 16)
    order = [8, 9, *range(8), *range(10, 16)]  # the slot stands first in keys
    keys.append(np.ascontiguousarray(raw[:, order]).view(_KEY)[:, 0])


def _moved(environment: Environment) -> Keys:
    found = b"".join(
        key
        for part in scan_parts(environment, Table.PREDICTIONS)
        for key, value in part.rows
        if _is_moved(key, value)
    )
    return np.frombuffer(found, _KEY)


def _is_moved(key: bytes, value: bytes) -> bool:
    try:
        return decode_prediction(key, value).moved
    except Exception:  # noqa: BLE001 - damage in any form; the section `tables` tells of it
        return False


def _is_named(environment: Environment, file: ServedFile) -> bool:
    with environment.snapshot() as snapshot:
        return any(known.path == file.path for known in load_files(snapshot))


def _is_there(environment: Environment, key: bytes) -> bool:
    with environment.snapshot() as snapshot:
        return snapshot.get(Table.PREDICTIONS, key) is not None
