"""Rebuild: brings lost records of the registry back into LMDB, from the journal and the tags."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mlpd.core.errors import ConflictError
from mlpd.core.names import TimeUs
from mlpd.registry import rows
from mlpd.registry.exports import export
from mlpd.registry.layout import Layout
from mlpd.registry.manifest import parse_index
from mlpd.registry.records import Cause, Event, EventKind, ModelVersion, VersionState
from mlpd.registry.versions import VersionDamagedError, VersionStore
from mlpd.storage.environment import Environment, WriteTransaction
from mlpd.storage.writer import Writer


def rebuild(env: Environment, writer: Writer, root: Path) -> int:
    """Add the records that LMDB lacks and return how many events that took; blocking.

    The registry must not be open.  The journal gives everything back.  A version that index.json
    alone names comes back with its number, state and time, quarantined if its manifest is damaged;
    where aliases pointed, only the journal knows.  Raises ConflictError: `registry_diverged` when
    LMDB, journal and tags contradict each other, `journal_damaged`; nothing is written then.
    """
    layout = Layout(root)
    layout.prepare()
    journal = [*layout.journal.read()]
    tagged = [_verified(layout, version) for version in parse_index(layout.read("index.json"))]
    count = writer.write_blocking(lambda txn: _replay(txn, journal) + _adopt(txn, tagged))
    export(env, layout)
    return count


def _replay(txn: WriteTransaction, journal: Sequence[Event]) -> int:
    known = [*rows.events(txn, after=0)]
    for event, row in zip(journal, known, strict=False):
        if event.encode() != row:
            raise _diverged(f"event {event.sequence} differs between LMDB and the journal")
    for event in journal[len(known) :]:
        rows.apply_event(txn, event)
    return max(0, len(journal) - len(known))


def _adopt(txn: WriteTransaction, tagged: Sequence[ModelVersion]) -> int:
    known = {version.reference: version for version in rows.all_versions(txn)}
    lost = [version for version in tagged if version.reference not in known]
    for version in tagged:
        if version.digest != known.get(version.reference, version).digest:
            raise _diverged(f"the tag {version.tag} points at another manifest than LMDB")
    for version in sorted(lost, key=lambda version: (version.name, version.number)):
        rows.apply_event(txn, _registration(rows.last_sequence(txn) + 1, version))
    return len(lost)


def _registration(sequence: int, version: ModelVersion) -> Event:
    return Event(
        sequence=sequence,
        time_us=TimeUs(version.created_us),
        kind=EventKind.REGISTERED,
        model=version.name,
        cause=Cause("mlpd", version.reason),
        body={
            "version": version.number,
            "digest": version.digest,
            "size_bytes": version.size_bytes,
            "state": version.state,
        },
    )


def _verified(layout: Layout, version: ModelVersion) -> ModelVersion:
    try:
        manifest = VersionStore(layout.blobs).load_manifest(version)
    except VersionDamagedError as error:
        return replace(version, state=VersionState.QUARANTINED, reason=error.message)
    if manifest.name != version.name:
        raise _diverged(f"the tag {version.tag} points at a manifest of model {manifest.name!r}")
    return replace(version, reason="rebuilt from index.json")


def _diverged(reason: str) -> ConflictError:
    return ConflictError(
        f"the registry contradicts itself: {reason}",
        code="registry_diverged",
        hint="Restore lmdb and registry from one backup.",
    )
