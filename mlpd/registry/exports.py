"""Exports: journal and index.json, which follow LMDB after every change and at every start."""

from mlpd.core.errors import ConflictError
from mlpd.registry import rows
from mlpd.registry.layout import Layout
from mlpd.registry.manifest import build_index, parse_index, referrers_of
from mlpd.registry.records import Event, EventKind, ModelVersion
from mlpd.storage.environment import Environment

_TAGGED = (EventKind.REGISTERED, EventKind.STATE, EventKind.SIGNED)
"""Events that change index.json."""


def export(env: Environment, layout: Layout, *, changes_only: bool = False) -> None:
    """Bring journal and index.json up to LMDB, durably; blocking, from any thread.

    About 25 us per version of the registry; with `changes_only` index.json isn't looked at when
    no version changed since the last export.  The snapshot is taken under the layout's lock, so
    that a later export never writes an older state over a newer one.  Raises
    ConflictError(code="registry_behind_journal").
    """
    with layout.lock(), layout.publishing():  # no collection takes a referrer away meanwhile
        with env.snapshot() as snapshot:
            events = [*rows.events(snapshot, after=layout.journal.sequence)]
            tags_changed = not changes_only or any(map(_changes_tags, events))
            signed = [*rows.all_signed(snapshot)] if tags_changed else None
        # The journal comes last: while it lags, the index is known to lag too.
        if signed is not None:
            _write_referrers(layout, signed, only_missing=changes_only)
            layout.write_index(build_index(signed))
        layout.journal.follow(events)


def _write_referrers(
    layout: Layout, signed: list[tuple[ModelVersion, dict[str, str]]], *, only_missing: bool
) -> None:
    """Store what refers to signed versions, before index.json points at it; damage is mended."""
    live = [entry for entry in signed if not entry[0].is_deleted]
    for found in referrers_of(live):
        for digest, data in found.blobs.items():
            if not (layout.blobs.exists(digest) if only_missing else layout.blobs.holds(data)):
                layout.blobs.put(data)


def _changes_tags(event: bytes) -> bool:
    return Event.decode(event).kind in _TAGGED


def require_records(env: Environment, layout: Layout) -> None:
    """Raise ConflictError(code="registry_behind_index") if LMDB lacks a version that is tagged.

    Called before the first export: it would take the tags away, and with them what
    `rebuild.rebuild` needs when the journal is lost too.
    """
    tagged = {(v.tag, v.digest) for v in parse_index(layout.read("index.json"))}
    with env.snapshot() as snapshot:
        known = {(v.tag, v.digest) for v in rows.all_versions(snapshot)}
    lost = sorted(tag for tag, _ in tagged - known)
    if lost:
        raise ConflictError(
            f"LMDB has no record of {len(lost)} tagged versions in {layout.root}, "
            f"for example {lost[0]}",
            code="registry_behind_index",
            hint="Restore the lmdb directory that belongs to this registry, or bring its records "
            "back: mlpd fsck --repair.",
        )
