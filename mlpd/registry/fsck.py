"""Fsck: verifies every blob, record, pointer and export of a registry; changes nothing in it."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlpd.core.errors import MlpdError
from mlpd.core.time import system_clock
from mlpd.registry import rows
from mlpd.registry.descriptors import Descriptor
from mlpd.registry.layout import LAYOUT_FILE, Layout
from mlpd.registry.manifest import Manifest, build_index, referrers_of
from mlpd.registry.records import Alias, Event, ModelVersion, VersionState
from mlpd.registry.referrers import Referrers
from mlpd.storage.environment import Environment, Snapshot, Table, WriteTransaction
from mlpd.storage.writer import Writer


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: `kind` is stable, `subject` names the blob, version or file.

    Kinds: `layout`, `blob_corrupt`, `blob_writable`, `dangling_pointer`, `wrong_size`,
    `wrong_manifest`, `alias_not_ready`, `records_differ`, `journal_differs`, `index_differs`.
    """

    kind: str
    subject: str
    message: str


@dataclass(frozen=True, slots=True)
class Report:
    """What `check` found; `orphans` are blobs that no version needs: harmless, to be collected."""

    problems: tuple[Problem, ...]
    versions: int
    blobs: int
    blob_bytes: int
    orphans: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def check(env: Environment, root: Path) -> Report:
    """Verify the registry in `root` against its records in `env`; blocking, nothing else writes.

    Reads every blob, about 1 ms per MB, and replays all events into a scratch environment.
    A quarantined version may be damaged, its blobs may not.
    """
    return _Checker(env, Layout(root)).run()


class _Checker:
    """Collects problems, part by part."""

    def __init__(self, env: Environment, layout: Layout) -> None:
        self._env, self._layout = env, layout
        self._problems: list[Problem] = []
        self._sizes: dict[str, int] = {}  # of intact blobs
        self._needed: set[str] = set()

    def run(self) -> Report:
        if self._layout.read("oci-layout") != LAYOUT_FILE:
            self._add("layout", "oci-layout", "the file is missing or differs")
        self._check_blobs()
        with self._env.snapshot() as snapshot:
            signed = [*rows.all_signed(snapshot)]
            versions = [version for version, _ in signed]
            aliases = [a for name in rows.models(snapshot) for a in rows.aliases(snapshot, name)]
            events = [*rows.events(snapshot, after=0)]
            table = _table(snapshot)
        for version in versions:
            self._check_version(version)
        for found in referrers_of(entry for entry in signed if not entry[0].is_deleted):
            self._check_referrers(found)
        self._check_aliases(aliases, {(v.name, v.number): v for v in versions})
        self._check_records(events, table)
        self._check_exports(events, build_index(signed))
        return Report(
            problems=tuple(self._problems),
            versions=sum(not version.is_deleted for version in versions),
            blobs=len(self._sizes),
            blob_bytes=sum(self._sizes.values()),
            orphans=tuple(sorted(self._sizes.keys() - self._needed)),
        )

    def _check_blobs(self) -> None:
        for digest in self._layout.blobs:
            try:
                status = self._layout.blobs.verify(digest).stat()
            except MlpdError as error:
                self._add("blob_corrupt", digest, error.message)
                continue
            self._sizes[digest] = status.st_size
            if status.st_mode & 0o222:
                self._add("blob_writable", digest, f"its mode is {status.st_mode & 0o777:o}")

    def _check_version(self, version: ModelVersion) -> None:
        if version.is_deleted:
            return
        pointer = Descriptor("", version.digest, version.size_bytes)
        if not self._check_pointer(version, pointer):
            return
        try:
            manifest = Manifest.decode(self._layout.blobs.get(version.digest))
        except MlpdError as error:
            self._add("wrong_manifest", version.reference, error.message)
            return
        if manifest.name != version.name:
            self._add("wrong_manifest", version.reference, f"it belongs to {manifest.name!r}")
        for descriptor in manifest.blobs:
            self._check_pointer(version, descriptor)

    def _check_referrers(self, found: Referrers) -> None:
        for digest in found.blobs:
            self._needed.add(digest)
            if digest not in self._sizes:
                self._add("dangling_pointer", "index.json", f"a signature needs the blob {digest}")

    def _check_pointer(self, version: ModelVersion, pointer: Descriptor) -> bool:
        self._needed.add(pointer.digest)
        size_bytes = self._sizes.get(pointer.digest)
        if size_bytes == pointer.size_bytes:
            return True
        if version.state is not VersionState.QUARANTINED:
            kind = "dangling_pointer" if size_bytes is None else "wrong_size"
            wanted = f"{pointer.digest} of {pointer.size_bytes} bytes"
            self._add(kind, version.reference, f"it needs {wanted}, found {size_bytes} bytes")
        return False

    def _check_aliases(
        self, aliases: list[Alias], versions: dict[tuple[str, int], ModelVersion]
    ) -> None:
        for alias in aliases:
            if alias.version is None:
                continue
            version = versions.get((alias.model, alias.version))
            if version is None or version.state is not VersionState.READY:
                state = "missing" if version is None else version.state
                subject = f"{alias.model}@{alias.alias}"
                self._add("alias_not_ready", subject, f"version {alias.version} is {state}")

    def _check_records(self, events: list[bytes], table: dict[bytes, bytes]) -> None:
        try:
            replayed = _replayed([Event.decode(event) for event in events])
        except MlpdError as error:
            self._add("records_differ", "events", error.message)
            return
        for key in sorted(table.keys() ^ replayed.keys()):
            self._add("records_differ", repr(key), "the events and the rows disagree about it")
        for key in sorted(table.keys() & replayed.keys()):
            if table[key] != replayed[key]:
                self._add("records_differ", repr(key), "its value is not what the events make")

    def _check_exports(self, events: list[bytes], index: bytes) -> None:
        try:
            journal = [event.encode() for event in self._layout.journal.read()]
        except MlpdError as error:
            self._add("journal_differs", "journal", error.message)
        else:
            if journal != events:
                counts = f"it holds {len(journal)} events, LMDB {len(events)}"
                self._add("journal_differs", "journal", counts)
        if self._layout.read("index.json") != index:
            self._add("index_differs", "index.json", "it is not what the records make")

    def _add(self, kind: str, subject: str, message: str) -> None:
        self._problems.append(Problem(kind, subject, message))


def _table(snapshot: Snapshot) -> dict[bytes, bytes]:
    return dict(snapshot.scan(Table.MODELS))


def _replayed(events: list[Event]) -> dict[bytes, bytes]:
    """Return table MODELS as the events alone make it, in an environment of its own."""
    with tempfile.TemporaryDirectory(prefix="mlpd-fsck-") as directory:
        scratch = Environment.open(directory, clock=system_clock)
        writer = Writer(scratch)
        try:
            writer.write_blocking(_applying(events))
            with scratch.snapshot() as snapshot:
                return _table(snapshot)
        finally:
            writer.close()
            scratch.close()


def _applying(events: list[Event]) -> Callable[[WriteTransaction], None]:
    def apply(txn: WriteTransaction) -> None:
        for event in events:
            rows.apply_event(txn, event)

    return apply
