"""Models: the registry as the daemon uses it: register, load, states, aliases, history.

LMDB is the truth.  A version is published in this order: blobs, config, manifest (each a temporary
file, fsync, rename, fsync of the directory), one LMDB transaction that gives the number, then
journal and index.json.  A crash anywhere leaves orphaned blobs at most.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

from mlpd.core.errors import (
    ConflictError,
    MlpdError,
    NotFoundError,
    StorageFullError,
    ValidationError,
)
from mlpd.core.names import check_name
from mlpd.registry import rows
from mlpd.registry.archive import write_archive
from mlpd.registry.catalog import Change, Expected
from mlpd.registry.collect import TRAIL_KEPT, Collection, Policy, collect_blobs, find_surplus
from mlpd.registry.descriptors import Descriptor
from mlpd.registry.exports import export, require_records
from mlpd.registry.following import RegistryFollower
from mlpd.registry.layout import Layout
from mlpd.registry.lineage import Lineage
from mlpd.registry.manifest import LINEAGE_FILE, Manifest
from mlpd.registry.origin import Origin, decode_lineage
from mlpd.registry.records import (
    CHAMPION,
    MAX_WHY_CHARS,
    Alias,
    Cause,
    Event,
    ModelSummary,
    ModelVersion,
    Selector,
    VersionState,
    check_alias,
    parse_reference,
)
from mlpd.registry.signing import TrustPolicy, require_valid
from mlpd.registry.versions import (
    LoadedVersion,
    VersionDamagedError,
    VersionStore,
    check_files,
)
from mlpd.storage.blobs import Blob, BlobStore
from mlpd.storage.environment import Environment, Snapshot, WriteTransaction
from mlpd.storage.writer import Writer

T = TypeVar("T")

logger = logging.getLogger(__name__)

HISTORY_LIMIT = 100


class Registry:
    """All models of one registry directory; open it with `Registry.open`.

    Plain methods are point reads of LMDB, quick enough for the event loop.  `async` methods block
    in a thread of the loop's pool; once begun they end whole, even if their caller is cancelled.
    """

    def __init__(
        self, env: Environment, writer: Writer, layout: Layout, trust: TrustPolicy
    ) -> None:
        self._env = env
        self._writer = writer
        self._layout = layout
        self._store = VersionStore(layout.blobs)
        self._trust = trust
        self.fence: Callable[[WriteTransaction], None] = lambda _: None
        """Called in every transaction that changes something; raises where that isn't allowed."""
        self.mends: Callable[[ModelVersion], bool] = lambda _: False
        """Told of a version that is damaged; whether its files come anew, so that it stays as it
        is: in a registry that follows another one.  Called in threads."""
        self.export_error: str | None = None
        """Why journal and index.json lag behind LMDB, None when they don't."""

    @classmethod
    def open(
        cls, env: Environment, writer: Writer, root: Path, trust: TrustPolicy | None = None
    ) -> "Registry":
        """Return the registry in `root`, made or mended after a crash; blocking, called once.

        `trust`: whose signature a version needs to get an alias, and to be served.
        Raises ConflictError(code="registry_behind_journal") when LMDB lacks events that the
        journal holds: then records were lost, and `rebuild.rebuild` brings them back.
        """
        layout = Layout(root)
        layout.prepare()
        require_records(env, layout)
        layout.blobs.remove_temporary()
        export(env, layout)
        return cls(env, writer, layout, trust or TrustPolicy())

    @property
    def blobs(self) -> BlobStore:
        """The files of all versions, by digest."""
        return self._layout.blobs

    def follower(self) -> RegistryFollower:
        """Return what repeats another registry's events in this one."""
        return RegistryFollower(self._env, self._writer, self._layout)

    async def register(
        self,
        name: str,
        files: Mapping[str, bytes | Path],
        lineage: Mapping[str, Any] | Origin,
        cause: Cause,
        *,
        state: VersionState = VersionState.READY,
    ) -> ModelVersion:
        """Store the files and lineage as the next version of `name`; durable on return.

        `files` by name: `model.onnx` and what else `manifest.media_type_of` admits; paths are
        copied.  The same content again returns the version that has it.  `state` is READY or
        PENDING.  Raises ValidationError (`invalid_name`, `unknown_file`, `missing_file`,
        `invalid_lineage`, `invalid_state`), StorageFullError.
        """
        return await asyncio.to_thread(self._register, name, files, lineage, cause, state)

    async def load(self, name: str, selector: Selector = CHAMPION) -> LoadedVersion:
        """Return a version with all its files in memory, each verified by digest and size.

        About 2 ms per MB.  Pending and archived versions load too, a quarantined one raises
        ConflictError(code="version_quarantined").  A damaged or missing file quarantines the
        version and raises InternalError(code="version_corrupt").
        """
        return await asyncio.to_thread(self._load, name, selector)

    async def load_file(self, name: str, selector: Selector, filename: str) -> bytes:
        """Return one file of a version, verified; NotFoundError(code="unknown_file") if absent."""
        return await asyncio.to_thread(self._load_file, name, selector, filename)

    async def load_lineage(self, name: str, selector: Selector = CHAMPION) -> Lineage | Origin:
        """Return a version's lineage, verified; the origin of one that was not trained here."""
        return decode_lineage(await self.load_file(name, selector, LINEAGE_FILE))

    async def adopt(self, pointer: Descriptor, source: BlobStore, cause: Cause) -> ModelVersion:
        """Register the version that `pointer` leads to in another store, under its own name.

        Its digest stays; where it is here already, that version is returned.  Raises as `register`.
        """
        return await asyncio.to_thread(self._adopt, pointer, source, cause)

    async def export(self, name: str, selector: Selector, file: IO[bytes]) -> ModelVersion:
        """Write a version to `file` as an OCI archive, every blob verified; raises as `load`."""
        return await asyncio.to_thread(self._export, name, selector, file)

    async def load_manifest(self, name: str, selector: Selector = CHAMPION) -> Manifest:
        """Return a version's manifest, verified: which files it has, their digests and sizes."""
        return await asyncio.to_thread(self._load_manifest, name, selector)

    async def set_state(
        self, name: str, number: int, state: VersionState, cause: Cause
    ) -> ModelVersion:
        """Change a version's state.  Out of quarantine it is verified first.

        Raises as `catalog.Change.set_state`, and InternalError(code="version_corrupt").
        """
        return await asyncio.to_thread(self._set_state, name, number, state, cause)

    async def delete(self, name: str, number: int, cause: Cause) -> ModelVersion:
        """Turn a version into a tombstone: its number stays taken, its blobs await collection."""
        return await self.set_state(name, number, VersionState.DELETED, cause)

    async def move_alias(
        self, name: str, alias: str, to: int | None, cause: Cause, *, expected: Expected
    ) -> Alias:
        """Point an alias at a version if it is at `expected`; see `catalog.Change.move_alias`.

        `to` None removes the alias; `expected` "any" moves it from wherever it is.  Raises
        ConflictError(code="signature_required"), too.
        """
        check_alias(alias)
        if to is not None:
            self.require_trusted(self.get(name, to))
        return await self._change_in_thread(
            name, cause, lambda change: change.move_alias(alias, to, expected)
        )

    async def rollback(
        self, name: str, alias: str, cause: Cause, *, expected: Expected = "any"
    ) -> Alias:
        """Point an alias back at the version before; see `catalog.Change.roll_back`."""
        check_alias(alias)
        return await self._change_in_thread(
            name, cause, lambda change: change.roll_back(alias, expected)
        )

    async def protect(self, name: str, alias: str, protected: bool, cause: Cause) -> Alias:
        """Set or clear an alias's protection against moves without `force`."""
        check_alias(alias)
        return await self._change_in_thread(
            name, cause, lambda change: change.protect(alias, protected)
        )

    async def pin(self, name: str, number: int, pinned: bool, cause: Cause) -> ModelVersion:
        """Pin a version, so that nothing deletes it, or unpin it."""
        return await self._change_in_thread(name, cause, lambda change: change.pin(number, pinned))

    async def sign(
        self, name: str, number: int, key: str, signature: str, cause: Cause
    ) -> ModelVersion:
        """Attach a signature over the version's digest, both hex, after verifying it.

        Raises ValidationError(code="invalid_signature" or "invalid_key").
        """
        digest = self.get(name, number).digest
        await asyncio.to_thread(require_valid, key, signature, digest)
        return await self._change_in_thread(
            name, cause, lambda change: change.sign(number, key, signature)
        )

    def signatures(self, version: ModelVersion) -> dict[str, str]:
        """Return a version's signatures by public key."""
        with self._env.snapshot() as snapshot:
            return rows.signatures(snapshot, version)

    def require_trusted(self, version: ModelVersion) -> None:
        """Raise ConflictError(code="signature_required") unless the version may be served."""
        self._trust.check(version, self.signatures(version))

    def is_trusted(self, version: ModelVersion) -> bool:
        """Tell whether the version may be served, as far as signatures go."""
        try:
            self.require_trusted(version)
        except ConflictError:
            return False
        return True

    async def collect(self, policy: Policy, cause: Cause, *, dry_run: bool) -> Collection:
        """Remove what no version needs any more, or tell what would go; see `collect.py`."""
        return await asyncio.to_thread(self._collect, policy, cause, dry_run)

    async def export_index(self) -> None:
        """Bring journal and index.json up to LMDB; raises what hinders it."""
        await asyncio.to_thread(export, self._env, self._layout)
        self.export_error = None

    def get(self, name: str, selector: Selector = CHAMPION) -> ModelVersion:
        """Return a version by number or alias, about 20 us.

        Raises NotFoundError with code `unknown_model`, `unknown_version`, `unknown_alias` or
        `deleted_version`.
        """
        check_name(name, "model")
        if isinstance(selector, str):
            check_name(selector, "alias")
        with self._env.snapshot() as snapshot:
            version = rows.get_version(snapshot, name, selector)
        if version.is_deleted:
            raise NotFoundError(
                f"version {version.reference} was deleted",
                code="deleted_version",
                hint="Its number is not used again; name another version.",
            )
        return version

    def resolve(self, reference: str) -> ModelVersion:
        """Return the version that `name@3`, `name@alias` or `name` (its champion) means."""
        parsed = parse_reference(reference)
        return self.get(parsed.name, parsed.selector)

    def models(self) -> list[ModelSummary]:
        """Return every model with its newest version and aliases, by name."""
        with self._env.snapshot() as snapshot:
            return [rows.summarize(snapshot, name) for name in rows.models(snapshot)]

    def versions(self, name: str) -> list[ModelVersion]:
        """Return a model's versions by number, tombstones included."""
        with self._snapshot_of(name) as snapshot:
            return [*rows.versions(snapshot, name)]

    def aliases(self, name: str) -> list[Alias]:
        """Return a model's aliases by name, those that point somewhere."""
        with self._snapshot_of(name) as snapshot:
            return [alias for alias in rows.aliases(snapshot, name) if alias.version is not None]

    def pins(self, name: str) -> frozenset[int]:
        """Return the numbers of a model's pinned versions."""
        with self._snapshot_of(name) as snapshot:
            return rows.pins(snapshot, name)

    def history(
        self, name: str, *, alias: str | None = None, limit: int = HISTORY_LIMIT
    ) -> list[Event]:
        """Return a model's latest events, newest first; with `alias` only those about it."""
        with self._snapshot_of(name) as snapshot:
            events = rows.history(snapshot, name)
            wanted = (e for e in events if alias is None or e.body.get("alias") == alias)
            return [*islice(wanted, limit)]

    @contextmanager
    def _snapshot_of(self, name: str) -> Iterator[Snapshot]:
        check_name(name, "model")
        with self._env.snapshot() as snapshot:
            rows.require_model(snapshot, name)
            yield snapshot

    async def _change_in_thread(self, name: str, cause: Cause, verb: Callable[[Change], T]) -> T:
        check_name(name, "model")
        return await asyncio.to_thread(self._change, name, cause, verb)

    # Everything below blocks and runs in a thread.

    def _register(
        self,
        name: str,
        files: Mapping[str, bytes | Path],
        lineage: Mapping[str, Any] | Origin,
        cause: Cause,
        state: VersionState,
    ) -> ModelVersion:
        check_name(name, "model")
        check_files(files)
        _check_first_state(state)
        parsed = lineage if isinstance(lineage, Origin) else Lineage.parse(lineage)
        return self._publish(name, cause, state, lambda: self._store.publish(name, files, parsed))

    def _adopt(self, pointer: Descriptor, source: BlobStore, cause: Cause) -> ModelVersion:
        name = Manifest.decode(source.get(pointer.digest, pointer.size_bytes)).name
        check_name(name, "model")
        return self._publish(
            name, cause, VersionState.READY, lambda: self._store.adopt(pointer, source)
        )

    def _publish(
        self, name: str, cause: Cause, state: VersionState, store: Callable[[], Blob]
    ) -> ModelVersion:
        with self._layout.publishing():
            try:
                blob = store()
                self._layout.sync_blobs()
            except OSError as error:
                raise StorageFullError(
                    f"the files of model {name!r} could not be stored: {error}; nothing was "
                    "registered",
                    hint="Free space or mend the disk, then register again.",
                ) from error
            return self._change(name, cause, lambda change: change.register(*blob, state))

    def _export(self, name: str, selector: Selector, file: IO[bytes]) -> ModelVersion:
        version = self._loadable(name, selector)
        blobs, signatures = self._layout.blobs, self.signatures(version)

        def write(version: ModelVersion) -> None:
            manifest = self._store.load_manifest(version)
            self._store.guarded(
                version, lambda: write_archive(file, version, signatures, manifest, blobs)
            )

        self._reading(version, write)
        return version

    def _load(self, name: str, selector: Selector) -> LoadedVersion:
        return self._reading(self._loadable(name, selector), self._store.load)

    def _loadable(self, name: str, selector: Selector) -> ModelVersion:
        version = self.get(name, selector)
        if version.state is VersionState.QUARANTINED:
            raise ConflictError(
                f"version {version.reference} is quarantined: {version.reason}",
                code="version_quarantined",
                hint="Roll the alias back, or register the model again.",
            )
        return version

    def _load_file(self, name: str, selector: Selector, filename: str) -> bytes:
        version = self.get(name, selector)
        return self._reading(version, lambda version: self._store.load_file(version, filename))

    def _load_manifest(self, name: str, selector: Selector) -> Manifest:
        return self._reading(self.get(name, selector), self._store.load_manifest)

    def _reading(self, version: ModelVersion, read: Callable[[ModelVersion], T]) -> T:
        """Read, and quarantine a version that turns out to be damaged before saying so."""
        try:
            return read(version)
        except VersionDamagedError as error:
            if version.state is not VersionState.QUARANTINED and not self.mends(version):
                logger.exception("quarantining %s: %s", version.reference, error.message)
                cause = Cause("mlpd", error.message[:MAX_WHY_CHARS])
                self._change(version.name, cause, lambda change: change.quarantine(version.number))
            raise

    def _set_state(self, name: str, number: int, state: VersionState, cause: Cause) -> ModelVersion:
        version = self.get(name, number)
        if version.state is VersionState.QUARANTINED and state is VersionState.READY:
            self._store.load(version)
        return self._change(name, cause, lambda change: change.set_state(number, state))

    def _collect(self, policy: Policy, cause: Cause, dry_run: bool) -> Collection:
        with self._env.snapshot() as snapshot:
            surplus = find_surplus(snapshot, policy)
        if not dry_run:
            surplus = [version for version in surplus if self._retire(version, cause)]
        gone, waiting = collect_blobs(self._env, self._layout, policy, dry_run=dry_run)
        return Collection(tuple(surplus), tuple(gone), tuple(waiting))

    def _retire(self, version: ModelVersion, cause: Cause) -> bool:
        """Delete a surplus version, unless it came into use since it was looked at."""
        return self._change(
            version.name, cause, lambda change: change.retire(version.number, TRAIL_KEPT)
        )

    def _change(self, name: str, cause: Cause, verb: Callable[[Change], T]) -> T:
        def write(txn: WriteTransaction) -> T:
            self.fence(txn)
            return verb(Change(txn, name, cause))

        result = self._writer.write_blocking(write)
        try:
            export(self._env, self._layout, changes_only=True)
            self.export_error = None
        except (OSError, MlpdError) as error:
            # The change is durable in LMDB and stays: the next export, or start, catches up.
            self.export_error = str(error)
            logger.exception("the registry's journal and index.json lag behind LMDB")
        return result


def _check_first_state(state: VersionState) -> None:
    if state not in (VersionState.READY, VersionState.PENDING):
        raise ValidationError(
            f"a version can't be registered as {state}",
            code="invalid_state",
            hint="Register it as ready or pending.",
        )
