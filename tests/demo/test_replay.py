from typing import Any

import pytest

from mlpd.cli.demo.replay import Act, Replay
from mlpd.cli.demo.timeline import Label, Stream, Tick, Timeline, Values


class Recorder:
    """Keeps every call in order; a prediction's id is its flight number in order of prediction."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.predicted = 0
        self.events = self

    def send_many(self, batches: dict[str, Values]) -> None:
        self.calls.append(("events", {name: c["known_at"] for name, c in batches.items()}))

    def predict(self, route: str, rows: list[dict[str, Any]], *, at: int) -> dict[str, Any]:
        assert route == "r"
        self.calls.append(("predict", (at, len(rows))))
        first, self.predicted = self.predicted, self.predicted + len(rows)
        return {"predictions": [{"prediction_id": str(first + i)} for i in range(len(rows))]}

    def feedback(self, labels: list[dict[str, Any]]) -> None:
        self.calls.append(("labels", [(x["prediction_id"], x["label"]) for x in labels]))


@pytest.fixture
def timeline() -> Timeline:
    """Three flights at minutes 10, 10 and 20; the second never lands."""
    names = ("carrier", "origin", "dest", "tailnum", "sched_hour", "day_of_week", "distance")
    return Timeline(
        ticks=[Tick(10, 0, 2), Tick(20, 2, 3)],
        flights={name: [0, 1, 2] for name in names},
        labels=[Label(15, 0, True), Label(30, 2, False)],
        streams=[
            Stream("departures", {"known_at": [5, 10, 25, 31]}, known_at_once=False),
            Stream("weather_reports", {"known_at": [10, 20]}, known_at_once=True),
        ],
    )


def play(timeline: Timeline, *acts_us: int) -> list[tuple[str, Any]]:
    target = Recorder()
    acts = [Act(t_us, lambda: target.calls.append(("act", None))) for t_us in acts_us]
    Replay(target, "r", timeline, acts).run()
    return target.calls


def test_events_before_a_prediction_never_include_those_of_its_minute(timeline: Timeline) -> None:
    assert play(timeline) == [
        ("events", {"departures": [5], "weather_reports": [10]}),
        ("predict", (10, 2)),
        ("events", {"departures": [10], "weather_reports": [20]}),
        ("predict", (20, 1)),
        ("events", {"departures": [25]}),
        ("labels", [("0", True), ("2", False)]),
    ]


def test_act_comes_after_the_labels_that_were_due_and_before_its_minute(
    timeline: Timeline,
) -> None:
    calls = play(timeline, 20)
    assert calls.index(("labels", [("0", True)])) < calls.index(("act", None))
    assert calls.index(("act", None)) < calls.index(("predict", (20, 1)))
    assert calls.index(("predict", (10, 2))) < calls.index(("labels", [("0", True)]))


def test_acts_after_the_last_flight_still_happen_at_the_end(timeline: Timeline) -> None:
    assert play(timeline, 1_000)[-1] == ("act", None)


def test_labels_go_out_in_bounded_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlpd.cli.demo.replay.LABELS_PER_REQUEST", 2)
    names = ("carrier", "origin", "dest", "tailnum", "sched_hour", "day_of_week", "distance")
    line = Timeline(
        ticks=[Tick(10, 0, 5), Tick(20, 5, 5)],
        flights={name: [0] * 5 for name in names},
        labels=[Label(11 + i, i, False) for i in range(5)],
        streams=[],
    )
    sent = [len(value) for kind, value in play(line) if kind == "labels"]
    assert sent == [2, 2, 1]


def test_totals_count_what_was_sent(timeline: Timeline) -> None:
    totals = Replay(Recorder(), "r", timeline).run()
    assert (totals.ticks, totals.events, totals.predictions, totals.labels) == (2, 5, 3, 2)
