"""Verb feedback: labels into the log and beside their predictions, then to those who learn.

Idempotent: the last `label_time` wins, the same label again changes nothing, and of two that
contradict each other at the same `label_time` the first stays, so that a retry never turns what is
known.  A label whose prediction is not (yet) there waits in the LABELS table as an orphan, listed
in ORPHANS by arrival; beyond `orphans_max` of them the oldest are dropped.  One that comes later
after its prediction than `label_window` is in the log alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mlpd.core.columns import DType
from mlpd.core.config import PredictionsConfig
from mlpd.core.convert import column_of
from mlpd.core.errors import MlpdError, TooLargeError, ValidationError
from mlpd.core.numbers import is_finite
from mlpd.core.specs import CLASSES_MAX
from mlpd.core.time import Clock, parse_time
from mlpd.daemon.ownership import Ownership
from mlpd.daemon.predictions import (
    KEY_BYTES,
    Label,
    Prediction,
    PredictionLog,
    arrival_key,
    decode_prediction,
    made_us,
    prediction_key,
)
from mlpd.daemon.retention import drop_orphans, oldest_keys
from mlpd.storage.log import RecordKind, append
from mlpd.storage.moved_keys import LABEL
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

FEEDBACK_ROWS_MAX = 10_000
FEEDBACK_SOURCE = "mlpd.feedback"
"""Name of the feedback records in the log; no user source can have it."""

_FATES = ("joined", "orphan", "revised", "stale", "late", "conflict", "rejected")


@dataclass(frozen=True, slots=True)
class LabelChange:
    """A label that took effect; `old` is what it replaces, the same again at a later time too."""

    prediction: Prediction
    old: Label | None
    new: Label


@dataclass(frozen=True, slots=True)
class FeedbackAnswer:
    """What became of a batch of labels."""

    accepted: int
    joined: int
    orphans: int
    revised: int
    stale: int
    late: int
    conflicts: int
    rejected: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return the wire form."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class _Row:
    index: int
    key: bytes
    prediction_id: str
    label: float
    time_us: int | None


@dataclass(slots=True)
class _Written:
    changes: list[LabelChange] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    stale: int = 0
    late: int = 0
    conflicts: int = 0
    orphans: int = 0
    new_orphans: int = 0
    dropped: int = 0
    touched: list[bytes] = field(default_factory=list)
    """Keys of labels that were stored or dropped."""


class Feedback:
    """Takes labels; `on_change` is called on the loop with every label that took effect."""

    def __init__(
        self,
        writer: Writer,
        log: PredictionLog,
        clock: Clock,
        on_change: Callable[[Sequence[LabelChange]], None],
        ownership: Ownership,
        config: PredictionsConfig,
    ) -> None:
        self._writer = writer
        self._log = log
        self._clock = clock
        self._on_change = on_change
        self._ownership = ownership
        self._config = config
        self.orphans_dropped = 0
        """Orphans that gave way to newer ones."""
        self.counts = dict.fromkeys(_FATES, 0)

    async def record(self, labels: Sequence[Any]) -> FeedbackAnswer:
        """Store labels `{"prediction_id", "label", "label_time"?}`; durable on return.

        Without a `label_time` the arrival time counts.  Wrong rows are refused one by one.
        MisdirectedError for a prediction of another shard: then nothing is stored.
        """
        if len(labels) > FEEDBACK_ROWS_MAX:
            raise TooLargeError(
                f"{len(labels)} labels in one request; the limit is {FEEDBACK_ROWS_MAX}",
                code="too_many_rows",
                hint="Send them in parts.",
            )
        rows, rejected = _parse(labels, self._clock())
        part = self._ownership.part
        if part is not None:
            part.check_slots(
                (int.from_bytes(row.key[:2], "big") for row in rows), "label", writes=True
            )
        self._log.flush()  # so that predictions answered before are stored before their labels
        done = _Written()
        if rows:
            done = await self._writer.write(
                lambda txn: self._write(txn, rows), size_bytes=64 * len(rows)
            )
        self._on_change(done.changes)
        rejected = sorted([*rejected, *done.refused], key=lambda found: int(found["index"]))
        answer = _answer(len(labels) - len(rejected), done, rejected)
        self._count(answer)
        self.orphans_dropped += done.dropped
        return answer

    def _write(self, txn: WriteTransaction, rows: Sequence[_Row]) -> _Written:
        """Store labels, unless their slots have begun to move since the request was read."""
        part = self._ownership.part
        if part is not None:
            self._ownership.check_open([int.from_bytes(row.key[:2], "big") for row in rows])
        done = _write(txn, rows, self._config)
        self._ownership.note_changed(txn, LABEL, done.touched)
        return done

    def _count(self, answer: FeedbackAnswer) -> None:
        self.counts["joined"] += answer.joined
        self.counts["orphan"] += answer.orphans
        self.counts["revised"] += answer.revised
        self.counts["stale"] += answer.stale
        self.counts["late"] += answer.late
        self.counts["conflict"] += answer.conflicts
        self.counts["rejected"] += len(answer.rejected)


def _parse(labels: Sequence[Any], now_us: int) -> tuple[list[_Row], list[dict[str, Any]]]:
    rows, rejected = [], []
    for index, label in enumerate(labels):
        try:
            rows.append(_parse_row(index, label, now_us))
        except MlpdError as error:
            rejected.append(_refusal(index, error))
    return rows, rejected


def _refusal(index: int, error: MlpdError) -> dict[str, Any]:
    shape = error.to_dict()
    return {"index": index} | {name: shape[name] for name in ("code", "message", "hint")}


def _parse_row(index: int, row: Any, now_us: int) -> _Row:
    if not isinstance(row, Mapping) or not row.keys() <= {"prediction_id", "label", "label_time"}:
        raise ValidationError(
            "a label is an object with prediction_id, label and, optionally, label_time",
            code="invalid_label",
        )
    key = prediction_key(row.get("prediction_id"))
    label = row.get("label")
    if is_finite(label):
        time = row.get("label_time")
        time_us = None if time is None else int(parse_time(time, "label_time"))
        if time_us is not None and time_us > now_us:
            raise ValidationError("label_time lies in the future", code="future_label")
        return _Row(index, key, row["prediction_id"], float(label), time_us)
    raise ValidationError(
        f"label {repr(label)[:60]} is not a finite number or bool",
        code="invalid_label",
        hint="Classes are numbered from 0, as in the column that the job's `label` names.",
    )


def _write(txn: WriteTransaction, rows: Sequence[_Row], config: PredictionsConfig) -> _Written:
    done = _Written()
    kept = []
    for row in rows:
        stored = txn.get(Table.PREDICTIONS, row.key)
        prediction = None if stored is None else decode_prediction(row.key, stored)
        if prediction is not None and not prediction.can_become(row.label):
            done.refused.append(_refusal(row.index, _no_class(prediction, row.label)))
        else:
            kept.append((row, prediction, txn.known_us if row.time_us is None else row.time_us))
    if kept:
        _log(txn, kept)
    for row, prediction, time_us in kept:
        _take(txn, row, prediction, time_us, config.label_window_us, done)
    # At most one goes for one that comes: the operation stays as large as the request.
    excess = min(done.new_orphans, txn.count(Table.ORPHANS) - config.orphans_max)
    oldest = oldest_keys(txn, Table.ORPHANS, excess)
    done.dropped = drop_orphans(txn, oldest)
    done.touched += (row[-KEY_BYTES:] for row in oldest)
    return done


def _log(txn: WriteTransaction, kept: Sequence[tuple[_Row, Prediction | None, int]]) -> None:
    append(
        txn,
        kind=RecordKind.FEEDBACK,
        source=FEEDBACK_SOURCE,
        columns={
            "prediction_id": column_of(DType.STRING, [row.prediction_id for row, _, _ in kept]),
            "label": column_of(DType.FLOAT64, [row.label for row, _, _ in kept]),
        },
        event_us=np.array([time_us for _, _, time_us in kept], np.int64),
    )


def _no_class(prediction: Prediction, label: float) -> ValidationError:
    return ValidationError(
        f"label {label:g} is no class of {prediction.model}@{prediction.version}, which chose "
        f"class {prediction.chosen} for {prediction.prediction_id}",
        code="invalid_label",
        hint=f"Send the number of the class that came: 0, 1, 2 ... up to {CLASSES_MAX - 1}.",
    )


def _take(
    txn: WriteTransaction,
    row: _Row,
    prediction: Prediction | None,
    time_us: int,
    window_us: int,
    done: _Written,
) -> None:
    """Put one label beside its prediction, or count why not."""
    if row.time_us is not None and row.time_us - made_us(row.key) > window_us:
        done.late += 1
        return
    stored = txn.get(Table.LABELS, row.key)
    current = None if stored is None else Label.decode(stored)
    fate = _judge(current, row, time_us)
    done.stale += fate in ("stale", "confirmed")
    done.conflicts += fate == "conflict"
    if fate in ("stale", "conflict"):
        return
    revised = 0 if current is None else current.revisions + (fate == "new")
    new = Label(row.label, time_us, revised)
    txn.put(Table.LABELS, row.key, new.encode())
    done.touched.append(row.key)
    if prediction is not None:
        done.changes.append(LabelChange(prediction, current, new))
    elif fate == "new":
        done.orphans += 1
        if current is None:
            txn.put(Table.ORPHANS, arrival_key(txn.known_us, row.key), b"")
            done.new_orphans += 1


def _judge(
    current: Label | None, row: _Row, time_us: int
) -> Literal["new", "confirmed", "stale", "conflict"]:
    """Tell what a label does to the one that is there; `confirmed`: the same at a later time.

    A confirmed label keeps a revision between the two times from winning.  Labels without a time
    that came together are in the order in which they stand.
    """
    if current is None or (time_us > current.time_us and row.label != current.label):
        return "new"
    if row.label == current.label:
        return "confirmed" if time_us > current.time_us else "stale"
    if time_us < current.time_us:
        return "stale"
    return "new" if row.time_us is None else "conflict"


def _answer(rows: int, done: _Written, rejected: list[dict[str, Any]]) -> FeedbackAnswer:
    took = [c for c in done.changes if c.old is None or c.old.label != c.new.label]
    return FeedbackAnswer(
        accepted=rows,
        joined=len(took),
        orphans=done.orphans,
        revised=sum(change.old is not None for change in took),
        stale=done.stale,
        late=done.late,
        conflicts=done.conflicts,
        rejected=rejected,
    )
