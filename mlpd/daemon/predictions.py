"""The prediction log: every served row with its vector, kept for labels, experiments and audits.

The SERVED table lists the keys in the order in which rows were logged: a prediction's own time may
be years back, when history is replayed, so retention goes by that list.

A prediction's id is 32 hex digits: `u64be t_us || u16be slot || 6 unique bytes`; its key in the
PREDICTIONS table is `slot || t_us || unique`, so that the id alone leads to the row and its shard.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np
import xxhash
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.core.hashing import SLOTS, slot_of
from mlpd.core.specs import CLASSES_MAX
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

_FORMAT = 1
SEQUENCE, ARM, VECTOR, GIVEN, UNIT = 1, 3, 7, 8, 9
EXPERIMENT, PHASE, CHOSEN, BROUGHT = 11, 12, 13, 15
"""Their places in a row."""
_PLAIN: tuple[int | None, float, int, Mapping[str, int]] = (None, 1.0, 0, {})
"""Chosen class, share, import and sequences of other shards of most rows."""
_ID_BYTES = 16
_UNIQUE_MASK = 0xFFFF_FFFF_FFFF
KEY_BYTES = 16
"""Length of a key in PREDICTIONS and LABELS."""
SERVED_KEYS_MAX = 32
"""Keys in one row of SERVED: what retention removes as one."""

_SCAN_ROWS = 2_000
"""Rows per snapshot of a scan: a few milliseconds, so that no snapshot grows old."""

_log = logging.getLogger("mlpd.predictions")


@dataclass(frozen=True, slots=True)
class Prediction:
    """One served row.

    `t_us` and `sequence`: the moment and the last event that its features saw.  `vector`: float64
    [F], as the model got it.  `given`: key columns and request fields by name.  `arm`, `unit`,
    `propensity`: how it was assigned; `phase`: index of the experiment's, 0 without one.
    `chosen`: of a model of several classes the one with the largest score, which is `score`.
    `share`: of such rows that were logged.  `moved`: its vector and `given` lie in a file, they are
    empty.  `brought`: number of the import by which its slot came from another shard, 0 for none;
    `sequence` is then the last event that it saw of those that the import brought.  `others`: of a
    row that was read with cells, the last event that each shard had seen which gave some.
    """

    prediction_id: str
    t_us: int
    sequence: int
    route: str
    arm: str
    model: str
    version: int
    score: float
    vector: NDArray[np.float64]
    given: Mapping[str, Any]
    unit: str | None = None
    propensity: float = 1.0
    experiment: str | None = None
    phase: int = 0
    chosen: int | None = None
    share: float = 1.0
    moved: bool = False
    brought: int = 0
    others: Mapping[str, int] = field(default_factory=dict)

    def target(self, label: float) -> float:
        """Return what `score` should have been for this label: of several classes 0 or 1."""
        return label if self.chosen is None else float(label == self.chosen)

    def can_become(self, label: float) -> bool:
        """Tell whether a label makes sense: of several classes it is the number of one."""
        return self.chosen is None or (label == int(label) and 0 <= label < CLASSES_MAX)

    def encode(self) -> bytes:
        """Return the row's value; about 4 us."""
        packed: bytes = msgpack.packb(
            (
                *(_FORMAT, self.sequence, self.route, self.arm, self.model, self.version),
                *(self.score, self.vector.tobytes(), dict(self.given), self.unit),
                *(self.propensity, self.experiment, self.phase),
                *self._more(),
            )
        )
        return packed

    def _more(self) -> tuple[Any, ...]:
        """Return what few rows have; what is usual is left out."""
        more, plain = (self.chosen, self.share, self.brought, self.others), len(_PLAIN)
        while plain and more[plain - 1] == _PLAIN[plain - 1]:
            plain -= 1
        return more[:plain]


def decode_prediction(key: bytes, value: bytes) -> Prediction:
    """Return the prediction stored under `key`."""
    _, sequence, route, arm, model, version, score, vector, given, *rest = msgpack.unpackb(value)
    unit, propensity, experiment, phase, *more = rest
    last: list[Any] = [*more, *_PLAIN[len(more) :]]
    return Prediction(
        prediction_id=(key[2:10] + key[:2] + key[10:]).hex(),
        t_us=made_us(key),
        sequence=sequence,
        route=route,
        arm=arm,
        model=model,
        version=version,
        score=score,
        vector=np.frombuffer(vector or b"", np.float64),
        given=given or {},
        unit=unit,
        propensity=propensity,
        experiment=experiment,
        phase=phase,
        chosen=last[0],
        share=last[1],
        moved=vector is None,
        brought=last[2],
        others=last[3],
    )


def without_vector(value: bytes) -> bytes | None:
    """Return a row's value without vector and request, None if it has none; about 5 us."""
    fields = msgpack.unpackb(value)
    if fields[VECTOR] is None:
        return None
    fields[VECTOR] = fields[GIVEN] = None
    packed: bytes = msgpack.packb(fields)
    return packed


def with_vector(value: bytes, vector: bytes, given: Mapping[str, Any]) -> bytes:
    """Return a row's value with the vector and the request that had moved into a file."""
    fields = msgpack.unpackb(value)
    fields[VECTOR], fields[GIVEN] = vector, dict(given)
    packed: bytes = msgpack.packb(fields)
    return packed


def brought_along(value: bytes, sequence: int, number: int) -> bytes:
    """Return a row's value as another shard keeps it, to which its slot came by an import."""
    fields = msgpack.unpackb(value)
    fields += _PLAIN[len(fields) - CHOSEN :]
    fields[SEQUENCE], fields[BROUGHT] = sequence, number
    packed: bytes = msgpack.packb(fields)
    return packed


def prediction_facts(value: bytes) -> list[Any]:
    """Return what a row holds, by place; about 3 us."""
    found: list[Any] = msgpack.unpackb(value)
    return found


def prediction_key(prediction_id: object) -> bytes:
    """Return the table key of an id, else raise ValidationError(code="invalid_prediction_id")."""
    try:
        raw = bytes.fromhex(prediction_id) if isinstance(prediction_id, str) else b""
    except ValueError:
        raw = b""
    if len(raw) != _ID_BYTES or int.from_bytes(raw[8:10], "big") >= SLOTS:
        raise ValidationError(
            f"{prediction_id!r} is no prediction id",
            code="invalid_prediction_id",
            hint="Send the prediction_id of a predict answer: 32 hex digits.",
        )
    return raw[8:10] + raw[:8] + raw[10:]


def slot_in(prediction_id: str) -> int:
    """Return the slot in which a prediction lives, by its id."""
    return int(prediction_id[16:20], 16)


def lot_of(prediction_id: str) -> float:
    """Return the lot in [0, 1) by which a row is logged: xxh64 of the id's 16 bytes / 2^64."""
    return float(xxhash.xxh64_intdigest(bytes.fromhex(prediction_id)) * 2.0**-64)


def made_us(key: bytes) -> int:
    """Return the moment in us of the prediction with this table key."""
    return int.from_bytes(key[2:10], "big")


class PredictionIds:
    """Makes ids, unique across restarts: a random start of 48 bits, then counting."""

    def __init__(self) -> None:
        self._next = int.from_bytes(os.urandom(6), "big")

    def make(self, t_us: int, unit: str | None, slot: int | None = None) -> str:
        """Return a new id in `slot`, else in that of `unit`, else in any."""
        self._next = (self._next + 1) & _UNIQUE_MASK
        unique = self._next.to_bytes(6, "big")
        if slot is None:
            slot = slot_of(unique if unit is None else unit.encode())
        return (t_us.to_bytes(8, "big") + slot.to_bytes(2, "big") + unique).hex()


class PredictionLog:
    """Buffers served rows and hands them to the writer; never blocks a request.

    Rows wait in memory until `flush` (every 50 ms, or when enough wait); a crash loses those, a
    full buffer drops new ones and counts them.  All methods belong to the loop.
    """

    def __init__(
        self,
        writer: Writer,
        rows_max: int,
        joined: "Callable[[Sequence[tuple[Prediction, Label]]], None] | None" = None,
        touched: Callable[[WriteTransaction, Sequence[bytes]], None] | None = None,
    ) -> None:
        """`joined` is called on the loop with labels that had come before their predictions.

        `touched` is called on the writer thread with the keys that are stored.
        """
        self._writer = writer
        self._rows_max = rows_max
        self._joined = joined
        self._touched = touched
        self._recordings: set[asyncio.Future[None]] = set()
        self._waiting: list[Prediction] = []
        self.logged = 0
        self.dropped = 0
        self.left_out = 0
        """Rows that their route's rule left out."""
        self.labels_refused = 0
        """Labels that came before their predictions, and turned out to be no class of theirs."""

    def append(self, prediction: Prediction) -> bool:
        """Keep a served row for the next flush; False when it was dropped."""
        if len(self._waiting) >= self._rows_max:
            self.dropped += 1
            return False
        self._waiting.append(prediction)
        self.logged += 1
        return True

    def flush(self) -> None:
        """Hand the waiting rows to the writer; they are stored before anything written later."""
        waiting = self._waiting
        if not waiting:
            return

        def write(txn: WriteTransaction) -> _Waited:
            keys = [prediction_key(prediction.prediction_id) for prediction in waiting]
            for key, prediction in zip(keys, waiting, strict=True):
                txn.put(Table.PREDICTIONS, key, prediction.encode())
            list_served(txn, keys)
            if self._touched is not None:
                self._touched(txn, keys)
            return _labelled_before(txn, keys, waiting)

        if self._writer.post(write, size_bytes=256 * len(waiting), done=self._join):
            self._waiting = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Tell `settle` that rows of a request are being appended, in several turns of the loop."""
        ended = asyncio.get_running_loop().create_future()
        self._recordings.add(ended)
        try:
            yield
        finally:
            self._recordings.discard(ended)
            ended.set_result(None)

    async def settle(self) -> None:
        """Return when all rows are stored whose recording had begun; that takes milliseconds.

        At once where none had, and none waits: what was handed to the writer is before whatever the
        caller had written.
        """
        if not self._recordings and not self._waiting:
            return
        if self._recordings:
            await asyncio.wait([*self._recordings])
        self.flush()
        await self._writer.write(lambda _: None)

    def _join(self, waited: "_Waited") -> None:
        joined, refused = waited
        self.labels_refused += len(refused)
        for prediction, label in refused[:1]:
            _log.warning(
                "%d labels that came before their predictions are no classes and were dropped: "
                "%g of %s, which %s@%d scored, is the first",
                *(len(refused), label.label, prediction.prediction_id),
                *(prediction.model, prediction.version),
            )
        if self._joined is not None:
            self._joined(joined)


def list_served(txn: WriteTransaction, keys: Sequence[bytes]) -> None:
    """List what is stored, by the group's arrival: retention, files and pages go by that."""
    for start in range(0, len(keys), SERVED_KEYS_MAX):
        listed = keys[start : start + SERVED_KEYS_MAX]
        txn.put(Table.SERVED, arrival_key(txn.known_us, listed[0]), b"".join(listed))


def _labelled_before(
    txn: WriteTransaction, keys: Sequence[bytes], predictions: Sequence[Prediction]
) -> "_Waited":
    """Return the predictions whose label waited as an orphan; 1 us each while there are any.

    First those that it makes sense for, then the others, whose labels are removed.
    """
    joined, refused = list[tuple[Prediction, Label]](), list[tuple[Prediction, Label]]()
    if not txn.count(Table.ORPHANS):
        return joined, refused
    labels = txn.get_many(Table.LABELS, keys)
    for key, prediction, stored in zip(keys, predictions, labels, strict=True):
        if stored is None:
            continue
        label = Label.decode(stored)
        if prediction.can_become(label.label):
            joined.append((prediction, label))
        else:
            txn.delete(Table.LABELS, key)
            refused.append((prediction, label))
    return joined, refused


def arrival_key(known_us: int, key: bytes) -> bytes:
    """Return the key of a row of SERVED or ORPHANS: they sort by arrival."""
    return known_us.to_bytes(8, "big") + key


def scan_predictions(
    environment: Environment, start: bytes = b"", stop: bytes | None = None
) -> Iterator[list[tuple[Prediction, "Label | None"]]]:
    """Yield the logged predictions with their labels, in key order, one short snapshot a list.

    Of keys from `start` on and before `stop`, by default all.
    """
    while True:
        with environment.snapshot() as snapshot:
            rows = [
                row
                for row, _ in zip(
                    snapshot.scan(Table.PREDICTIONS, start, stop), range(_SCAN_ROWS), strict=False
                )
            ]
            labels = snapshot.get_many(Table.LABELS, [key for key, _ in rows])
        yield [
            (decode_prediction(key, value), None if label is None else Label.decode(label))
            for (key, value), label in zip(rows, labels, strict=True)
        ]
        if len(rows) < _SCAN_ROWS:
            return
        start = rows[-1][0] + b"\x00"


@dataclass(frozen=True, slots=True)
class Label:
    """What became of a prediction: the newest label and how often it was revised."""

    label: float
    time_us: int
    revisions: int = 0

    def encode(self) -> bytes:
        """Return the row's value."""
        packed: bytes = msgpack.packb((self.label, self.time_us, self.revisions))
        return packed

    @classmethod
    def decode(cls, value: bytes) -> "Label":
        """Return the label that `encode` wrote."""
        return cls(*msgpack.unpackb(value))


_Waited = tuple[list[tuple[Prediction, Label]], list[tuple[Prediction, Label]]]
"""Predictions whose label waited for them: where it makes sense, and where it doesn't."""
