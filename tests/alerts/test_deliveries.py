"""Deliveries: nothing is lost by a sink that hangs, fails or dies; limits hold."""

import asyncio
import hashlib
import hmac
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from mlpd.core.errors import UnavailableError
from mlpd.core.targets import Target, parse_networks
from mlpd.daemon.deliveries import Delivery
from mlpd.daemon.outbound import Outbound
from mlpd.daemon.sinks import AlertmanagerSink, Sink, WebhookSink
from mlpd.monitoring.alerts import Alert, AlertTable, Measurement
from tests.alerts.receiver import OK, Receiver
from tests.conftest import ManualClock, until

SECRET = b"0123456789abcdef"


@dataclass
class Desk:
    """A table whose alerts are measured by hand, and a sink's delivery."""

    sink: Sink
    clock: ManualClock = field(default_factory=ManualClock)
    table: AlertTable = field(default_factory=AlertTable)
    silenced: set[str] = field(default_factory=set)
    stored: list[Alert] = field(default_factory=list)
    per_minute: int = 6000
    window: int = 0

    def __post_init__(self) -> None:
        self.delivery = Delivery(
            *(self.sink, self.table, self.is_silenced, self.store, self.clock),
            per_minute=self.per_minute,
            backoff_s=0.01,
        )

    def is_silenced(self, alert: Alert) -> bool:
        return alert.labels["source"] in self.silenced

    async def store(self, alerts: Sequence[Alert]) -> None:
        self.stored += alerts

    def see(self, value: float, *sources: str, group: str | None = None) -> None:
        """One more window for stalled sources, which fire and clear at once."""
        self.window += 1
        self.clock.now_us += 1_000_000
        measured = [
            Measurement(
                *({"alertname": "SourceStalled", "source": s}, group or f"source {s}"),
                *(value, 1.0, f"{s} at {value}"),
            )
            for s in sources
        ]
        self.table.judge(set(), self.window, measured, self.clock.now_us)
        self.delivery.notify()

    async def settle(self) -> None:
        await until(lambda: self.delivery.describe()["waiting"] == 0)


def webhook(receiver: Receiver, clock: ManualClock, send_s: float = 10.0) -> WebhookSink:
    outbound = Outbound(parse_networks(["127.0.0.0/8"], "test"), send_s=send_s)
    return WebhookSink(Target("http", "127.0.0.1", receiver.port, "/h"), outbound, SECRET, clock)


@asynccontextmanager
async def desk(sink: Sink, clock: ManualClock, **options: Any) -> AsyncIterator[Desk]:
    found = Desk(sink, clock, **options)
    found.delivery.start()
    try:
        yield found
    finally:
        await found.delivery.stop()


@pytest.fixture
async def hooked(receiver: Receiver) -> AsyncIterator[Desk]:
    clock = ManualClock()
    async with desk(webhook(receiver, clock), clock) as found:
        yield found


def told(receiver: Receiver) -> list[tuple[str, list[tuple[str, str]]]]:
    """(status, [(source, status)]) of each message of a webhook."""
    return [
        (m["status"], [(a["labels"]["source"], a["status"]) for a in m["alerts"]])
        for m in receiver.messages()
    ]


async def test_beginning_and_end_are_told_once(hooked: Desk, receiver: Receiver) -> None:
    hooked.see(2.0, "a")
    await hooked.settle()
    hooked.see(2.0, "a")
    hooked.see(3.0, "a")
    hooked.see(0.0, "a")
    await hooked.settle()
    hooked.see(0.0, "a")
    await hooked.settle()
    assert told(receiver) == [("firing", [("a", "firing")]), ("resolved", [("a", "resolved")])]
    assert [alert.told for alert in hooked.stored] == [{"webhook": 1}, {"webhook": 2}]


async def test_a_message_has_alertmanagers_form_and_our_signature(
    hooked: Desk, receiver: Receiver
) -> None:
    hooked.see(2.0, "a", "b", group="model m")
    await hooked.settle()
    (request,) = receiver.received
    message = request.value
    assert message["version"] == "4"
    assert message["groupKey"] == "model m"
    assert message["receiver"] == "mlpd"
    assert message["truncatedAlerts"] == 0
    assert message["commonLabels"] == {"alertname": "SourceStalled"}
    assert message["groupLabels"] == {"group": "model m"}
    first = message["alerts"][0]
    assert first["startsAt"] == "2023-11-14T22:13:21Z"
    assert first["endsAt"] == "0001-01-01T00:00:00Z"
    assert first["annotations"] == {"summary": "a at 2.0", "value": "2", "threshold": "1"}
    assert len(first["fingerprint"]) == 16
    signature = dict(part.split("=") for part in request.headers["mlpd-signature"].split(","))
    assert signature["t"] == str(hooked.clock() // 1_000_000)
    signed = f"{signature['t']}.".encode() + request.body
    assert signature["v1"] == hmac.new(SECRET, signed, hashlib.sha256).hexdigest()


async def test_one_message_per_group_and_look(hooked: Desk, receiver: Receiver) -> None:
    hooked.see(2.0, *(f"f{i}" for i in range(40)), group="model m")
    await hooked.settle()
    hooked.see(2.0, "x", "y")
    await hooked.settle()
    assert [len(m["alerts"]) for m in receiver.messages()] == [40, 1, 1]


async def test_a_sink_that_fails_is_told_the_newest_state_once_it_is_back(
    hooked: Desk, receiver: Receiver
) -> None:
    receiver.answer = b"HTTP/1.1 503 Busy\r\n\r\n"
    hooked.see(2.0, "a", "b", "c")
    await until(lambda: hooked.delivery.failed >= 3)
    described = hooked.delivery.describe()
    assert (described["state"], described["waiting"], described["sent"]) == ("failing", 3, 0)
    assert described["error"]["code"] == "target_refused"
    hooked.see(0.0, "a")  # came and went while nobody listened
    receiver.received.clear()
    receiver.answer = OK
    await hooked.settle()
    found = {(source, status) for _, alerts in told(receiver) for source, status in alerts}
    # The attempt under way may have told of `a` as it was then; its end is told in any case.
    assert {("a", "resolved"), ("b", "firing"), ("c", "firing")} <= found
    ended = next(a for m in receiver.messages() for a in m["alerts"] if a["status"] == "resolved")
    assert ended["startsAt"] < ended["endsAt"]
    assert hooked.delivery.describe()["state"] == "ok"


async def test_a_sink_that_hangs_is_left_and_tried_again(receiver: Receiver) -> None:
    clock = ManualClock()
    receiver.answer = None
    async with desk(webhook(receiver, clock, send_s=0.05), clock) as hanging:
        hanging.see(2.0, "a")
        await until(lambda: receiver.connections >= 3)
        assert hanging.delivery.describe()["error"]["code"] == "target_timeout"
        receiver.answer = OK
        await hanging.settle()
        assert hanging.stored[-1].told == {"webhook": 1}


async def test_a_change_during_a_send_is_told_afterwards(receiver: Receiver) -> None:
    clock = ManualClock()
    receiver.answer = None
    async with desk(webhook(receiver, clock, send_s=0.5), clock) as found:
        found.see(2.0, "a")
        await until(lambda: receiver.received)
        found.see(0.0, "a")
        receiver.answer = OK
        await found.settle()
    assert told(receiver)[-1] == ("resolved", [("a", "resolved")])


async def test_a_stop_during_a_send_tells_again_after_the_next_start(receiver: Receiver) -> None:
    clock = ManualClock()
    receiver.answer = None
    async with desk(webhook(receiver, clock), clock) as first:
        first.see(2.0, "a")
        await until(lambda: receiver.received)
    receiver.answer = OK
    restored = AlertTable(Alert.decode(alert.encode()) for alert in first.table.all())
    async with desk(webhook(receiver, clock), clock, table=restored) as second:
        await second.settle()
    assert told(receiver) == [("firing", [("a", "firing")])] * 2


async def test_silences_hold_back_beginnings_and_let_ends_pass(
    hooked: Desk, receiver: Receiver
) -> None:
    hooked.see(2.0, "known")
    await hooked.settle()
    hooked.silenced |= {"known", "short", "long"}
    hooked.see(2.0, "known", "short", "long")
    hooked.see(0.0, "known", "short")
    await until(lambda: len(receiver.received) == 2)
    await until(lambda: hooked.table.all()[1].told)  # its end is passed over
    assert told(receiver)[1] == ("resolved", [("known", "resolved")])
    hooked.silenced.clear()
    hooked.delivery.notify()
    await until(lambda: len(receiver.received) == 3)
    await hooked.settle()
    assert told(receiver)[2] == ("firing", [("long", "firing")])
    assert len(receiver.received) == 3


async def test_more_than_the_rate_joins_the_next_message(receiver: Receiver) -> None:
    clock = ManualClock()
    async with desk(webhook(receiver, clock), clock, per_minute=1) as slow:
        slow.see(2.0, "a", group="g")
        await slow.settle()
        for name in "bcd":
            slow.see(2.0, name, group="g")
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        assert len(receiver.received) == 1
        assert slow.delivery.describe()["waiting"] == 3
        slow.delivery._limit._left = 1.0  # as after a minute
        slow.delivery._limit._full = 600.0
    async with desk(webhook(receiver, clock), clock, table=slow.table) as quick:
        await quick.settle()
    assert told(receiver)[1] == ("firing", [("b", "firing"), ("c", "firing"), ("d", "firing")])


async def test_a_bug_in_a_sink_does_not_end_its_task(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        name, grouped, resend_s = "broken", True, None
        calls = 0

        async def send(self, group: str, alerts: Sequence[Alert]) -> None:  # noqa: ARG002
            self.calls += 1
            if self.calls < 3:
                raise KeyError(group)

    async with desk(Broken(), ManualClock()) as found:
        found.see(2.0, "a")
        await found.settle()
        assert found.delivery.failed == 2
    assert "KeyError" in caplog.text


async def test_pauses_grow_with_each_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Down:
        name, grouped, resend_s = "down", True, None

        async def send(self, group: str, alerts: Sequence[Alert]) -> None:  # noqa: ARG002
            raise UnavailableError("down")

    pauses: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        if sys._getframe(1).f_globals["__name__"] == "mlpd.daemon.deliveries":  # asyncio is one
            pauses.append(seconds)
        await sleep(0)

    async with desk(Down(), ManualClock()) as found:
        monkeypatch.setattr("mlpd.daemon.deliveries.asyncio.sleep", note)
        found.see(2.0, "a")
        for _ in range(2000):
            await sleep(0)
            if len(pauses) > 20:
                break
        monkeypatch.undo()
    assert len(pauses) > 20
    for attempt, pause_s in enumerate(pauses[:20]):
        whole_s = min(300.0, 0.01 * 2**attempt)
        assert 0.5 * whole_s <= pause_s <= whole_s


async def test_alertmanager_hears_again_of_what_fires(receiver: Receiver) -> None:
    clock = ManualClock()
    outbound = Outbound(parse_networks(["127.0.0.0/8"], "test"))
    url = Target("http", "127.0.0.1", receiver.port, "/am/")
    sink = AlertmanagerSink(url, outbound, 50_000, clock)
    async with desk(sink, clock) as found:
        found.see(2.0, "a")
        found.see(2.0, "b")
        await until(lambda: len(receiver.received) >= 4)
        found.see(0.0, "a")
        await found.settle()
        count = len(receiver.received)
        await until(lambda: len(receiver.received) >= count + 2)
        now_us = clock()
    assert {request.path for request in receiver.received} == {"/am/api/v2/alerts"}
    last = receiver.messages()[-1]
    assert [alert["labels"]["source"] for alert in last] == ["b"]
    assert last[0]["annotations"]["summary"] == "b at 2.0"
    ends = [a["endsAt"] for m in receiver.messages() for a in m if a["labels"]["source"] == "a"]
    assert len(set(ends[:-1])) >= 1
    assert now_us == clock()
    resolved = [m for m in receiver.messages() if m[0]["labels"]["source"] == "a"][-1]
    assert resolved[0]["startsAt"] < resolved[0]["endsAt"] == "2023-11-14T22:13:23Z"
