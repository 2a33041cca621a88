"""Records: what the registry keeps in LMDB, its events, and their keys and bytes in table MODELS.

Every change is an event; the rows of models, versions and aliases are the fold of all events
(`catalog.apply_event`).  docs/formats/registry.md shows keys and values.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from mlpd.core.errors import ValidationError
from mlpd.core.hashing import canonical_json
from mlpd.core.names import check_name
from mlpd.registry.json_values import is_json, is_text
from mlpd.storage.tables import from_u64be, u64be

CHAMPION, CHALLENGER = "champion", "challenger"
"""The alias that a reference without a selector means."""

Selector = int | str
"""A version's number, or an alias."""

MAX_BY_CHARS = 200
MAX_WHY_CHARS = 2_000
MAX_REPORT_BYTES = 64 << 10

_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_NUMBER_LIKE = re.compile(r"v?[0-9]+")


class VersionState(StrEnum):
    """State of a version; DELETED is a tombstone that keeps the number taken for ever."""

    PENDING = "pending"
    READY = "ready"
    ARCHIVED = "archived"
    QUARANTINED = "quarantined"
    DELETED = "deleted"


class EventKind(StrEnum):
    """What an event changes."""

    REGISTERED = "registered"
    STATE = "state"
    ALIAS = "alias"
    PROTECTION = "protection"
    PIN = "pin"
    SIGNED = "signed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelVersion:
    """One version: `digest` and `size_bytes` are its manifest's; `reason` explains its state."""

    name: str
    number: int
    digest: str
    size_bytes: int
    state: VersionState
    created_us: int
    created_by: str
    reason: str

    @property
    def reference(self) -> str:
        """Text that `parse_reference` reads back: `name@3`."""
        return f"{self.name}@{self.number}"

    @property
    def tag(self) -> str:
        """The version's tag in the OCI layout: `name-v3`."""
        return f"{self.name}-v{self.number}"

    @property
    def is_deleted(self) -> bool:
        """Whether this is only a tombstone."""
        return self.state is VersionState.DELETED

    def encode(self) -> bytes:
        """Return the row's bytes: canonical JSON."""
        return canonical_json(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> "ModelVersion":
        """Return the version of a row."""
        form = json.loads(data)
        return cls(**form | {"state": VersionState(form["state"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """A movable name of one version.

    `version` is None once the alias was removed; `trail` holds the versions it left, oldest first,
    where `rollback` goes back to.
    """

    model: str
    alias: str
    version: int | None = None
    protected: bool = False
    changed_us: int = 0
    trail: tuple[int, ...] = ()

    def encode(self) -> bytes:
        """Return the row's bytes: canonical JSON."""
        return canonical_json(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> "Alias":
        """Return the alias of a row."""
        form = json.loads(data)
        return cls(**form | {"trail": tuple(form["trail"])})


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """A model in a list: its versions without tombstones, the newest, where its aliases point."""

    name: str
    version_count: int
    newest: ModelVersion | None
    aliases: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Cause:
    """Who changes something and why, with the gate's report and whether its verdict was overruled.

    `by`: 1 to 200 characters.  `why`: up to 2,000.  `report`: a JSON mapping of at most 64 KiB.
    Raises ValidationError(code="invalid_cause") for anything else.
    """

    by: str
    why: str = ""
    report: Mapping[str, Any] | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if not (is_text(self.by) and 0 < len(self.by) <= MAX_BY_CHARS):
            raise _invalid_cause("by", f"1 to {MAX_BY_CHARS} characters")
        if not (is_text(self.why) and len(self.why) <= MAX_WHY_CHARS):
            raise _invalid_cause("why", f"at most {MAX_WHY_CHARS} characters")
        if self.report is not None and not _is_report(self.report):
            raise _invalid_cause("report", f"a JSON mapping of at most {MAX_REPORT_BYTES} bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One change of the registry: `sequence` is dense from 1, `time_us` its group's arrival time.

    `body` by kind: registered {version, digest, size_bytes, state}; state {version, from, to};
    alias {alias, from, to, rollback}; protection {alias, protected}; pin {version, pinned};
    signed {version, key, signature}.  Versions are numbers, null where there is none.
    """

    sequence: int
    time_us: int
    kind: EventKind
    model: str
    cause: Cause
    body: Mapping[str, Any]

    def encode(self) -> bytes:
        """Return canonical JSON without line breaks: the row's value and the journal's line."""
        return canonical_json(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> "Event":
        """Return the event that `encode` wrote."""
        form = json.loads(data)
        return cls(**form | {"kind": EventKind(form["kind"]), "cause": Cause(**form["cause"])})


@dataclass(frozen=True, slots=True)
class Reference:
    """A model and which of its versions."""

    name: str
    selector: Selector


def parse_reference(text: object) -> Reference:
    """Return the reference in `name@3`, `name@alias` or `name` (its champion).

    Raises ValidationError(code="invalid_name") if either part is malformed.
    """
    name, at, selector = text.partition("@") if isinstance(text, str) else (text, "", "")
    check_name(name, "model")
    return Reference(str(name), parse_selector(selector) if at else CHAMPION)


def parse_selector(text: str) -> Selector:
    """Return the version number (1 to 999,999,999) or alias that `text` names."""
    if _NUMBER.fullmatch(text):
        return int(text)
    return check_alias(text)


def check_alias(alias: object) -> str:
    """Return `alias` if it may name an alias: a valid name that doesn't look like a version."""
    name = check_name(alias, "alias")
    if _NUMBER_LIKE.fullmatch(name):
        raise ValidationError(
            f"alias {name!r} looks like a version number",
            code="invalid_name",
            hint="Choose a name with a letter other than a leading v, for example champion.",
        )
    return name


def model_key(name: str) -> bytes:
    """Return the key of a model's row, whose value is its next version number (u64be)."""
    return b"m" + name.encode()


def version_key(name: str, number: int) -> bytes:
    """Return the key of a version's row; a model's versions sort by number."""
    return version_prefix(name) + u64be(number)


def version_prefix(name: str) -> bytes:
    """Return what the keys of a model's versions begin with."""
    return b"v" + name.encode() + b"\0"


def digest_key(name: str, digest: str) -> bytes:
    """Return the key that leads from a manifest's digest to the live version that has it."""
    return b"d" + name.encode() + b"\0" + bytes.fromhex(digest.removeprefix("sha256:"))


def alias_key(name: str, alias: str) -> bytes:
    """Return the key of an alias's row."""
    return alias_prefix(name) + alias.encode()


def alias_prefix(name: str) -> bytes:
    """Return what the keys of a model's aliases begin with."""
    return b"a" + name.encode() + b"\0"


def pin_key(name: str, number: int) -> bytes:
    """Return the key (with an empty value) that is there while a version is pinned."""
    return pin_prefix(name) + u64be(number)


def pin_prefix(name: str) -> bytes:
    """Return what the keys of a model's pins begin with."""
    return b"p" + name.encode() + b"\0"


def signatures_key(name: str, number: int) -> bytes:
    """Return the key of a version's signatures."""
    return b"s" + name.encode() + b"\0" + u64be(number)


def event_key(sequence: int) -> bytes:
    """Return the key of an event's row."""
    return b"e" + u64be(sequence)


def history_key(name: str, sequence: int) -> bytes:
    """Return the key (with an empty value) that lists an event under its model."""
    return history_prefix(name) + u64be(sequence)


def history_prefix(name: str) -> bytes:
    """Return what the keys of a model's history begin with."""
    return b"h" + name.encode() + b"\0"


def number_of(key: bytes) -> int:
    """Return the number at the end of a key: a sequence, or a version's."""
    return from_u64be(key[-8:])


def prefix_end(prefix: bytes) -> bytes:
    """Return the first key that sorts after everything that begins with `prefix`."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def _is_report(report: object) -> bool:
    if not (isinstance(report, Mapping) and is_json(report)):
        return False
    return len(canonical_json(report)) <= MAX_REPORT_BYTES


def _invalid_cause(name: str, expected: str) -> ValidationError:
    return ValidationError(
        f"the {name!r} of a change takes {expected}",
        code="invalid_cause",
        hint="Say in a few words who changes this and why.",
        details={"field": name},
    )
