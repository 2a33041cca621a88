"""Verb follow: the follower's side: commits of the owner, applied as they were made.

Nothing else writes where this does: the writer's gate sees to that.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlpd.core.errors import ConflictError, UnavailableError
from mlpd.daemon.ownership import Ownership
from mlpd.daemon.part import Moves
from mlpd.daemon.served_files import ServedFile, load_files
from mlpd.daemon.served_files import find_unnamed as find_unnamed_predictions
from mlpd.daemon.state import CURRENT_KEY, CatalogState
from mlpd.registry.manifest import Manifest as VersionManifest
from mlpd.registry.records import ModelVersion
from mlpd.storage.blobs import BlobStore
from mlpd.storage.environment import Environment
from mlpd.storage.feed import Commit, decode_commits
from mlpd.storage.files import DataDirectory, atomic_write, make_dirs
from mlpd.storage.moves_store import load_arriving, load_leaving
from mlpd.storage.segments import MANIFESTS, decode_manifest, load_manifests
from mlpd.storage.tables import Head, Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.unnamed import find_unnamed
from mlpd.storage.writer import Writer

_SERVED = b"served/"
_MOVES = (b"move/", b"moved/")


@dataclass(frozen=True, slots=True)
class Needed:
    """A file that a commit names: its path in the data directory, its digest."""

    path: str
    digest: str


class Tailing:
    """Applies commits; one instance per daemon."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        state: CatalogState,
        ownership: Ownership,
        paths: DataDirectory,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._environment = environment
        self._writer = writer
        self._state = state
        self._ownership = ownership
        self._paths = paths
        self._monotonic = monotonic
        self._fresh_s: float | None = None
        """Since when, at the latest, the owner has anything that isn't here."""
        self._newest: Head | None = None
        self.commits = 0
        """Applied since the start."""
        self.bytes = 0
        self.trouble: str | None = None
        """Why it doesn't come on, None if it does."""

    @property
    def head(self) -> Head:
        """What the newest commit that is here has left."""
        with self._environment.snapshot() as snapshot:
            return snapshot.head

    @property
    def now_s(self) -> float:
        """The moment, in seconds on the clock that staleness is measured by."""
        return self._monotonic()

    @property
    def staleness_s(self) -> float:
        """Seconds since it is known that everything was here; infinite if it never was."""
        return float("inf") if self._fresh_s is None else self._monotonic() - self._fresh_s

    @property
    def lag_rows(self) -> int:
        """Rows that the owner had more when it last answered."""
        return 0 if self._newest is None else max(0, self._newest.sequence - self.head.sequence)

    def decode(self, data: bytes) -> list[Commit]:
        """Return commits, each the next one of the one before, the first of what is here; blocks.

        Raises InternalError(code="feed_damaged"), ConflictError(code="feed_gone") for others.
        """
        head, commits = self.head, list(decode_commits(data))
        for commit in commits:
            if commit.previous != head:
                raise ConflictError("the commits don't follow what is here", code="feed_gone")
            head = commit.head
        return commits

    def missing(self, commits: Sequence[Commit]) -> list[Needed]:
        """Return files that commits name and that aren't here; blocks.

        Ask again once they are: a model's manifest names more.
        """
        last = {(t, key): value for commit in commits for t, key, value in commit.ops}
        found = dict.fromkeys(
            needed
            for (table, key), value in last.items()
            if value is not None
            for needed in self._named(table, key, value)
        )
        return [needed for needed in found if not (self._paths.root / needed.path).is_file()]

    async def apply(self, commits: Sequence[Commit], size_bytes: int = 0) -> None:
        """Make commits, whose files are here, in one transaction; durable on return."""
        await asyncio.to_thread(self._prepare, commits)
        await self._writer.write(
            lambda txn: self._apply(txn, commits), size_bytes=size_bytes, passes=True
        )
        self.commits += len(commits)
        self.bytes += size_bytes
        if any(_drops_files(commit) for commit in commits):
            await asyncio.to_thread(self._remove_unnamed)

    def note(self, asked_s: float, newest: Head) -> None:
        """Note what the owner had when it answered a question of the moment `asked_s`."""
        self._newest = newest
        if self.head == newest:
            self._fresh_s = asked_s

    def check_fresh(self, max_staleness_s: float) -> float:
        """Return the staleness in seconds; UnavailableError(code="replica_behind") if it is more.

        That is what a reader accepts.
        """
        found_s = self.staleness_s
        if found_s <= max_staleness_s:
            return found_s
        shown = "it never was" if found_s == float("inf") else f"{found_s:.1f} s ago"
        raise UnavailableError(
            f"this follower was last known to be up to date {shown}; "
            f"at most {max_staleness_s:.1f} s are accepted",
            code="replica_behind",
            hint="Ask the owner, or accept more: x-mlpd-max-staleness-ms.",
            details={
                "staleness_ms": None if found_s == float("inf") else round(found_s * 1e3),
                "retry_after_s": 1.0,
            },
        )

    def _named(self, table: Table, key: bytes, value: bytes) -> Iterator[Needed]:
        if table is Table.SEGMENTS:
            for segment in decode_manifest(value).segments:
                yield Needed(f"segments/{segment.path}", segment.digest)
        elif table is Table.META and key.startswith(_SERVED):
            file = ServedFile.decode(value)
            yield Needed(f"predictions/{file.path}", file.digest)
        elif table is Table.MODELS and key.startswith(b"v"):
            yield from self._blobs_of(ModelVersion.decode(value))

    def _blobs_of(self, version: ModelVersion) -> Iterator[Needed]:
        if version.is_deleted:
            return
        blobs = BlobStore(self._paths.registry)
        digests = [version.digest]
        if blobs.exists(version.digest):
            manifest = VersionManifest.decode(blobs.get(version.digest))
            digests += [descriptor.digest for descriptor in manifest.blobs]
        for digest in digests:
            yield Needed(blobs.path(digest).relative_to(self._paths.root).as_posix(), digest)

    def _prepare(self, commits: Sequence[Commit]) -> None:
        """Write manifests' copies, and compile definitions, before they count."""
        for commit in commits:
            for table, key, value in commit.ops:
                if table is Table.SEGMENTS and value is not None:
                    folder = self._paths.segments / MANIFESTS
                    make_dirs(folder)
                    atomic_write(folder / decode_manifest(value).name, value)
                elif table is Table.DEFINITIONS and key == CURRENT_KEY and value is not None:
                    self._state.learn(value)

    def _apply(self, txn: WriteTransaction, commits: Sequence[Commit]) -> None:
        """On the writer thread."""
        moved = False
        for commit in commits:
            if txn.previous != commits[0].previous:
                raise ConflictError("the commits don't follow what is here", code="feed_gone")
            txn.replay(commit.ops)
            moved |= any(t is Table.META and key.startswith(_MOVES) for t, key, _ in commit.ops)
        if moved:
            self._ownership.go_by(Moves(load_leaving(txn), load_arriving(txn)))

    def _remove_unnamed(self) -> None:
        """Remove files that nothing names any more: an erasure wants them gone."""
        with self._environment.snapshot() as snapshot:
            manifests, files = load_manifests(snapshot), load_files(snapshot)
        left: list[Path] = find_unnamed(manifests, self._paths.segments)
        left += find_unnamed_predictions(files, self._paths.predictions)
        for path in left:
            path.unlink(missing_ok=True)


def _drops_files(commit: Commit) -> bool:
    """Tell whether a commit may take the name from a file."""
    return any(
        table is Table.SEGMENTS or (table is Table.META and key.startswith(_SERVED))
        for table, key, _ in commit.ops
    )
