"""Served rows for children: predictions and labels side by side, out of short snapshots."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.hashing import SLOTS
from mlpd.core.time import system_clock
from mlpd.daemon.predictions import Prediction
from mlpd.daemon.served_child import read_predictions
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.map_store import FileMapStore
from mlpd.storage.tables import Table

SNAPSHOT_ROWS = 20_000
"""Rows read from one snapshot: some 100 ms, so that none grows old."""

_KEY = np.dtype([("slot", ">u2"), ("t_us", ">u8"), ("unique", "V6")])


@dataclass(frozen=True, slots=True)
class ServedPart:
    """Rows of one snapshot: keys, times int64 [n], whether asked for, predictions, labels.

    A prediction whose vector and request lie in a file has None in their place.
    """

    keys: list[bytes]
    t_us: NDArray[np.int64]
    inside: NDArray[np.bool_]
    values: list[bytes]
    labels: list[bytes | None]


def scan_served(request: Mapping[str, Any]) -> Iterator[ServedPart]:
    """Yield the prediction log in key order; `request`: `directory`, `start_us` and `end_us`."""
    paths = DataDirectory(Path(request["directory"]))
    start, owned = b"", _owned(paths)
    with Environment.open(paths.lmdb, clock=system_clock, readonly=True) as environment:
        while True:
            with environment.snapshot() as snapshot:
                seen = list(islice(snapshot.scan(Table.PREDICTIONS, start), SNAPSHOT_ROWS))
                keys = [key for key, _ in seen]
                labels = snapshot.get_many(Table.LABELS, keys)
            fields = np.frombuffer(b"".join(keys), _KEY)
            t_us = fields["t_us"].astype(np.int64)
            inside = (t_us >= request["start_us"]) & (t_us < request["end_us"])
            inside &= owned[fields["slot"]]
            yield ServedPart(keys, t_us, inside, [value for _, value in seen], labels)
            if len(seen) < SNAPSHOT_ROWS:
                return
            start = keys[-1] + b"\x00"


def _owned(paths: DataDirectory) -> NDArray[np.bool_]:
    """Return per slot whether the map gives it to this shard: others arrive, or have left."""
    member = FileMapStore(paths.root).load()
    flags = b"\x01" * SLOTS if member is None else member.flags
    return np.frombuffer(flags, np.uint8).astype(np.bool_)


def read_files(request: Mapping[str, Any]) -> Iterator[list[Prediction]]:
    """Yield the rows of the prediction log's files, a file at a time: ask after `scan_served`.

    What that still saw in LMDB may be in a file by now.
    """
    paths = DataDirectory(Path(request["directory"]))
    with Environment.open(paths.lmdb, clock=system_clock, readonly=True) as environment:
        yield from read_predictions(environment, paths)
