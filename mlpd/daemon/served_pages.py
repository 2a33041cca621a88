"""Pages of the prediction log, out of files and LMDB, in the order of arrival; in a child."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlpd.core.errors import InternalError
from mlpd.daemon.predictions import Label, decode_prediction, prediction_key, slot_in
from mlpd.daemon.served_files import ServedFile, load_files, served_through
from mlpd.daemon.served_frames import POSITION, SERVED, Placed, to_frame
from mlpd.daemon.served_left import Left, listed_keys, load_left
from mlpd.storage.environment import Environment
from mlpd.storage.offline import RESCANS
from mlpd.storage.tables import Table

if TYPE_CHECKING:
    import polars as pl

LIST_ROWS = 1_000
"""Rows of SERVED of one snapshot: up to 32,000 predictions, in practice some thousands."""


@dataclass(frozen=True, slots=True)
class ServedSelection:
    """Which rows: after a position, of a route, served from a time on and before one.

    `after`: hex, the position of the page before.  `limit`: a page has so many rows, and up to 31
    more, as those that were logged together stay together.
    """

    limit: int
    after: str = ""
    route: str | None = None
    start_us: int | None = None
    end_us: int | None = None

    def takes(self, first_us: int, last_us: int) -> bool:
        """Tell whether rows of this span, inclusive, may be asked for."""
        return (self.start_us is None or last_us >= self.start_us) and (
            self.end_us is None or first_us < self.end_us
        )


def read_page(
    environment: Environment, directory: Path, selection: ServedSelection
) -> "tuple[pl.DataFrame, bytes]":
    """Return the rows, with their labels, and the position of the next page's beginning.

    A page without rows is the last.  What is in files is read there, the rest in LMDB; where that
    changes between two snapshots, it is told by the position alone.
    """
    import polars as pl  # noqa: PLC0415 - in the child alone

    position, found, rows = bytes.fromhex(selection.after), [to_frame([])], 0
    while rows < selection.limit:
        with environment.snapshot() as snapshot:
            files, through = load_files(snapshot), served_through(snapshot)
        file = next((f for f in files if bytes.fromhex(f.through) > position), None)
        if position < through and file is not None:
            part = _read_file(environment, directory, file, position, selection)
            position = bytes.fromhex(file.through)
        else:
            part, reached = _read_tail(environment, max(position, through), selection)
            if reached is None:
                break
            position = reached
        found.append(part)
        rows += len(part)
    frame = pl.concat(found)
    if len(frame) > selection.limit:
        position = frame[POSITION][selection.limit - 1]
        frame = frame.filter(pl.col(POSITION) <= position)
    return _with_labels(environment, frame), position


def read_file(environment: Environment, directory: Path, number: int) -> "pl.DataFrame | None":
    """Return a file, by what its name is now; None if it was too old meanwhile.

    Raises InternalError(code="served_file_missing") for one that is named and not there.
    """
    import polars as pl  # noqa: PLC0415 - in the child alone

    for _ in range(RESCANS):
        with environment.snapshot() as snapshot:
            file = next((f for f in load_files(snapshot) if f.number == number), None)
            left = load_left(snapshot)
        if file is None:
            return None
        with suppress(FileNotFoundError):  # else it was written anew
            frame = pl.read_parquet(directory / file.path, glob=False)
            return frame if left is None else without_left(frame, left)
    raise InternalError(
        f"the file of predictions {file.path if file else number} is not there",
        code="served_file_missing",
        hint="Run mlpd fsck; restore a backup.",
    )


def without_left(frame: "pl.DataFrame", left: Left) -> "pl.DataFrame":
    """Return the rows of a file that are still of this shard; 1 us each."""
    ids = frame["prediction_id"].to_list()
    slots = np.array([slot_in(name) for name in ids], np.int64)
    arrived_us = frame[SERVED].to_physical().to_numpy()
    return frame.filter(~left.gone(slots, arrived_us))


def _read_file(
    environment: Environment,
    directory: Path,
    file: ServedFile,
    position: bytes,
    selection: ServedSelection,
) -> "pl.DataFrame":
    import polars as pl  # noqa: PLC0415 - in the child alone

    frame = None
    if selection.takes(file.first_us, file.last_us):
        frame = read_file(environment, directory, file.number)
    if frame is None:
        return to_frame([])
    return _select(frame.filter(pl.col(POSITION) > position), selection)


def _read_tail(
    environment: Environment, position: bytes, selection: ServedSelection
) -> "tuple[pl.DataFrame, bytes | None]":
    """Return the next rows of LMDB, and the last position looked at, None at the end."""
    rows: list[Placed] = []
    last: bytes | None = None
    with environment.snapshot() as snapshot:
        left = load_left(snapshot)
        listed = [
            row
            for _, row in zip(
                range(LIST_ROWS),
                snapshot.scan(Table.SERVED, position + b"\x00" if position else b""),
                strict=False,
            )
        ]
        if served_through(snapshot) > position:  # a file has them since: ask again
            return to_frame([]), position
        for last, value in listed:
            keys = listed_keys(last, value, left)
            stored = snapshot.get_many(Table.PREDICTIONS, keys)
            rows += [
                (last, decode_prediction(key, bytes(row)))
                for key, row in zip(keys, stored, strict=True)
                if row is not None
            ]
            if len(rows) >= selection.limit:
                break
    return _select(to_frame(rows), selection), last


def _select(frame: "pl.DataFrame", selection: ServedSelection) -> "pl.DataFrame":
    import polars as pl  # noqa: PLC0415 - in the child alone

    served, wanted = pl.col(SERVED).to_physical(), pl.lit(value=True)
    if selection.route is not None:
        wanted &= pl.col("route") == selection.route
    if selection.start_us is not None:
        wanted &= served >= selection.start_us
    if selection.end_us is not None:
        wanted &= served < selection.end_us
    return frame.filter(wanted)


def _with_labels(environment: Environment, frame: "pl.DataFrame") -> "pl.DataFrame":
    import polars as pl  # noqa: PLC0415 - in the child alone

    labels = [*_labels(environment, frame["prediction_id"].to_list())]
    times = pl.Series("label_time", [None if x is None else x.time_us for x in labels], pl.Int64())
    return frame.with_columns(
        pl.Series("label", [None if x is None else x.label for x in labels], pl.Float64()),
        times.cast(pl.Datetime("us", "UTC")),
    )


def _labels(environment: Environment, ids: list[str]) -> Iterator[Label | None]:
    for part in np.array_split(np.array(ids, dtype=object), max(len(ids) // 2_000, 1)):
        with environment.snapshot() as snapshot:
            stored = snapshot.get_many(Table.LABELS, [prediction_key(name) for name in part])
        for value in stored:
            yield None if value is None else Label.decode(bytes(value))
