"""Spans out: traced requests wait in a bounded queue and go to an OpenTelemetry collector.

No request waits: noting one costs a tuple; a full queue drops it and counts it.
"""

import asyncio
import logging
import socket
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from mlpd import __version__
from mlpd.core.config import MonitoringConfig
from mlpd.core.errors import MlpdError
from mlpd.core.targets import Target, parse_networks, parse_target
from mlpd.core.trace import Span
from mlpd.daemon.outbound import Outbound
from mlpd.monitoring.otlp import Served, encode_spans

QUEUE_MAX = 4_096
"""Requests that wait; each has some ten spans at most and takes 2 KB."""
BATCH_MAX = 512
EVERY_S = 1.0
PAUSE_S_MAX = 60.0
"""Between attempts at a collector that doesn't answer; they double up to this."""

_log = logging.getLogger("mlpd.traces")


class Traces:
    """Exports the spans of sampled requests; `start` and `stop` once each, on the loop.

    Without `[monitoring] otlp_url` nothing is kept.
    """

    def __init__(self, config: MonitoringConfig) -> None:
        self._target: Target | None = None
        if config.otlp_url:
            self._target = parse_otlp(config)
        networks = parse_networks(config.otlp_networks, "[monitoring] otlp_networks")
        self._outbound = Outbound(networks)
        self._waiting: deque[Served] = deque()
        self._task: asyncio.Task[None] | None = None
        self._pause_s = EVERY_S
        self.counts = {"exported": 0, "dropped": 0, "failed": 0}
        """Requests by what became of their spans; `failed` ones were refused by the collector."""

    def start(self) -> None:
        """Begin to export, where a collector is configured."""
        if self._target is not None:
            self._task = asyncio.create_task(self._export_forever())

    async def stop(self) -> None:
        """Export once more what waits, and stop."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        with suppress(MlpdError):
            await self.export()

    def note(self, span: Span, path: str, status: int) -> None:
        """Keep an answered request of a sampled trace; 0.3 us, never waits."""
        if self._target is None:
            return
        if len(self._waiting) >= QUEUE_MAX:
            self.counts["dropped"] += 1
        else:
            self._waiting.append(Served(span, path, status, time.perf_counter()))

    async def export(self) -> None:
        """Send what waits, a batch at a time; raises as `Outbound.post`, the batch waits on."""
        while self._target is not None and self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(BATCH_MAX, len(self._waiting)))]
            try:
                await self._send(self._target, batch)
            except BaseException:
                self._keep(batch)
                raise
            self.counts["exported"] += len(batch)

    async def _send(self, target: Target, batch: Sequence[Served]) -> None:
        resource = {"service.name": "mlpd", "host.name": socket.gethostname()}
        body = await asyncio.to_thread(encode_spans, batch, resource, __version__)
        await self._outbound.post(target, body, "application/json")

    def _keep(self, batch: list[Served]) -> None:
        """Put a batch back in front, as far as there is room: newer ones are not driven out."""
        room = max(0, QUEUE_MAX - len(self._waiting))
        self.counts["dropped"] += max(0, len(batch) - room)
        self._waiting.extendleft(reversed(batch[len(batch) - room :] if room else []))

    async def _export_forever(self) -> None:
        while True:
            await asyncio.sleep(self._pause_s)
            try:
                await self.export()
                self._pause_s = EVERY_S
            except MlpdError as error:
                self.counts["failed"] += 1
                self._pause_s = min(PAUSE_S_MAX, 2 * self._pause_s)
                _log.warning("spans wait: %s", error.message)
            except Exception:  # noqa: BLE001 - traces must not end with one bad batch
                self.counts["failed"] += 1
                _log.exception("spans could not be exported")


def parse_otlp(config: MonitoringConfig) -> Target:
    """Return the collector's target; the setting itself says that its host is meant."""
    url = config.otlp_url
    hosts = [url.partition("//")[2].partition("/")[0].rpartition("@")[2].lower()]
    hosts.append(hosts[0].rpartition(":")[0] or hosts[0])
    return parse_target(url, [*hosts, hosts[1].strip("[]")], "[monitoring] otlp_url")
