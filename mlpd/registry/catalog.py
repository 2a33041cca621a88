"""Catalog: the registry's changes, each checked and made inside one write transaction.

A verb checks everything first, then appends one event, which `rows.apply_event` folds into the
rows.  Verbs run in the writer thread and depend on the transaction alone, so they may run twice.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlpd.core.errors import ConflictError
from mlpd.registry import rows
from mlpd.registry.records import Alias, Cause, Event, EventKind, ModelVersion, VersionState
from mlpd.registry.referrers import SIGNATURES_MAX
from mlpd.storage.environment import WriteTransaction

Expected = int | None | Literal["any"]
"""What an alias must point at for a change to happen: a number, nothing (None), or "any"."""

_STATE = VersionState
NEXT_STATES: Mapping[VersionState, tuple[VersionState, ...]] = {
    _STATE.PENDING: (_STATE.READY, _STATE.ARCHIVED, _STATE.QUARANTINED, _STATE.DELETED),
    _STATE.READY: (_STATE.ARCHIVED, _STATE.QUARANTINED, _STATE.DELETED),
    _STATE.ARCHIVED: (_STATE.READY, _STATE.QUARANTINED, _STATE.DELETED),
    _STATE.QUARANTINED: (_STATE.READY, _STATE.DELETED),
    _STATE.DELETED: (),
}
"""Which states a version may go to from each state."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of `model`, made in `txn` for `cause`; every verb appends at most one event."""

    txn: WriteTransaction
    model: str
    cause: Cause

    def register(self, digest: str, size_bytes: int, state: VersionState) -> ModelVersion:
        """Give a manifest the model's next number, or return the version that already has it."""
        found = rows.find_digest(self.txn, self.model, digest)
        if found is not None:
            return found
        number = rows.next_number(self.txn, self.model)
        body = {"version": number, "digest": digest, "size_bytes": size_bytes, "state": state}
        self._append(EventKind.REGISTERED, body)
        return rows.get_version(self.txn, self.model, number)

    def set_state(self, number: int, state: VersionState) -> ModelVersion:
        """Change a version's state; setting the state that it has changes nothing.

        Raises ConflictError: `invalid_transition`, `version_in_use` when an alias points at a
        version that would be archived or deleted, `version_pinned` when one that would be deleted
        is pinned.
        """
        version = rows.get_version(self.txn, self.model, number)
        if version.state is state:
            return version
        _require_transition(version, state)
        if state in (VersionState.ARCHIVED, VersionState.DELETED):
            self._require_unused(version)
        if state is VersionState.DELETED:
            self._require_unpinned(version)
        self._append(EventKind.STATE, {"version": number, "from": version.state, "to": state})
        return rows.get_version(self.txn, self.model, number)

    def quarantine(self, number: int) -> None:
        """Quarantine a version, unless it was quarantined or deleted meanwhile."""
        version = rows.get_version(self.txn, self.model, number)
        if VersionState.QUARANTINED in NEXT_STATES[version.state]:
            self.set_state(number, VersionState.QUARANTINED)

    def retire(self, number: int, trail_kept: int) -> bool:
        """Delete a version unless it is deleted or `rows.held`; return whether that was done."""
        version = rows.get_version(self.txn, self.model, number)
        if version.is_deleted or number in rows.held(self.txn, self.model, trail_kept):
            return False
        self.set_state(number, VersionState.DELETED)
        return True

    def pin(self, number: int, pinned: bool) -> ModelVersion:
        """Pin a version, so that nothing deletes it, or unpin it.

        Raises ConflictError(code="deleted_version") for a tombstone.
        """
        version = self._existing(number)
        if pinned != (number in rows.pins(self.txn, self.model)):
            self._append(EventKind.PIN, {"version": number, "pinned": pinned})
        return version

    def sign(self, number: int, key: str, signature: str) -> ModelVersion:
        """Attach a signature, which the caller has verified; one per key.

        Raises ConflictError(code="too_many") where 16 other keys have signed.
        """
        version = self._existing(number)
        known = rows.signatures(self.txn, version)
        if len(known.keys() - {key}) >= SIGNATURES_MAX:
            raise ConflictError(
                f"{version.reference} is signed by {SIGNATURES_MAX} keys already",
                code="too_many",
                hint="Signatures stay: sign another version.",
            )
        if known.get(key) != signature:
            body = {"version": number, "key": key, "signature": signature}
            self._append(EventKind.SIGNED, body)
        return version

    def move_alias(self, alias: str, to: int | None, expected: Expected) -> Alias:
        """Point an alias at a ready version, or at nothing; where it points already, do nothing.

        Raises ConflictError: `alias_moved` (it isn't at `expected`), `version_not_ready`,
        `alias_protected` (and no `force`).
        """
        current = self._current(alias, expected)
        if to is not None:
            _require_ready(rows.get_version(self.txn, self.model, to), alias)
        if current.version == to:
            return current
        if current.protected and not self.cause.force:
            raise ConflictError(
                f"alias {self.model}@{alias} is protected",
                code="alias_protected",
                hint="Move it with force (the history records it), or take the protection off.",
            )
        return self._move(current, to, rollback=False)

    def roll_back(self, alias: str, expected: Expected) -> Alias:
        """Point an alias at the newest version it left that is still ready.

        Rolling back twice goes back twice.  Protection doesn't hinder it: it returns to what
        was accepted before.  Raises ConflictError: `alias_moved`, `nothing_to_roll_back_to`.
        """
        current = self._current(alias, expected)
        for number in reversed(current.trail):
            version = rows.get_version(self.txn, self.model, number)
            if version.state is VersionState.READY and number != current.version:
                return self._move(current, number, rollback=True)
        raise ConflictError(
            f"alias {self.model}@{alias} has no earlier version that is ready",
            code="nothing_to_roll_back_to",
            hint="Move the alias to a version of your choice.",
        )

    def protect(self, alias: str, protected: bool) -> Alias:
        """Set or clear an alias's protection; the alias needn't point anywhere yet."""
        if self._current(alias, "any").protected != protected:
            self._append(EventKind.PROTECTION, {"alias": alias, "protected": protected})
        return rows.get_alias(self.txn, self.model, alias)

    def _existing(self, number: int) -> ModelVersion:
        version = rows.get_version(self.txn, self.model, number)
        if version.is_deleted:
            raise ConflictError(
                f"version {version.reference} was deleted",
                code="deleted_version",
                hint="Its content can be registered again, under a new number.",
            )
        return version

    def _current(self, alias: str, expected: Expected) -> Alias:
        rows.require_model(self.txn, self.model)
        current = rows.get_alias(self.txn, self.model, alias)
        if expected not in ("any", current.version):
            raise ConflictError(
                f"alias {self.model}@{alias} is at {current.version}, not at {expected}",
                code="alias_moved",
                hint="Look again and decide anew: somebody else moved it.",
                details={"expected": expected, "current": current.version},
            )
        return current

    def _move(self, current: Alias, to: int | None, *, rollback: bool) -> Alias:
        body = {"alias": current.alias, "from": current.version, "to": to, "rollback": rollback}
        self._append(EventKind.ALIAS, body)
        return rows.get_alias(self.txn, self.model, current.alias)

    def _require_unused(self, version: ModelVersion) -> None:
        aliases = rows.aliases(self.txn, self.model)
        used = [a.alias for a in aliases if a.version == version.number]
        if used:
            raise ConflictError(
                f"version {version.reference} is in use by alias {', '.join(used)}",
                code="version_in_use",
                hint="Move or remove the alias first.",
            )

    def _require_unpinned(self, version: ModelVersion) -> None:
        if version.number in rows.pins(self.txn, self.model):
            raise ConflictError(
                f"version {version.reference} is pinned",
                code="version_pinned",
                hint=f"Unpin it first: mlpd models unpin {version.reference}.",
            )

    def _append(self, kind: EventKind, body: Mapping[str, Any]) -> None:
        event = Event(
            sequence=rows.last_sequence(self.txn) + 1,
            time_us=self.txn.known_us,
            kind=kind,
            model=self.model,
            cause=self.cause,
            body=body,
        )
        rows.apply_event(self.txn, event)


def _require_transition(version: ModelVersion, state: VersionState) -> None:
    allowed = NEXT_STATES[version.state]
    if state not in allowed:
        raise ConflictError(
            f"version {version.reference} is {version.state} and can't become {state}",
            code="invalid_transition",
            hint=f"From here it can become: {', '.join(allowed) or 'nothing'}.",
        )


def _require_ready(version: ModelVersion, alias: str) -> None:
    if version.state is not VersionState.READY:
        raise ConflictError(
            f"alias {version.name}@{alias} can't point at {version.reference}: "
            f"it is {version.state}",
            code="version_not_ready",
            hint="Only ready versions carry aliases.",
        )
