"""Verb feedback: labels into the log and beside their predictions, then to those who learn.

Idempotent: the last `label_time` wins, the same label again changes nothing.  A label whose
prediction is not (yet) there waits in the LABELS table as an orphan, listed in ORPHANS by arrival;
beyond `orphans_max` of them the oldest are dropped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlpd.core.columns import DType
from mlpd.core.convert import column_of
from mlpd.core.errors import MlpdError, TooLargeError, ValidationError
from mlpd.core.time import Clock, parse_time
from mlpd.daemon.predictions import (
    Label,
    Prediction,
    PredictionLog,
    arrival_key,
    decode_prediction,
    prediction_key,
)
from mlpd.daemon.retention import drop_orphans, oldest_keys
from mlpd.storage.log import RecordKind, append
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

FEEDBACK_ROWS_MAX = 10_000
FEEDBACK_SOURCE = "mlpd.feedback"
"""Name of the feedback records in the log; no user source can have it."""


@dataclass(frozen=True, slots=True)
class LabelChange:
    """A label that took effect; `old` is what it replaces."""

    prediction: Prediction
    old: float | None
    new: float
    time_us: int


@dataclass(frozen=True, slots=True)
class FeedbackAnswer:
    """What became of a batch of labels."""

    accepted: int
    joined: int
    orphans: int
    revised: int
    stale: int
    rejected: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return the wire form."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class _Row:
    key: bytes
    prediction_id: str
    label: float
    time_us: int | None


@dataclass(slots=True)
class _Written:
    changes: list[LabelChange] = field(default_factory=list)
    stale: int = 0
    orphans: int = 0
    dropped: int = 0


class Feedback:
    """Takes labels; `on_change` is called on the loop with every label that took effect."""

    def __init__(
        self,
        writer: Writer,
        log: PredictionLog,
        clock: Clock,
        on_change: Callable[[Sequence[LabelChange]], None],
        orphans_max: int,
    ) -> None:
        self._writer = writer
        self._log = log
        self._clock = clock
        self._on_change = on_change
        self._orphans_max = orphans_max
        self.orphans_dropped = 0
        """Orphans that gave way to newer ones."""
        self.counts = {"joined": 0, "orphan": 0, "revised": 0, "stale": 0, "rejected": 0}

    async def record(self, labels: Sequence[Any]) -> FeedbackAnswer:
        """Store labels `{"prediction_id", "label", "label_time"?}`; durable on return.

        Without a `label_time` the arrival time counts.  Wrong rows are refused one by one.
        """
        if len(labels) > FEEDBACK_ROWS_MAX:
            raise TooLargeError(
                f"{len(labels)} labels in one request; the limit is {FEEDBACK_ROWS_MAX}",
                code="too_many_rows",
                hint="Send them in parts.",
            )
        rows, rejected = _parse(labels, self._clock())
        self._log.flush()  # so that predictions answered before are stored before their labels
        done = _Written()
        if rows:
            done = await self._writer.write(
                lambda txn: _write(txn, rows, self._orphans_max), size_bytes=64 * len(rows)
            )
        self._on_change(done.changes)
        revised = sum(change.old is not None for change in done.changes)
        answer = FeedbackAnswer(
            len(rows), len(done.changes), done.orphans, revised, done.stale, rejected
        )
        self._count(answer)
        self.orphans_dropped += done.dropped
        return answer

    def _count(self, answer: FeedbackAnswer) -> None:
        self.counts["joined"] += answer.joined
        self.counts["orphan"] += answer.orphans
        self.counts["revised"] += answer.revised
        self.counts["stale"] += answer.stale
        self.counts["rejected"] += len(answer.rejected)


def _parse(labels: Sequence[Any], now_us: int) -> tuple[list[_Row], list[dict[str, Any]]]:
    rows, rejected = [], []
    for index, label in enumerate(labels):
        try:
            rows.append(_parse_row(label, now_us))
        except MlpdError as error:
            shape = error.to_dict()
            rejected.append({"index": index} | {k: shape[k] for k in ("code", "message", "hint")})
    return rows, rejected


def _parse_row(row: Any, now_us: int) -> _Row:
    if not isinstance(row, Mapping) or not row.keys() <= {"prediction_id", "label", "label_time"}:
        raise ValidationError(
            "a label is an object with prediction_id, label and, optionally, label_time",
            code="invalid_label",
        )
    key = prediction_key(row.get("prediction_id"))
    label = row.get("label")
    if isinstance(label, bool | int | float) and np.isfinite(float(label)):
        time = row.get("label_time")
        time_us = None if time is None else int(parse_time(time, "label_time"))
        if time_us is not None and time_us > now_us:
            raise ValidationError("label_time lies in the future", code="future_label")
        return _Row(key, row["prediction_id"], float(label), time_us)
    raise ValidationError(f"label {label!r} is not a finite number or bool", code="invalid_label")


def _write(txn: WriteTransaction, rows: Sequence[_Row], orphans_max: int) -> _Written:
    times = [txn.known_us if row.time_us is None else row.time_us for row in rows]
    append(
        txn,
        kind=RecordKind.FEEDBACK,
        source=FEEDBACK_SOURCE,
        columns={
            "prediction_id": column_of(DType.STRING, [row.prediction_id for row in rows]),
            "label": column_of(DType.FLOAT64, [row.label for row in rows]),
        },
        event_us=np.array(times, np.int64),
    )
    done, new_orphans = _Written(), 0
    for row, time_us in zip(rows, times, strict=True):
        stored = txn.get(Table.LABELS, row.key)
        current = None if stored is None else Label.decode(stored)
        if current is not None and (time_us < current.time_us or row.label == current.label):
            if time_us > current.time_us:  # confirmed: an older revision must not win any more
                confirmed = Label(current.label, time_us, current.revisions)
                txn.put(Table.LABELS, row.key, confirmed.encode())
            done.stale += 1
            continue
        revisions = 0 if current is None else current.revisions + 1
        txn.put(Table.LABELS, row.key, Label(row.label, time_us, revisions).encode())
        served = txn.get(Table.PREDICTIONS, row.key)
        if served is None:
            done.orphans += 1
            if current is None:
                txn.put(Table.ORPHANS, arrival_key(txn.known_us, row.key), b"")
                new_orphans += 1
            continue
        old = None if current is None else current.label
        prediction = decode_prediction(row.key, served)
        done.changes.append(LabelChange(prediction, old, row.label, time_us))
    # At most one goes for one that comes: the operation stays as large as the request.
    excess = min(new_orphans, txn.count(Table.ORPHANS) - orphans_max)
    done.dropped = drop_orphans(txn, oldest_keys(txn, Table.ORPHANS, excess))
    return done
