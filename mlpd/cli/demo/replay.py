"""The replay: a quarter of flights against a running daemon, in order of time, as it happened.

At every minute with scheduled departures: what became known before it (one request, one fsync),
then one prediction request for its flights at that very moment; labels follow in batches.
"""

import time
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from mlpd.cli.demo.timeline import Tick, Timeline
from mlpd.client import Client
from mlpd.core.errors import InternalError

LABELS_PER_REQUEST: Final = 500
"""Labels wait until so many are due, or until an act: a request each would double the requests."""


@dataclass(frozen=True, slots=True)
class Act:
    """Something that a user does when the replay reaches `t_us`, before that minute's events."""

    t_us: int
    run: Callable[[], None]


@dataclass(slots=True)
class Totals:
    """What a replay has sent so far, and the seconds that it waited for answers."""

    ticks: int = 0
    events: int = 0
    predictions: int = 0
    labels: int = 0
    events_s: float = 0.0
    predictions_s: float = 0.0
    labels_s: float = 0.0


@dataclass(slots=True)
class Replay:
    """Plays one timeline once; `totals` may be read while it runs."""

    client: Client
    route: str
    timeline: Timeline
    acts: Iterable[Act] = ()
    on_tick: Callable[[Tick], None] = lambda _: None
    totals: Totals = field(default_factory=Totals)
    _ids: list[str] = field(default_factory=list)

    def run(self) -> Totals:
        """Send everything, then what is known by the time that the last flight has landed."""
        acts = sorted(self.acts, key=lambda act: act.t_us)
        for tick in self.timeline.ticks:
            while acts and acts[0].t_us <= tick.t_us:
                self._send_labels(acts[0].t_us)
                acts.pop(0).run()
            self._play(tick)
            self.on_tick(tick)
        self._finish()
        for act in acts:
            act.run()
        return self.totals

    def _play(self, tick: Tick) -> None:
        self._send_events(tick.t_us)
        self._predict(tick)
        self.totals.ticks += 1
        if self._due_labels(tick.t_us) - self.totals.labels >= LABELS_PER_REQUEST:
            self._send_labels(tick.t_us)

    def _send_events(self, t_us: int) -> None:
        taken = ((stream.source, stream.take(t_us)) for stream in self.timeline.streams)
        batches = {source: columns for source, columns in taken if columns is not None}
        if batches:
            started = time.perf_counter()
            self.client.events.send_many(batches)
            self.totals.events_s += time.perf_counter() - started
            self.totals.events += sum(len(columns["known_at"]) for columns in batches.values())

    def _predict(self, tick: Tick) -> None:
        rows = self.timeline.rows(tick)
        started = time.perf_counter()
        answer = self.client.predict(self.route, rows, at=tick.t_us)
        self.totals.predictions_s += time.perf_counter() - started
        for row in answer["predictions"]:
            if row["prediction_id"] is None:
                raise InternalError(f"a row without a prediction: {row}")
            self._ids.append(str(row["prediction_id"]))
        self.totals.predictions += len(rows)

    def _due_labels(self, t_us: int) -> int:
        """Return how many labels are known at `t_us`."""
        labels, sent = self.timeline.labels, self.totals.labels
        return bisect_right(labels, t_us, sent, key=lambda label: label.time_us)

    def _send_labels(self, t_us: int) -> None:
        due = self._due_labels(t_us)
        started = time.perf_counter()
        for start in range(self.totals.labels, due, LABELS_PER_REQUEST):
            part = self.timeline.labels[start : min(start + LABELS_PER_REQUEST, due)]
            self.client.feedback(
                [
                    {
                        "prediction_id": self._ids[label.flight],
                        "label": label.is_late,
                        "label_time": label.time_us,
                    }
                    for label in part
                ]
            )
            self.totals.labels += len(part)
        self.totals.labels_s += time.perf_counter() - started

    def _finish(self) -> None:
        if self.timeline.labels:
            landed_us = self.timeline.labels[-1].time_us
            self._send_events(landed_us + 1)
            self._send_labels(landed_us)
