"""Deliveries: one task per sink that tells it what it was not told yet, for as long as it takes.

What a sink has taken is kept with each alert, so there is no queue: a sink that is down hears of
the state of things once it is back.  Everything here is on the loop.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mlpd.core.errors import MlpdError
from mlpd.core.time import Clock, format_time
from mlpd.daemon.sinks import Sink
from mlpd.monitoring.alerts import Alert, AlertTable, State

BACKOFF_S, BACKOFF_S_MAX = 1.0, 300.0
ALERTS_PER_MESSAGE = 500
"""Of 400 bytes each; more go into the next message."""

IDLE_S = 3600.0

_log = logging.getLogger("mlpd.alerts")

Stored = Callable[[Sequence[Alert]], Awaitable[None]]
"""Takes alerts that have changed; never raises."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """What one message is to carry."""

    group: str
    alerts: Sequence[Alert]


class Delivery:
    """Keeps one sink up to date; `start` and `stop` once each.

    `is_silenced` tells it of an alert now.  `stored` is called with what the sink has taken.
    """

    def __init__(
        self,
        sink: Sink,
        table: AlertTable,
        is_silenced: Callable[[Alert], bool],
        stored: Stored,
        clock: Clock,
        *,
        per_minute: int,
        backoff_s: float = BACKOFF_S,
    ) -> None:
        self.sink = sink
        self._table = table
        self._is_silenced = is_silenced
        self._stored = stored
        self._clock = clock
        self._limit = _RateLimit(per_minute)
        self._backoff_s = backoff_s
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._resent_s = time.monotonic()
        self._error: MlpdError | None = None
        self._last_us: int | None = None
        self.sent = self.failed = self._failed_in_a_row = 0

    def start(self) -> None:
        """Begin; what is due from before the start goes first."""
        self._wake.set()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Stop at once: what was not taken is told after the next start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def notify(self) -> None:
        """Look at the alerts again."""
        self._wake.set()

    def describe(self) -> dict[str, Any]:
        """Return how the sink is doing; `waiting` alerts are to be told to it."""
        waiting = sum(len(parcel.alerts) for parcel in self._due())
        return {
            "name": self.sink.name,
            "state": "ok" if self._error is None else "failing",
            "waiting": waiting,
            "sent": self.sent,
            "failed": self.failed,
            "last_sent": None if self._last_us is None else format_time(self._last_us),
            "error": None if self._error is None else self._error.to_dict(),
        }

    async def _run(self) -> None:
        while True:
            # Not wait_for: Python 3.11's forgets a cancel that meets the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.sink.resend_s or IDLE_S):
                    await self._wake.wait()
            self._wake.clear()
            await self._pass_over_silenced()
            try:
                await self._catch_up()
            except MlpdError as error:
                await self._fail(error)
            except Exception as error:  # noqa: BLE001 - a bug in one sink must not end its task
                _log.exception("sink %s failed", self.sink.name)
                await self._fail(MlpdError(repr(error), code="internal"))

    async def _catch_up(self) -> None:
        """Send until nothing is due; raises what the sink raises."""
        again = self._resend_is_due()
        while parcels := self._due(again=again):
            for parcel in parcels:
                await self._limit.wait()
                await self.sink.send(parcel.group, parcel.alerts)
                await self._took(parcel)
            if again:
                self._resent_s, again = time.monotonic(), False

    async def _fail(self, error: MlpdError) -> None:
        """Wait for longer after every failure, with jitter; news doesn't shorten it."""
        self.failed += 1
        if self._error is None or self._error.message != error.message:
            _log.warning("sink %s: %s; it is tried again", self.sink.name, error.message)
        self._error = error
        pause_s = min(BACKOFF_S_MAX, self._backoff_s * 2.0 ** min(self._failed_in_a_row, 20))
        self._failed_in_a_row += 1
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
        self._wake.set()

    async def _took(self, parcel: Parcel) -> None:
        self.sent += 1
        self._failed_in_a_row, self._error, self._last_us = 0, None, self._clock()
        await self._mark(parcel.alerts)

    async def _mark(self, alerts: Iterable[Alert]) -> None:
        """Note the revision that was sent: the alert may have a newer one by now."""
        marked = [
            self._table.mark_told(alert.fingerprint, self.sink.name, alert.revision)
            for alert in alerts
            if alert.is_due(self.sink.name)
        ]
        if changed := [alert for alert in marked if alert is not None]:
            await self._stored(changed)

    async def _pass_over_silenced(self) -> None:
        """An episode that was over under a silence is told to nobody who did not know of it."""
        name = self.sink.name
        await self._mark(
            alert
            for alert in self._table.all()
            if alert.is_due(name)
            and alert.state is not State.FIRING
            and not alert.knows_of(name)
            and self._is_silenced(alert)
        )

    def _due(self, *, again: bool = False) -> list[Parcel]:
        groups: dict[str, list[Alert]] = {}
        for alert in self._table.all():
            if self._is_due(alert, again=again):
                group = alert.group if self.sink.grouped else ""
                groups.setdefault(group, []).append(alert)
        return [
            Parcel(group, alerts[start : start + ALERTS_PER_MESSAGE])
            for group, alerts in groups.items()
            for start in range(0, len(alerts), ALERTS_PER_MESSAGE)
        ]

    def _is_due(self, alert: Alert, *, again: bool) -> bool:
        firing, name = alert.state is State.FIRING, self.sink.name
        if not (alert.is_due(name) or (again and firing)):
            return False
        return alert.knows_of(name) or not self._is_silenced(alert)

    def _resend_is_due(self) -> bool:
        every_s = self.sink.resend_s
        return every_s is not None and time.monotonic() - self._resent_s >= every_s


class _RateLimit:
    """A bucket of one minute's messages that fills up all the time."""

    def __init__(self, per_minute: int) -> None:
        self._full = float(per_minute)
        self._left = self._full
        self._at_s = time.monotonic()

    async def wait(self) -> None:
        """Return once there is room for one more."""
        while True:
            now_s = time.monotonic()
            self._left = min(self._full, self._left + (now_s - self._at_s) * self._full / 60.0)
            self._at_s = now_s
            if self._left >= 1.0:
                self._left -= 1.0
                return
            await asyncio.sleep((1.0 - self._left) * 60.0 / self._full)
