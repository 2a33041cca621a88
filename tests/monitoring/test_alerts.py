"""States of alerts: windows, hysteresis, restarts, what is gone, what sinks know."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.monitoring import alerts as module
from mlpd.monitoring.alerts import (
    GONE_AFTER,
    RULES,
    Alert,
    AlertTable,
    Measurement,
    State,
    fingerprint,
    step,
)

CALM, BETWEEN, OVER = 0.5, 0.9, 1.0


def measured(value: float, name: str = "SourceLag", **labels: str) -> Measurement:
    return Measurement({"alertname": name, **labels}, "source a", value, 1.0, f"it is {value}")


class Judge:
    """A table with windows and times that go on by one."""

    def __init__(self, name: str = "SourceLag") -> None:
        self.name = name
        self.table = AlertTable()
        self.window = 0

    def see(self, *values: float) -> list[str]:
        states = []
        for value in values:
            self.window += 1
            one = measured(value, self.name)
            self.table.judge({self.name}, self.window, [one], self.window * 10)
            held = self.table.get(fingerprint(one.labels))
            states.append("ok" if held is None else held.state.value)
        return states

    @property
    def alert(self) -> Alert:
        (alert,) = self.table.all()
        return alert


@pytest.mark.parametrize(
    ("values", "states"),
    [
        ([CALM, CALM], ["ok", "ok"]),
        ([BETWEEN, BETWEEN], ["ok", "ok"]),
        ([OVER, OVER], ["pending", "firing"]),
        ([OVER, CALM, OVER], ["pending", "pending", "firing"]),
        ([OVER, CALM, CALM, CALM, OVER], ["pending", "pending", "pending", "ok", "pending"]),
        ([OVER, CALM, CALM, OVER], ["pending", "pending", "pending", "pending"]),
    ],
)
def test_two_of_three_windows_fire(values: list[float], states: list[str]) -> None:
    assert Judge().see(*values) == states


@pytest.mark.parametrize(
    ("values", "states"),
    [
        ([CALM, CALM, CALM], ["firing", "firing", "resolved"]),
        ([CALM, CALM, BETWEEN, CALM, CALM], ["firing"] * 5),
        ([CALM, CALM, BETWEEN, CALM, CALM, CALM], [*["firing"] * 5, "resolved"]),
        ([CALM, OVER, CALM, CALM, CALM], [*["firing"] * 4, "resolved"]),
        ([0.8] * 9, ["firing"] * 9),  # the bound itself is not under it
        ([CALM] * 3 + [OVER, OVER], ["firing", "firing", "resolved", "pending", "firing"]),
        ([CALM] * 3 + [OVER, *[CALM] * 3], ["firing", "firing", "resolved", *["pending"] * 3,
                                            "resolved"]),
    ],
)  # fmt: skip
def test_three_calm_windows_in_a_row_clear(values: list[float], states: list[str]) -> None:
    judge = Judge()
    assert judge.see(OVER, OVER) == ["pending", "firing"]
    assert judge.see(*values) == states


def test_quality_fires_at_once_and_clears_slowly() -> None:
    assert Judge("FeatureQuality").see(OVER, CALM, CALM, CALM) == [
        *("firing", "firing", "firing", "resolved"),
    ]
    assert Judge("SourceStalled").see(OVER, CALM) == ["firing", "resolved"]


def test_an_episode_has_times_and_revisions() -> None:
    judge = Judge()
    judge.see(OVER, OVER)
    assert (judge.alert.starts_us, judge.alert.ends_us, judge.alert.revision) == (20, None, 1)
    judge.see(CALM, CALM, CALM)
    assert (judge.alert.starts_us, judge.alert.ends_us, judge.alert.revision) == (20, 50, 2)
    judge.see(OVER, OVER)
    assert (judge.alert.starts_us, judge.alert.ends_us, judge.alert.revision) == (70, None, 3)


def test_a_clock_that_jumps_back_moves_no_end_before_its_beginning() -> None:
    table = AlertTable()
    one = measured(OVER, "SourceStalled")
    table.judge({"SourceStalled"}, 1, [one], now_us=1_000)
    table.judge({"SourceStalled"}, 2, [measured(CALM, "SourceStalled")], now_us=10)
    (alert,) = table.all()
    assert (alert.starts_us, alert.ends_us) == (1_000, 1_000)


def test_a_window_counts_once_however_often_it_is_judged() -> None:
    table = AlertTable()
    for _ in range(5):
        table.judge({"SourceLag"}, 7, [measured(OVER)], 1)
    assert [alert.state for alert in table.all()] == [State.PENDING]


def test_what_is_not_measured_stays_then_ends() -> None:
    judge = Judge()
    judge.see(OVER, OVER)
    for window in range(100, 100 + GONE_AFTER - 1):
        assert judge.table.judge({"Other"}, window, [], 1) == []
        judge.table.judge({"SourceLag"}, window, [], 1)
        assert judge.alert.state is State.FIRING
    judge.table.judge({"SourceLag"}, 200, [], 99)
    assert judge.alert.state is State.RESOLVED
    assert judge.alert.text.startswith("no longer measured")


def test_a_pending_alert_that_is_not_measured_is_let_go() -> None:
    judge = Judge()
    judge.see(OVER)
    for window in range(100, 100 + GONE_AFTER):
        judge.table.judge({"SourceLag"}, window, [], 1)
    assert judge.table.all() == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_no_number_was_not_measured(value: float) -> None:
    table = AlertTable()
    table.judge({"SourceLag"}, 1, [measured(value)], 1)
    assert table.all() == []


def test_alerts_beyond_the_limit_are_counted_and_find_room_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "ALERTS_MAX", 2)
    table = AlertTable()
    many = [measured(OVER, source=name) for name in "abc"]
    table.judge({"SourceLag"}, 1, many, 1)
    assert (len(table.all()), table.refused) == (2, 1)
    table.forget(table.all()[0].fingerprint)
    table.judge({"SourceLag"}, 2, many[2:], 1)
    assert {alert.labels["source"] for alert in table.all()} == {"b", "c"}


def test_what_is_ok_and_was_is_not_held() -> None:
    table = AlertTable()
    assert table.judge({"SourceLag"}, 1, [measured(BETWEEN, source=s) for s in "abc"], 1) == []
    assert table.all() == []


def test_the_order_of_labels_is_no_difference() -> None:
    assert fingerprint({"a": "1", "b": "2"}) == fingerprint({"b": "2", "a": "1"})
    assert fingerprint({"a": "1"}) != fingerprint({"a": "2"})


def test_what_a_sink_knows() -> None:
    judge = Judge("SourceStalled")
    judge.see(OVER)
    key = judge.alert.fingerprint
    assert judge.alert.is_due("log")
    judge.table.mark_told(key, "log", judge.alert.revision)
    assert not judge.alert.is_due("log")
    assert judge.alert.is_due("webhook")
    judge.see(CALM)
    assert judge.alert.is_due("log")
    assert judge.alert.knows_of("log")
    assert not judge.alert.knows_of("webhook")  # it never heard of the beginning
    assert judge.table.mark_told("unknown", "log", 1) is None


values = st.sampled_from([CALM, BETWEEN, OVER, 0.0, 3.0])


@given(st.lists(values, max_size=40), st.sampled_from(sorted(RULES)), st.integers(0, 39))
def test_a_restart_anywhere_changes_nothing(
    sequence: list[float], name: str, restart_at: int
) -> None:
    lasting, restarted = Judge(name), Judge(name)
    for at, value in enumerate(sequence):
        if at == restart_at:
            stored = [alert.encode() for alert in restarted.table.all()]
            restarted.table = AlertTable(map(Alert.decode, stored))
        assert lasting.see(value) == restarted.see(value)
    assert lasting.table.all() == restarted.table.all()


@given(st.lists(values, max_size=40), st.sampled_from(sorted(RULES)))
def test_states_agree_with_the_rule_said_plainly(sequence: list[float], name: str) -> None:
    rule, judge = RULES[name], Judge(name)
    states = judge.see(*sequence)
    firing, since = False, 0
    for at, state in enumerate(states):
        recent = sequence[max(since, at - rule.of + 1) : at + 1]
        calm = sequence[max(0, at - rule.clear_after + 1) : at + 1]
        if firing and len(calm) == rule.clear_after and all(v < 0.8 for v in calm):
            firing, since = False, at + 1
        elif not firing and sum(v >= 1.0 for v in recent) >= rule.fire_after:
            firing = True
        assert (state == "firing") == firing


def test_step_is_pure() -> None:
    before: Any = Alert({"alertname": "SourceLag"}, "g")
    after = step(before, measured(OVER), 1, 5)
    assert before == Alert({"alertname": "SourceLag"}, "g")
    assert after.state is State.PENDING
