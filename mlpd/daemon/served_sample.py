"""A sample of a version's served rows by lot, in one pass over LMDB and the log's files.

Each row has a lot, a hash of its key, and the rows with the smallest ones are kept.  So a sample
depends on nothing but the rows: not on their order, nor on where they lie.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xxhash
from msgpack import unpackb
from numpy.typing import NDArray

from mlpd.daemon.predictions import prediction_key
from mlpd.daemon.served_rows import read_files, scan_served

SAMPLE_ROWS = 200_000
_SEED = 1
"""Another one than that of `log_share`: among logged rows those lots are all below the share."""
_SLACK = 1.25
"""Rows held over rows wanted, before those that lost are let go."""

Floats = NDArray[np.float64]


class Lottery:
    """Keeps the `rows_max` rows with the smallest lots; 0.3 us for one that is passed over.

    At most 1.25 times as many rows are held.
    """

    def __init__(self, rows_max: int) -> None:
        self._rows_max = rows_max
        self._lots: list[int] = []
        self._rows: list[tuple[bytes, float]] = []
        self._limit = 1 << 64

    def wants(self, key: bytes) -> bool:
        """Tell whether the row with this key would be kept by now."""
        return _lot(key) < self._limit

    def add(self, key: bytes, vector: bytes, score: float) -> None:
        """Take a row in; the same key must not come twice."""
        lot = _lot(key)
        if lot >= self._limit:
            return
        self._lots.append(lot)
        self._rows.append((vector, score))
        if len(self._rows) > _SLACK * self._rows_max:
            self._keep_winners()
            self._limit = self._lots[-1]

    def take(self) -> tuple[Floats, Floats]:
        """Return vectors [n, F] and scores [n] of the rows that were drawn, by their lots."""
        self._keep_winners()
        n = len(self._rows)
        vectors = np.frombuffer(b"".join([vector for vector, _ in self._rows]), np.float64)
        scores = np.array([score for _, score in self._rows], np.float64)
        return vectors.reshape(n, len(vectors) // n if n else 0), scores

    def _keep_winners(self) -> None:
        order = np.argsort(np.array(self._lots, np.uint64), kind="stable")[: self._rows_max]
        self._lots = [self._lots[i] for i in order.tolist()]
        self._rows = [self._rows[i] for i in order.tolist()]


def draw_served(
    request: Mapping[str, Any], number: int, *, rows_max: int = SAMPLE_ROWS
) -> tuple[Floats, Floats]:
    """Return vectors [n, F] and scores [n] of rows of version `number` by lot, `rows_max` at most.

    Of those made in [start_us, end_us) of the request's `model`; F is 0 where there is none.
    Reads the keys of all of the log, 1 us each, and decodes what the lot may take.
    """
    lottery, seen = Lottery(rows_max), set[bytes]()
    for part in scan_served(request):
        for i in np.flatnonzero(part.inside).tolist():
            key = part.keys[i]
            if not lottery.wants(key):
                continue
            row = unpackb(part.values[i])
            if row[7] is not None and _is_of(request, number, row):
                seen.add(key)
                lottery.add(key, row[7], row[6])
    for predictions in read_files(request):
        for p in predictions:
            is_asked = request["start_us"] <= p.t_us < request["end_us"]
            if is_asked and (p.model, p.version) == (request["model"], number):
                key = prediction_key(p.prediction_id)
                if key not in seen:  # LMDB still had it
                    lottery.add(key, p.vector.tobytes(), p.score)
    return lottery.take()


def _lot(key: bytes) -> int:
    return xxhash.xxh64_intdigest(key, _SEED)


def _is_of(request: Mapping[str, Any], number: int, row: Sequence[Any]) -> bool:
    return bool(row[4] == request["model"] and row[5] == number)
