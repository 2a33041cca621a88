"""Sinks of alerts: the log, Alertmanager, a webhook, a training run."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from mlpd.core.config import AlertsConfig, parse_trigger
from mlpd.core.errors import ConfigurationError, NotFoundError
from mlpd.core.matchers import matches
from mlpd.core.targets import Target, parse_networks, parse_target
from mlpd.core.time import DAY_US, Clock
from mlpd.daemon.outbound import Outbound
from mlpd.daemon.runs import Runs
from mlpd.monitoring.alerts import Alert, State
from mlpd.monitoring.messages import alertmanager_body, sign, summarize, webhook_body
from mlpd.training.runs import RunState

SECRET_BYTES_MIN = 16
TRAIN_EVERY_US = DAY_US
"""A job that an alert began is not begun by another one for so long."""

_LASTS = 4
"""How many times of sending again an alert lives in Alertmanager: as Prometheus has it."""

_JSON = "application/json"
_log = logging.getLogger("mlpd.alerts")


class Sink(Protocol):
    """Takes alerts of one group, or of all where it is not `grouped`."""

    @property
    def name(self) -> str:
        """Its name in the list of sinks, and under which alerts note what it was told."""

    @property
    def grouped(self) -> bool:
        """Whether a message is about one group alone."""

    @property
    def resend_s(self) -> float | None:
        """How often what still fires is to be sent again, None for once."""

    async def send(self, group: str, alerts: Sequence[Alert]) -> None:
        """Take the alerts or raise why not; at least one, and each at least once in a while."""


class LogSink:
    """The daemon's log."""

    name, grouped, resend_s = "log", True, None

    async def send(self, group: str, alerts: Sequence[Alert]) -> None:
        """Write one line."""
        firing = any(alert.state is State.FIRING for alert in alerts)
        _log.log(logging.WARNING if firing else logging.INFO, "%s", summarize(group, alerts))


class AlertmanagerSink:
    """Alertmanager, which groups, silences and routes once more."""

    name, grouped = "alertmanager", False

    def __init__(self, url: Target, outbound: Outbound, resend_us: int, clock: Clock) -> None:
        path = f"{url.path.rstrip('/')}/api/v2/alerts"
        self._target = Target(url.scheme, url.host, url.port, path)
        self._outbound = outbound
        self._lasts_us = _LASTS * resend_us
        self._clock = clock
        self.resend_s: float | None = resend_us / 1e6

    async def send(self, group: str, alerts: Sequence[Alert]) -> None:  # noqa: ARG002 - of all
        """Send what fires and what is over."""
        body = alertmanager_body(alerts, now_us=self._clock(), lasts_us=self._lasts_us)
        await self._outbound.post(self._target, body, _JSON)


class WebhookSink:
    """A receiver of messages in Alertmanager's form, signed if there is a secret."""

    name, grouped, resend_s = "webhook", True, None

    def __init__(self, target: Target, outbound: Outbound, secret: bytes, clock: Clock) -> None:
        self._target = target
        self._outbound = outbound
        self._secret = secret
        self._clock = clock

    async def send(self, group: str, alerts: Sequence[Alert]) -> None:
        """Send one message."""
        body = webhook_body(group, alerts, receiver="mlpd")
        headers: Mapping[str, str] = {}
        if self._secret:
            headers = {"mlpd-signature": sign(self._secret, body, self._clock() // 1_000_000)}
        await self._outbound.post(self._target, body, _JSON, headers)


class TrainSink:
    """Queues a run where an alert begins to fire; which ones is configured."""

    name, grouped, resend_s = "train", True, None

    def __init__(self, triggers: Sequence[str], runs: Callable[[], Runs], clock: Clock) -> None:
        self._triggers = [parse_trigger(text) for text in triggers]
        self._runs = runs
        self._clock = clock

    async def send(self, group: str, alerts: Sequence[Alert]) -> None:  # noqa: ARG002 - one run
        """Queue runs of the jobs that these alerts are to begin; raises as `Runs.enqueue`."""
        firing = [alert for alert in alerts if alert.state is State.FIRING]
        for matchers, job in self._triggers:
            cause = next((a for a in firing if matches(matchers, a.labels)), None)
            if cause is not None and not await asyncio.to_thread(self._is_done, job):
                await self._runs().enqueue(job, trigger=f"alert {cause.name} {cause.fingerprint}")

    def _is_done(self, job: str) -> bool:
        since_us = self._clock() - TRAIN_EVERY_US
        waiting = (RunState.QUEUED, RunState.RUNNING)
        return any(
            run.state in waiting or (run.trigger.startswith("alert ") and run.created_us > since_us)
            for run in self._runs().list()
            if run.job == job
        )


def build_sinks(config: AlertsConfig, runs: Callable[[], Runs], clock: Clock) -> list[Sink]:
    """Return the configured sinks; reads the secret.

    Raises ConfigurationError for a URL, network or secret that can't be used.
    """
    outbound = Outbound(parse_networks(config.private_networks, "[alerts] private_networks"))
    sinks: list[Sink] = [LogSink()]
    if config.alertmanager_url:
        target = parse_target(config.alertmanager_url, config.targets, "[alerts] alertmanager_url")
        sinks.append(AlertmanagerSink(target, outbound, config.resend_us, clock))
    if config.webhook_url:
        target = parse_target(config.webhook_url, config.targets, "[alerts] webhook_url")
        sinks.append(WebhookSink(target, outbound, _read_secret(config), clock))
    if config.train:
        sinks.append(TrainSink(config.train, runs, clock))
    return sinks


def check_sink(sinks: Sequence[Sink], name: str) -> Sink:
    """Return the sink of this name; raises NotFoundError(code="unknown_sink")."""
    for sink in sinks:
        if sink.name == name:
            return sink
    raise NotFoundError(
        f"there is no sink {name!r}",
        code="unknown_sink",
        hint=f"Configured: {', '.join(sink.name for sink in sinks)}; see [alerts].",
    )


def _read_secret(config: AlertsConfig) -> bytes:
    if not config.webhook_secret_file:
        return b""
    try:
        secret = Path(config.webhook_secret_file).read_bytes().strip()
    except OSError as error:
        raise ConfigurationError(
            f"[alerts] webhook_secret_file {config.webhook_secret_file}: {error.strerror}",
            code="secret_unreadable",
        ) from None
    if len(secret) < SECRET_BYTES_MIN:
        raise ConfigurationError(
            f"the secret in {config.webhook_secret_file} has {len(secret)} bytes",
            code="secret_too_short",
            hint=f"Take at least {SECRET_BYTES_MIN} random ones: openssl rand -hex 32.",
        )
    return secret
