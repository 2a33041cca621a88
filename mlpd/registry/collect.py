"""Collection: which versions are surplus, which blobs no version needs, and how both go.

Nothing goes at once.  A surplus version becomes a tombstone; a blob is removed when nothing has
needed it for the grace period, counted from when it was written or its last version was deleted,
whichever came later.  Until then registering the same content again finds it there.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from mlpd.core.errors import ConflictError, StorageFullError, ValidationError
from mlpd.registry import rows
from mlpd.registry.layout import Layout
from mlpd.registry.manifest import referrers_of
from mlpd.registry.records import EventKind, ModelVersion, VersionState
from mlpd.registry.versions import VersionDamagedError, VersionStore
from mlpd.storage.environment import Environment, Snapshot

TRAIL_KEPT = 10
"""Versions that an alias left, newest first, which a collection keeps for rollback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What a collection leaves alone.

    `keep`: the newest versions of each model that stay; None keeps them all.  `grace_us`: what is
    younger, or was needed more lately, stays.  `served`: references that answer requests now.
    """

    now_us: int
    grace_us: int
    keep: int | None = None
    served: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.grace_us < 0 or (self.keep is not None and self.keep < 1):
            raise ValidationError(
                f"a collection keeps at least 1 version and waits at least 0, got keep {self.keep} "
                f"and a grace of {self.grace_us} us",
                code="invalid_policy",
                hint="Without keep no version is deleted, whatever its age.",
            )

    @property
    def before_us(self) -> int:
        """The moment before which something must have become useless."""
        return self.now_us - self.grace_us


@dataclass(frozen=True, slots=True)
class Garbage:
    """A blob that no version needs, since `since_us`."""

    digest: str
    size_bytes: int
    since_us: int


@dataclass(frozen=True, slots=True)
class Collection:
    """What went, or would go: surplus `versions`, `blobs`; `waiting` blobs are within the grace."""

    versions: tuple[ModelVersion, ...]
    blobs: tuple[Garbage, ...]
    waiting: tuple[Garbage, ...]


def find_surplus(snapshot: Snapshot, policy: Policy) -> list[ModelVersion]:
    """Return the versions that `policy` doesn't keep, by name and number.

    Kept are: the newest, younger ones, those that are served, and `rows.held` ones.
    """
    if policy.keep is None:
        return []
    found: list[ModelVersion] = []
    for name in rows.models(snapshot):
        live = [version for version in rows.versions(snapshot, name) if not version.is_deleted]
        held = rows.held(snapshot, name, TRAIL_KEPT)
        found += (
            version
            for version in live[: max(0, len(live) - policy.keep)]
            if version.number not in held
            and version.reference not in policy.served
            and version.created_us < policy.before_us
        )
    return found


def collect_blobs(
    env: Environment, layout: Layout, policy: Policy, *, dry_run: bool
) -> tuple[list[Garbage], list[Garbage]]:
    """Remove the blobs that nothing needs any more; return those, and those within the grace.

    Blocking; nothing is published meanwhile.  Raises ConflictError(code="manifest_unreadable")
    while a version doesn't tell what it needs: then nothing is removed; StorageFullError.
    """
    try:
        with layout.collecting():
            return _collect_alone(env, layout, policy, dry_run=dry_run)
    except OSError as error:
        raise StorageFullError(
            f"blobs could not be read or removed: {error}",
            hint="Mend the disk, then collect again; what is left harms nothing.",
        ) from error


def _collect_alone(
    env: Environment, layout: Layout, policy: Policy, *, dry_run: bool
) -> tuple[list[Garbage], list[Garbage]]:
    with env.snapshot() as snapshot:
        signed = [*rows.all_signed(snapshot)]
        versions = [version for version, _ in signed]
        deleted_us = dict(_deletions(snapshot, versions))
    dead = {v for v in versions if v.is_deleted and v.reference not in policy.served}
    needed = _needed(layout, (v for v in versions if v not in dead))
    for found in referrers_of(entry for entry in signed if not entry[0].is_deleted):
        needed |= found.blobs.keys()  # a signature stays with what it signs, and goes with it
    last_us = _last_needed(layout, [entry for entry in signed if entry[0] in dead], deleted_us)
    garbage = sorted(_unneeded(layout, needed, last_us), key=lambda found: found.since_us)
    gone = [found for found in garbage if found.since_us < policy.before_us]
    if not dry_run:
        layout.blobs.delete(found.digest for found in gone)
    return gone, garbage[len(gone) :]


def _deletions(snapshot: Snapshot, versions: Iterable[ModelVersion]) -> Iterator[tuple[str, int]]:
    """Yield the reference of every tombstone and when it became one."""
    for name in sorted({version.name for version in versions if version.is_deleted}):
        for event in rows.history(snapshot, name):
            if event.kind is EventKind.STATE and event.body["to"] == VersionState.DELETED:
                yield f"{name}@{event.body['version']}", event.time_us


def _needed(layout: Layout, versions: Iterable[ModelVersion]) -> set[str]:
    store, found = VersionStore(layout.blobs), set[str]()
    for version in versions:
        try:
            manifest = store.load_manifest(version)
        except VersionDamagedError as error:
            raise ConflictError(
                f"nothing was removed: {error.message}, so what it needs isn't known",
                code="manifest_unreadable",
                hint=f"Bring its manifest back from a backup, or delete {version.reference}.",
            ) from error
        found |= {version.digest, *(pointer.digest for pointer in manifest.blobs)}
    return found


def _last_needed(
    layout: Layout,
    dead: Iterable[tuple[ModelVersion, Mapping[str, str]]],
    deleted_us: Mapping[str, int],
) -> dict[str, int]:
    """Return when the last of the deleted versions that needed a blob was deleted, by digest."""
    store, found = VersionStore(layout.blobs), dict[str, int]()
    for version, signatures in dead:
        try:
            manifest = store.load_manifest(version)
        except VersionDamagedError:
            continue  # collected in part: the grace of its blobs was over
        digests = [version.digest, *(pointer.digest for pointer in manifest.blobs)]
        for signed in referrers_of([(version, signatures)]):
            digests += signed.blobs
        for digest in digests:
            found[digest] = max(found.get(digest, 0), deleted_us[version.reference])
    return found


def _unneeded(layout: Layout, needed: set[str], last_us: Mapping[str, int]) -> Iterator[Garbage]:
    for digest in layout.blobs:
        if digest not in needed:
            status = layout.blobs.path(digest).stat()
            since_us = max(status.st_mtime_ns // 1000, last_us.get(digest, 0))
            yield Garbage(digest, status.st_size, since_us)
