"""Configuration: TOML into frozen dataclasses, checked once at start; unknown keys are errors.

The defaults live here; `conf/default.toml` shows them with comments, and a test holds both equal.
"""

import dataclasses
import json
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mlpd.core.errors import ConfigurationError, MlpdError
from mlpd.core.matchers import parse_matchers
from mlpd.core.names import check_name
from mlpd.core.targets import parse_networks, parse_target
from mlpd.core.time import (
    DAY_US,
    HOUR_US,
    MINUTE_US,
    SECOND_US,
    format_duration,
    parse_duration,
)

LEASE_US_MIN = 3 * SECOND_US
"""A follower of an owner that does nothing asks once a second."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """`[server]`: where the daemon listens and what it accepts."""

    host: str = "127.0.0.1"
    port: int = 8700
    """0 picks a free port; the status file tells which."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names that a Host header may carry, against DNS rebinding."""
    body_bytes_max: int = 32 * 1024 * 1024
    slow_request_us: int = SECOND_US
    """A request that took so long is logged, with the time of each step."""
    drain_timeout_us: int = 10 * SECOND_US
    """How long a graceful stop waits for requests under way."""


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """`[limits]`: how long three in four requests of a kind may take before fewer are let in."""

    predict_us: int = SECOND_US // 2
    features_us: int = SECOND_US // 2
    ingest_us: int = SECOND_US


@dataclass(frozen=True, slots=True)
class StorageConfig:
    """`[storage]`: the LMDB environment and the segments."""

    map_bytes: int = 64 * 1024**3
    """Address space reserved for LMDB; the file grows only as it fills."""
    compact_rows: int = 200_000
    """Compact the log into segments once it holds this many rows."""
    compact_interval_us: int = 30 * SECOND_US


@dataclass(frozen=True, slots=True)
class ServingConfig:
    """`[serving]`: prediction."""

    rows_max: int = 10_000
    """Rows in one predict request."""
    queue_rows_max: int = 50_000
    threads: int = 1
    """Threads for requests too large for the loop, and for shadows."""
    prediction_log_rows_max: int = 50_000
    """Served rows waiting for the prediction log; more are dropped and counted."""
    model_bytes_max: int = 1024**3
    """Memory of loaded versions; those that no route refers to are evicted for others."""


@dataclass(frozen=True, slots=True)
class PredictionsConfig:
    """`[predictions]`: where served rows and their labels are kept, and how long."""

    file_rows: int = 100_000
    """Vectors and requests of so many rows go from LMDB into a file; those of a day that is over
    go in any case."""
    retention_us: int = 180 * DAY_US
    """Since the row was served, whatever moment it was served as of."""
    orphans_max: int = 100_000
    """Labels that wait for their prediction; the oldest are dropped and counted."""
    orphan_retention_us: int = 7 * DAY_US
    label_window_us: int = 90 * DAY_US
    """A label whose label_time lies further behind its prediction is late: in the log alone."""


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """`[training]`: the child processes that train."""

    threads: int = 2
    concurrency: int = 1
    """Runs at once."""
    timeout_us: int = 3600 * SECOND_US
    silence_timeout_us: int = 10 * MINUTE_US
    """A run without progress for this long is stopped."""
    memory_bytes_max: int = 8 * 1024**3
    idle: bool = True
    """The child gets the processor time that nobody else wants (on Linux): serving goes first."""
    nice: int = 10
    """Its niceness where it is not `idle`."""


@dataclass(frozen=True, slots=True)
class PluginsConfig:
    """`[plugins]`: trainers beside those that are installed, and what they may start."""

    paths: tuple[str, ...] = ()
    """Python files or packages; each defines `TRAINER` and is called as its file."""
    commands: tuple[str, ...] = ()
    """NAME = PROGRAM ARGUMENT ...: what jobs of the trainer `command` may start, by name."""


@dataclass(frozen=True, slots=True)
class RegistryConfig:
    """`[registry]`: models that come from outside."""

    upload_bytes_max: int = 256 * 1024**2
    """Of one ONNX file or archive."""
    check_timeout_us: int = MINUTE_US
    """The child process that looks at an upload is stopped after this long."""
    check_memory_bytes_max: int = 2 * 1024**3
    trusted_keys: tuple[str, ...] = ()
    """Public keys; if there are any, only versions that one of them signed are served."""


@dataclass(frozen=True, slots=True)
class MonitoringConfig:
    """`[monitoring]`: live counts, drift, the consistency audit."""

    series_max: int = 10_000
    multivariate_us: int = DAY_US
    """How often features are checked together, over as long a time."""
    audit_us: int = 10 * MINUTE_US
    """How often a sample of what was served is recomputed from the log."""
    audit_rows: int = 2_000
    """Rows of a sample at most."""
    audit_cpu_share: float = 0.05
    """Of one processor, at most: an audit that took more is followed by a longer pause."""
    redact: tuple[str, ...] = ()
    """Patterns of columns of which samples of refused rows keep nothing, not even the form."""
    otlp_url: str = ""
    """Where spans of sampled requests go, such as http://127.0.0.1:4318/v1/traces."""
    otlp_networks: tuple[str, ...] = ("127.0.0.0/8", "::1/128")
    """Networks that are not public and may be reached for that."""
    triton_names: bool = False
    """Show what Triton's users have dashboards for by Triton's names as well."""


@dataclass(frozen=True, slots=True)
class AlertsConfig:
    """`[alerts]`: what is worth a message, and where messages go."""

    window_us: int = 5 * MINUTE_US
    """Of ingest, lag, freshness and disk."""
    drift_window_us: int = HOUR_US
    """Of drift and data quality; a multiple of five minutes."""
    quality_share: float = 0.05
    """Least share of rows with a problem."""
    quality_factor: float = 3.0
    """And at least this many times the share of before."""
    slo_objective: float = 0.95
    """Share of served rows that are as fresh as their view promises."""
    performance_drop: float = 0.05
    """AUC below that of training."""
    classifier_auc: float = 0.6
    """Lower end of the AUC of telling an interval's rows from those before; 1 never alerts."""
    disk_share: float = 0.9
    map_share: float = 0.7
    targets: tuple[str, ...] = ()
    """Hosts, or host:port, that messages may go to."""
    private_networks: tuple[str, ...] = ()
    """Networks that are not public and may be reached all the same."""
    alertmanager_url: str = ""
    resend_us: int = MINUTE_US
    """How often Alertmanager hears of what still fires."""
    webhook_url: str = ""
    webhook_secret_file: str = ""
    """Its content, without white space around it, signs messages."""
    train: tuple[str, ...] = ()
    """LABEL=PATTERN ... -> JOB: alerts that begin a training run."""
    messages_per_minute: int = 20
    """To each sink."""


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    """`[replica]`: followers of this daemon, and what it is as one."""

    feed_bytes: int = 1024**3
    """Newest commits that are kept for followers, once there are any."""
    lease_us: int = 0
    """0 s: an owner writes whether its followers are there or not.  More: it stops when one of
    those in its map hasn't been heard of for so long, and none is promoted as if it were lost
    before."""
    max_staleness_us: int = 10 * SECOND_US
    """A follower that is further behind its owner answers no reads that ask for nothing else."""
    lag_alert_us: int = 30 * SECOND_US
    """A follower in the map that is further behind than this is told of."""


@dataclass(frozen=True, slots=True)
class Config:
    """All settings of a daemon."""

    server: ServerConfig = field(default_factory=ServerConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    predictions: PredictionsConfig = field(default_factory=PredictionsConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    plugins: PluginsConfig = field(default_factory=PluginsConfig)
    registry: RegistryConfig = field(default_factory=RegistryConfig)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    alerts: AlertsConfig = field(default_factory=AlertsConfig)
    replica: ReplicaConfig = field(default_factory=ReplicaConfig)


_SECTIONS: dict[str, type[Any]] = {
    "server": ServerConfig,
    "limits": LimitsConfig,
    "storage": StorageConfig,
    "serving": ServingConfig,
    "predictions": PredictionsConfig,
    "training": TrainingConfig,
    "plugins": PluginsConfig,
    "registry": RegistryConfig,
    "monitoring": MonitoringConfig,
    "alerts": AlertsConfig,
    "replica": ReplicaConfig,
}
_MAY_BE_0 = ("port", "nice", "lease_us")
Section = TypeVar("Section")


def load_config(path: Path) -> Config:
    """Return the configuration in the TOML file `path`.

    Raises ConfigurationError naming file, section and key: unreadable, unknown, or out of range.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"the configuration {path} can't be read: {error.strerror}",
            code="configuration_unreadable",
            hint="Check the path, or leave --config away for the defaults.",
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8: {error}") from None
    try:
        return build_config(tomllib.loads(text), str(path))
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not TOML: {error}", code="configuration") from None


def build_config(data: Mapping[str, Any], where: str = "configuration") -> Config:
    """Return the configuration of nested mappings; durations are texts like `30s`."""
    sections: dict[str, Any] = {}
    for name, body in data.items():
        if name not in _SECTIONS:
            raise _unknown(where, f"section [{name}]", _SECTIONS)
        if not isinstance(body, Mapping):
            raise ConfigurationError(f"{where}: [{name}] must be a table")
        sections[name] = _section(_SECTIONS[name], body, f"{where}: [{name}]")
    return Config(**sections)


def format_config(config: Config) -> str:
    """Return TOML that `load_config` reads as the same configuration."""
    lines: list[str] = []
    for name in _SECTIONS:
        section = getattr(config, name)
        lines.append(f"[{name}]")
        for spec in dataclasses.fields(section):
            value = getattr(section, spec.name)
            shown = format_duration(value) if spec.name.endswith("_us") else value
            lines.append(f"{_public(spec.name)} = {json.dumps(shown)}")
        lines.append("")
    return "\n".join(lines)


def with_server(config: Config, *, host: str | None = None, port: int | None = None) -> Config:
    """Return `config` with the command line's host and port, where given."""
    changes = {"host": host, "port": port}
    given = {name: value for name, value in changes.items() if value is not None}
    server = dataclasses.replace(config.server, **given)  # type: ignore[arg-type]  # by name
    _check_ranges(server, "[server]")
    return dataclasses.replace(config, server=server)


def _section(cls: type[Section], body: Mapping[str, Any], where: str) -> Section:
    fields = {_public(f.name): f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # all are
    values = {}
    for key, value in body.items():
        if key not in fields:
            raise _unknown(where, f"key {key!r}", fields)
        values[fields[key].name] = _value(fields[key], value, f"{where}: {key!r}")
    section = cls(**values)
    _check_ranges(section, where)
    return section


def _public(name: str) -> str:
    """Durations are microseconds inside (`_us`) and texts with a unit outside (no suffix)."""
    return name.removesuffix("_us")


def _value(spec: "dataclasses.Field[Any]", value: Any, where: str) -> Any:
    if spec.name.endswith("_us"):
        if spec.name in _MAY_BE_0 and str(value).rstrip("usmhd") == "0":
            return 0
        try:
            return parse_duration(value, where)
        except MlpdError as error:
            raise ConfigurationError(error.message, hint=error.hint) from None
    if spec.type == tuple[str, ...]:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise ConfigurationError(f"{where} must be a list of texts, got {value!r}")
    if spec.type is float and type(value) is int:
        return float(value)
    if type(value) is not spec.type:
        kind = getattr(spec.type, "__name__", spec.type)
        raise ConfigurationError(f"{where} must be {kind}, got {value!r}")
    return value


def _check_ranges(section: Any, where: str) -> None:
    for spec in dataclasses.fields(section):
        value = getattr(section, spec.name)
        least = 0 if spec.name in _MAY_BE_0 else 1
        if spec.type is int and value < least:
            raise ConfigurationError(f"{where}: {spec.name!r} must be at least {least}")
    if isinstance(section, ServerConfig):
        _check_server(section)
    if isinstance(section, AlertsConfig):
        _check_alerts(section, where)
    if isinstance(section, ReplicaConfig) and 0 < section.lease_us < LEASE_US_MIN:
        raise ConfigurationError(f"{where}: 'lease' must be 0s or at least 3s")
    if isinstance(section, PluginsConfig):
        for text in section.commands:
            parse_command(text, where)
    if isinstance(section, MonitoringConfig) and not 0.0 < section.audit_cpu_share <= 1.0:
        raise ConfigurationError(f"{where}: 'audit_cpu_share' must be over 0 and at most 1")


def _check_server(server: ServerConfig) -> None:
    if server.port > 65535:  # noqa: PLR2004 - the last TCP port
        raise ConfigurationError(f"port {server.port} is over 65535")
    if server.host not in LOOPBACK:
        raise ConfigurationError(
            f"host {server.host!r} is not a loopback address",
            code="unsafe_bind",
            hint="Without tokens and TLS the daemon serves this machine only: bind 127.0.0.1 and "
            "put a proxy that authenticates in front.",
        )


def _check_alerts(alerts: AlertsConfig, where: str) -> None:
    for name in ("quality_share", "slo_objective", "performance_drop", "disk_share", "map_share"):
        if not 0.0 < getattr(alerts, name) < 1.0:
            raise ConfigurationError(f"{where}: {name!r} must lie between 0 and 1")
    if not 0.5 < alerts.classifier_auc <= 1.0:  # noqa: PLR2004 - a coin's
        raise ConfigurationError(f"{where}: 'classifier_auc' must be over 0.5 and at most 1")
    if not 1.0 <= alerts.quality_factor < float("inf"):
        raise ConfigurationError(f"{where}: 'quality_factor' must be at least 1")
    if alerts.drift_window_us % (5 * MINUTE_US):
        raise ConfigurationError(f"{where}: 'drift_window' must be a multiple of 5m")
    parse_networks(alerts.private_networks, f"{where}: 'private_networks'")
    for name in ("alertmanager_url", "webhook_url"):
        if url := getattr(alerts, name):
            parse_target(url, alerts.targets, f"{where}: {name!r}")
    for text in alerts.train:
        parse_trigger(text, where)


def parse_trigger(text: str, where: str = "[alerts]") -> tuple[dict[str, str], str]:
    """Return (matchers, job) of one text in `[alerts] train`; raises ConfigurationError."""
    matchers, arrow, job = text.partition("->")
    try:
        if arrow and job.strip():
            return parse_matchers(matchers.split()), job.strip()
        problem = "it is not LABEL=PATTERN ... -> JOB"
    except MlpdError as error:
        problem = error.message
    raise ConfigurationError(f"{where}: 'train' {text!r}: {problem}", code="invalid_trigger")


def parse_command(text: str, where: str = "[plugins]") -> tuple[str, tuple[str, ...]]:
    """Return (name, words) of one text in `[plugins] commands`; raises ConfigurationError."""
    name, equals, line = text.partition("=")
    try:
        words = tuple(shlex.split(line))
        if equals and words:
            return check_name(name.strip(), "command"), words
        problem = "it is not NAME = PROGRAM ARGUMENT ..."
    except ValueError as error:
        problem = str(error)
    except MlpdError as error:
        problem = error.message
    raise ConfigurationError(f"{where}: 'commands' {text!r}: {problem}", code="invalid_command")


def _unknown(where: str, what: str, known: Mapping[str, Any]) -> ConfigurationError:
    return ConfigurationError(
        f"{where}: unknown {what}; known: {', '.join(known)}",
        code="unknown_setting",
        hint="Check the spelling; conf/default.toml shows every setting.",
    )
