"""Rows: reads of the registry's records, and the fold that makes them out of events.

Reads take a snapshot or a write transaction.  `apply_event` is the only place that writes table
MODELS: in the writer thread when something changes, and when `rebuild.rebuild` replays the journal.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from mlpd.core.errors import InternalError, NotFoundError
from mlpd.core.hashing import canonical_json
from mlpd.registry.records import (
    Alias,
    Event,
    EventKind,
    ModelSummary,
    ModelVersion,
    Selector,
    VersionState,
    alias_key,
    alias_prefix,
    digest_key,
    event_key,
    history_key,
    history_prefix,
    model_key,
    number_of,
    pin_key,
    pin_prefix,
    prefix_end,
    signatures_key,
    version_key,
    version_prefix,
)
from mlpd.storage.changes import note
from mlpd.storage.environment import Snapshot, Table, WriteTransaction
from mlpd.storage.tables import from_u64be, u64be

Reader = Snapshot | WriteTransaction

TRAIL_MAX = 100
"""Versions that an alias remembers for rollback; the events keep all of them."""


def get_version(reader: Reader, name: str, selector: Selector) -> ModelVersion:
    """Return a version by number or alias, whatever its state.  2 to 3 point reads, about 10 us.

    Raises NotFoundError: `unknown_model`, `unknown_version`, `unknown_alias`.
    """
    number = selector if isinstance(selector, int) else _aliased(reader, name, selector)
    row = reader.get(Table.MODELS, version_key(name, number)) if 0 < number < 1 << 64 else None
    if row is None:
        require_model(reader, name)
        raise NotFoundError(
            f"model {name!r} has no version {number}",
            code="unknown_version",
            hint=f"Its versions: {_known(str(v.number) for v in versions(reader, name))}.",
        )
    return ModelVersion.decode(row)


def get_alias(reader: Reader, name: str, alias: str) -> Alias:
    """Return an alias; one that never was or was removed has `version` None."""
    row = reader.get(Table.MODELS, alias_key(name, alias))
    return Alias(model=name, alias=alias) if row is None else Alias.decode(row)


def models(reader: Reader) -> list[str]:
    """Return the names of all models that ever had a version, sorted."""
    return [key[1:].decode() for key, _ in _scan(reader, b"m")]


def summarize(reader: Reader, name: str) -> ModelSummary:
    """Return what a list of models shows of one; reads all its versions."""
    live = [version for version in versions(reader, name) if not version.is_deleted]
    pointing = {a.alias: a.version for a in aliases(reader, name) if a.version is not None}
    return ModelSummary(name, len(live), live[-1] if live else None, pointing)


def versions(reader: Reader, name: str) -> Iterator[ModelVersion]:
    """Yield a model's versions by number, tombstones included; nothing for an unknown model."""
    for _, row in _scan(reader, version_prefix(name)):
        yield ModelVersion.decode(row)


def all_versions(reader: Reader) -> Iterator[ModelVersion]:
    """Yield every version of every model, by name and number, tombstones included."""
    for _, row in _scan(reader, b"v"):
        yield ModelVersion.decode(row)


def all_signed(reader: Reader) -> Iterator[tuple[ModelVersion, dict[str, str]]]:
    """Yield every version with its signatures, as `all_versions` does."""
    for version in all_versions(reader):
        yield version, signatures(reader, version)


def aliases(reader: Reader, name: str) -> Iterator[Alias]:
    """Yield a model's aliases by name, removed ones included."""
    for _, row in _scan(reader, alias_prefix(name)):
        yield Alias.decode(row)


def pins(reader: Reader, name: str) -> frozenset[int]:
    """Return the numbers of a model's pinned versions."""
    return frozenset(number_of(key) for key, _ in _scan(reader, pin_prefix(name)))


def signatures(reader: Reader, version: ModelVersion) -> dict[str, str]:
    """Return a version's signatures by public key, both hex."""
    row = reader.get(Table.MODELS, signatures_key(version.name, version.number))
    found: dict[str, str] = {} if row is None else json.loads(row)
    return found


def held(reader: Reader, name: str, trail_kept: int) -> frozenset[int]:
    """Return the versions that are pinned, under an alias, or among the last that an alias left."""
    found = set(pins(reader, name))
    for alias in aliases(reader, name):
        found.update(alias.trail[-trail_kept:])
        if alias.version is not None:
            found.add(alias.version)
    return frozenset(found)


def last_sequence(reader: Reader) -> int:
    """Return the newest event's sequence, 0 before the first."""
    for key, _ in reader.scan(Table.MODELS, b"e", b"f", reverse=True):
        return number_of(key)
    return 0


def get_event(reader: Reader, sequence: int) -> bytes | None:
    """Return an event's bytes, or None."""
    return reader.get(Table.MODELS, event_key(sequence))


def events(reader: Reader, after: int) -> Iterator[bytes]:
    """Yield the bytes of all events with a sequence over `after`, in order."""
    for _, row in reader.scan(Table.MODELS, event_key(after + 1), b"f"):
        yield row


def history(reader: Reader, name: str) -> Iterator[Event]:
    """Yield a model's events, newest first."""
    prefix = history_prefix(name)
    for key, _ in reader.scan(Table.MODELS, prefix, prefix_end(prefix), reverse=True):
        row = get_event(reader, number_of(key))
        if row is None:
            raise InternalError(f"event {number_of(key)} of model {name!r} is missing")
        yield Event.decode(row)


def find_digest(reader: Reader, name: str, digest: str) -> ModelVersion | None:
    """Return the version of `name` with this manifest, unless it is quarantined or deleted."""
    number = reader.get(Table.MODELS, digest_key(name, digest))
    return None if number is None else get_version(reader, name, from_u64be(number))


def next_number(reader: Reader, name: str) -> int:
    """Return the number that the model's next version gets."""
    row = reader.get(Table.MODELS, model_key(name))
    return 1 if row is None else from_u64be(row)


def require_model(reader: Reader, name: str) -> None:
    """Raise NotFoundError(code="unknown_model") unless `name` ever had a version."""
    if reader.get(Table.MODELS, model_key(name)) is None:
        raise NotFoundError(
            f"unknown model {name!r}",
            code="unknown_model",
            hint=f"Known models: {_known(models(reader))}.",
        )


def apply_event(txn: WriteTransaction, event: Event) -> None:
    """Store an event and fold it into the rows: the only place that writes table MODELS."""
    expected = last_sequence(txn) + 1
    if event.sequence != expected:
        raise InternalError(f"event {event.sequence} can't follow event {expected - 1}")
    _FOLDS[event.kind](txn, event)
    txn.put(Table.MODELS, event_key(event.sequence), event.encode())
    note(txn, Table.MODELS, event_key(event.sequence))
    txn.put(Table.MODELS, history_key(event.model, event.sequence), b"")


def _fold_registered(txn: WriteTransaction, event: Event) -> None:
    version = ModelVersion(
        name=event.model,
        number=event.body["version"],
        digest=event.body["digest"],
        size_bytes=event.body["size_bytes"],
        state=VersionState(event.body["state"]),
        created_us=event.time_us,
        created_by=event.cause.by,
        reason=event.cause.why,
    )
    following = max(version.number + 1, next_number(txn, version.name))
    txn.put(Table.MODELS, model_key(version.name), u64be(following))
    txn.put(Table.MODELS, version_key(version.name, version.number), version.encode())
    if version.state is not VersionState.QUARANTINED:
        txn.put(Table.MODELS, digest_key(version.name, version.digest), u64be(version.number))


def _fold_state(txn: WriteTransaction, event: Event) -> None:
    before = get_version(txn, event.model, event.body["version"])
    state = VersionState(event.body["to"])
    after = replace(before, state=state, reason=event.cause.why)
    txn.put(Table.MODELS, version_key(after.name, after.number), after.encode())
    key = digest_key(after.name, after.digest)
    if state in (VersionState.QUARANTINED, VersionState.DELETED):
        # The same content registered anew is then a new version.
        if txn.get(Table.MODELS, key) == u64be(after.number):
            txn.delete(Table.MODELS, key)
    elif txn.get(Table.MODELS, key) is None:
        txn.put(Table.MODELS, key, u64be(after.number))


def _fold_alias(txn: WriteTransaction, event: Event) -> None:
    before = get_alias(txn, event.model, event.body["alias"])
    to, left, trail = event.body["to"], before.version, before.trail
    if event.body["rollback"]:
        # Everything newer than where it goes back to is forgotten: a second rollback goes on.
        trail = trail[: len(trail) - 1 - trail[::-1].index(to)]
    elif left is not None:
        trail = (*trail, left)[-TRAIL_MAX:]
    _put_alias(txn, replace(before, version=to, trail=trail, changed_us=event.time_us))


def _fold_protection(txn: WriteTransaction, event: Event) -> None:
    before = get_alias(txn, event.model, event.body["alias"])
    _put_alias(txn, replace(before, protected=event.body["protected"]))


def _fold_pin(txn: WriteTransaction, event: Event) -> None:
    key = pin_key(event.model, event.body["version"])
    if event.body["pinned"]:
        txn.put(Table.MODELS, key, b"")
    else:
        txn.delete(Table.MODELS, key)


def _fold_signed(txn: WriteTransaction, event: Event) -> None:
    version = get_version(txn, event.model, event.body["version"])
    found = signatures(txn, version) | {event.body["key"]: event.body["signature"]}
    key = signatures_key(version.name, version.number)
    txn.put(Table.MODELS, key, canonical_json(found))


def _put_alias(txn: WriteTransaction, alias: Alias) -> None:
    txn.put(Table.MODELS, alias_key(alias.model, alias.alias), alias.encode())


_FOLDS: Mapping[EventKind, Callable[[WriteTransaction, Event], None]] = {
    EventKind.REGISTERED: _fold_registered,
    EventKind.STATE: _fold_state,
    EventKind.ALIAS: _fold_alias,
    EventKind.PROTECTION: _fold_protection,
    EventKind.PIN: _fold_pin,
    EventKind.SIGNED: _fold_signed,
}


def _aliased(reader: Reader, name: str, alias: str) -> int:
    number = get_alias(reader, name, alias).version
    if number is not None:
        return number
    require_model(reader, name)
    known = _known(a.alias for a in aliases(reader, name) if a.version is not None)
    raise NotFoundError(
        f"model {name!r} has no alias {alias!r}",
        code="unknown_alias",
        hint=f"Its aliases: {known}.",
    )


def _scan(reader: Reader, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    return reader.scan(Table.MODELS, prefix, prefix_end(prefix))


def _known(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
