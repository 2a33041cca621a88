"""Configuration: TOML into frozen dataclasses, checked once at start; unknown keys are errors.

The defaults live here; `conf/default.toml` shows them with comments, and a test holds both equal.
"""

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mlpd.core.errors import ConfigurationError, MlpdError
from mlpd.core.time import DAY_US, MINUTE_US, SECOND_US, format_duration, parse_duration

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
    drain_timeout_us: int = 10 * SECOND_US
    """How long a graceful stop waits for requests under way."""


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


@dataclass(frozen=True, slots=True)
class PredictionsConfig:
    """`[predictions]`: how long served rows and their labels are kept."""

    retention_us: int = 180 * DAY_US
    """Since the row was served, whatever moment it was served as of."""
    orphans_max: int = 100_000
    """Labels that wait for their prediction; the oldest are dropped and counted."""
    orphan_retention_us: int = 7 * DAY_US


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
    nice: int = 10
    """Niceness of the child: serving goes first."""


@dataclass(frozen=True, slots=True)
class MonitoringConfig:
    """`[monitoring]`: live counts, drift, the consistency audit."""

    series_max: int = 10_000


@dataclass(frozen=True, slots=True)
class Config:
    """All settings of a daemon."""

    server: ServerConfig = field(default_factory=ServerConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    predictions: PredictionsConfig = field(default_factory=PredictionsConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)


_SECTIONS: dict[str, type[Any]] = {
    "server": ServerConfig,
    "storage": StorageConfig,
    "serving": ServingConfig,
    "predictions": PredictionsConfig,
    "training": TrainingConfig,
    "monitoring": MonitoringConfig,
}
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
        try:
            return parse_duration(value, where)
        except MlpdError as error:
            raise ConfigurationError(error.message, hint=error.hint) from None
    if spec.type == tuple[str, ...]:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise ConfigurationError(f"{where} must be a list of texts, got {value!r}")
    if type(value) is not spec.type:
        kind = getattr(spec.type, "__name__", spec.type)
        raise ConfigurationError(f"{where} must be {kind}, got {value!r}")
    return value


def _check_ranges(section: Any, where: str) -> None:
    for spec in dataclasses.fields(section):
        value = getattr(section, spec.name)
        least = 0 if spec.name in ("port", "nice") else 1
        if spec.type is int and value < least:
            raise ConfigurationError(f"{where}: {spec.name!r} must be at least {least}")
    if isinstance(section, ServerConfig):
        _check_server(section)


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


def _unknown(where: str, what: str, known: Mapping[str, Any]) -> ConfigurationError:
    return ConfigurationError(
        f"{where}: unknown {what}; known: {', '.join(known)}",
        code="unknown_setting",
        hint="Check the spelling; conf/default.toml shows every setting.",
    )
