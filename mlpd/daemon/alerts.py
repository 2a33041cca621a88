"""Verb alerts: looks at what is measured, keeps states and silences, wakes the sinks.

States and silences are rows of the MONITORING table.  A change that can't be stored, on a full
disk, holds in memory, is told, and is stored at the first look that finds room.
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import msgpack

from mlpd.core.config import AlertsConfig
from mlpd.core.errors import MlpdError
from mlpd.core.matchers import check_matchers
from mlpd.core.time import DAY_US, Clock
from mlpd.daemon.deliveries import Delivery
from mlpd.daemon.looks import Look, StandstillLook
from mlpd.daemon.sinks import Sink, check_sink
from mlpd.monitoring.alerts import ALERTNAME, SEVERITY, Alert, AlertTable, State, fingerprint
from mlpd.monitoring.messages import TEST, describe_alert
from mlpd.monitoring.silences import Silence, Silences, make_silence
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.transactions import Snapshot, WriteTransaction
from mlpd.storage.writer import Writer

LOOK_S, LOOK_S_MIN = 5.0, 0.1
LOOK_SHARE = 0.15
"""Of the least freshness period: with the threshold of 0.8 a stalled source is told within one."""

RESOLVED_KEPT_US = DAY_US
"""A resolved alert is shown for so long, and until every sink knows of it."""

SYNC_S = 60.0
"""How long a watermark stands still is stored this often."""

_ALERT, _SILENCE, _WATERMARKS = b"a", b"s", b"w"
_log = logging.getLogger("mlpd.alerts")

_Rows = dict[bytes, bytes | None]
"""Rows of the MONITORING table to put, or to delete where the value is None."""


class Alerts:
    """The alerts of one daemon; `start` and `stop` once each, everything on the loop."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        sinks: Sequence[Sink],
        config: AlertsConfig,
        clock: Clock,
    ) -> None:
        self._writer = writer
        self._clock = clock
        self._sinks = sinks
        with environment.snapshot() as snapshot:
            self._table = AlertTable(map(Alert.decode, _values(snapshot, _ALERT)))
            self._silences = Silences(map(Silence.decode, _values(snapshot, _SILENCE)))
            self.watermarks = _load_watermarks(snapshot)
        self._deliveries = [
            Delivery(
                *(sink, self._table, self._is_muted, self._keep, clock),
                per_minute=config.messages_per_minute,
            )
            for sink in sinks
        ]
        self._looks: Sequence[Look] = ()
        self._standstill: StandstillLook | None = None
        self._unstored: _Rows = {}
        self._task: asyncio.Task[None] | None = None
        self._synced_s = 0.0
        self.failed_looks = 0
        """Looks that raised, since the start."""

    def start(self, looks: Sequence[Look], standstill: StandstillLook | None = None) -> None:
        """Begin to look and to tell; `standstill` is asked for what to keep of it."""
        self._looks, self._standstill = looks, standstill
        for delivery in self._deliveries:
            delivery.start()
        self._task = asyncio.create_task(self._look_forever())

    async def stop(self) -> None:
        """Stop looking and telling; what a sink was not told it is told after the next start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for delivery in self._deliveries:
            await delivery.stop()
        self._keep_standing()
        await self._store()

    async def look(self) -> list[Alert]:
        """Look at everything that is due and return what changed; a failure is logged."""
        changed: dict[str, Alert] = {}
        for look in self._looks:
            try:
                window = await look.look(self._clock())
            except Exception:  # noqa: BLE001 - logged and counted; the other looks go on
                self.failed_looks += 1
                _log.exception("%s could not be measured", ", ".join(sorted(look.names)))
                continue
            if window is not None:
                found = self._table.judge(look.names, window.number, window.measured, self._clock())
                changed |= {alert.fingerprint: alert for alert in found}
        await self._keep([*changed.values(), *self._forget_old()])
        for delivery in self._deliveries:
            delivery.notify()
        return list(changed.values())

    def describe(self) -> dict[str, Any]:
        """Return alerts (firing first), silences and sinks; any thread, 5 us for each alert."""
        now_us = self._clock()
        order = [State.FIRING, State.PENDING, State.RESOLVED]
        alerts = sorted(self._table.all(), key=lambda alert: order.index(alert.state))
        return {
            "alerts": [
                {**describe_alert(alert), "silenced": self._silences.cover(alert.labels, now_us)}
                for alert in alerts
            ],
            "silences": [silence.describe() for silence in self._silences.active(now_us)],
            "sinks": [delivery.describe() for delivery in self._deliveries],
            "refused": self._table.refused,
        }

    async def silence(
        self,
        matchers: Mapping[str, object],
        *,
        lasts_us: int,
        by: str,
        why: str,
        silence_id: str | None = None,
    ) -> dict[str, Any]:
        """Silence alerts from now on; durable on return.  Raises as `make_silence`.

        Those that are over are removed with the same write.  One whose `silence_id` is there
        already is returned as it is; ConflictError(code="known_silence") if it silences others.
        """
        now_us = self._clock()
        found = check_matchers(matchers)
        silence = make_silence(
            found, now_us=now_us, lasts_us=lasts_us, by=by, why=why, silence_id=silence_id
        )
        known = self._silences.find(silence.silence_id, found)
        if known is not None:
            return known.describe()
        self._silences.check_room(now_us)
        ended = self._silences.ended(now_us)
        rows: _Rows = {_silence_key(old): None for old in ended}
        rows[_silence_key(silence)] = silence.encode()
        await self._writer.write(partial(_put, rows=rows))
        for old in ended:
            self._silences.remove(old.silence_id)
        self._silences.add(silence)
        return silence.describe()

    async def unsilence(self, silence_id: str) -> dict[str, Any]:
        """End a silence; what fires is told now.  Raises NotFoundError."""
        silence = self._silences.get(silence_id)
        await self._writer.write(partial(_put, rows={_silence_key(silence): None}))
        self._silences.remove(silence_id)
        for delivery in self._deliveries:
            delivery.notify()
        return silence.describe()

    async def test(self, sink: str | None = None) -> list[dict[str, Any]]:
        """Send a message at once through one sink, or all but training; returns what they made."""
        sinks = [s for s in self._sinks if s.name != "train"]
        if sink is not None:
            sinks = [check_sink(sinks, sink)]
        now_us = self._clock()
        alert = Alert(
            {ALERTNAME: TEST},
            "daemon",
            state=State.FIRING,
            text="mlpd alerts test: nothing is wrong",
            starts_us=now_us,
        )
        return list(await asyncio.gather(*(_try(sink, alert) for sink in sinks)))

    def counts(self) -> dict[tuple[str, str], int]:
        """Return how many alerts there are by name and state."""
        found: dict[tuple[str, str], int] = {}
        for alert in self._table.all():
            key = alert.name, alert.state.value
            found[key] = found.get(key, 0) + 1
        return found

    def notifications(self) -> dict[tuple[str, str], int]:
        """Return how many messages were sent and failed, by sink and result."""
        return {
            (delivery.sink.name, result): count
            for delivery in self._deliveries
            for result, count in (("sent", delivery.sent), ("failed", delivery.failed))
        }

    async def _look_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self.look()
            if loop.time() - self._synced_s > SYNC_S:
                self._synced_s = loop.time()
                self._keep_standing()
                await self._store()
            await asyncio.sleep(self._pause_s())

    def _pause_s(self) -> float:
        """Return the time between two looks: shorter where views promise to be very fresh."""
        if self._standstill is None:
            return LOOK_S
        return max(LOOK_S_MIN, min(LOOK_S, LOOK_SHARE * self._standstill.least_period_s()))

    def _is_muted(self, alert: Alert) -> bool:
        """Whether nobody is to hear that it fires: silenced, or told as something worse."""
        if self._silences.cover(alert.labels, self._clock()):
            return True
        if alert.labels.get(SEVERITY) != "warning":
            return False
        worse = self._table.get(fingerprint({**alert.labels, SEVERITY: "critical"}))
        return worse is not None and worse.state is State.FIRING

    def _forget_old(self) -> list[Alert]:
        """Let go of what is over and known to all; returns the alerts, as they were."""
        before_us = self._clock() - RESOLVED_KEPT_US
        names = [sink.name for sink in self._sinks]
        old = [
            alert
            for alert in self._table.all()
            if alert.state is State.RESOLVED
            and (alert.ends_us or 0) < before_us
            and not any(alert.is_due(name) for name in names)
        ]
        for alert in old:
            self._table.forget(alert.fingerprint)
        return old

    async def _keep(self, changed: Iterable[Alert]) -> None:
        """Store alerts as they are now, and whatever could not be stored before; never raises."""
        for alert in changed:
            held = self._table.get(alert.fingerprint)
            key = _ALERT + alert.fingerprint.encode()
            self._unstored[key] = None if held is None else held.encode()
        await self._store()

    def _keep_standing(self) -> None:
        if self._standstill is not None:
            self._unstored[_WATERMARKS] = msgpack.packb(self._standstill.standing())

    async def _store(self) -> None:
        rows, self._unstored = self._unstored, {}
        if not rows:
            return
        try:
            await self._writer.write(partial(_put, rows=rows))
        except MlpdError as error:
            self._unstored = {**rows, **self._unstored}
            _log.warning("alerts can't be stored, they go on in memory: %s", error.message)
        except BaseException:
            self._unstored = {**rows, **self._unstored}
            raise


def _silence_key(silence: Silence) -> bytes:
    return _SILENCE + silence.silence_id.encode()


async def _try(sink: Sink, alert: Alert) -> dict[str, Any]:
    try:
        await sink.send(alert.group, [alert])
    except MlpdError as error:
        return {"sink": sink.name, "sent": False, "error": error.to_dict()}
    return {"sink": sink.name, "sent": True, "error": None}


def _put(txn: WriteTransaction, *, rows: _Rows) -> None:
    for key, value in rows.items():
        if value is None:
            txn.delete(Table.MONITORING, key)
        else:
            txn.put(Table.MONITORING, key, value)


def _values(snapshot: Snapshot, prefix: bytes) -> list[bytes]:
    end = bytes([prefix[0] + 1])
    return [value for _, value in snapshot.scan(Table.MONITORING, prefix, end)]


def _load_watermarks(snapshot: Snapshot) -> dict[str, tuple[int, float]]:
    stored = snapshot.get(Table.MONITORING, _WATERMARKS)
    if stored is None:
        return {}
    return {source: (mark, stood_s) for source, (mark, stood_s) in msgpack.unpackb(stored).items()}
