"""Verb feed: the owner's side of followers: commits in their order, and backups to start from."""

import asyncio
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpd.core.errors import ConflictError, NotFoundError
from mlpd.daemon.backup import Backup
from mlpd.daemon.ownership import Ownership
from mlpd.daemon.roles import Roles, elsewhere
from mlpd.storage.backup import load_backup
from mlpd.storage.environment import Environment
from mlpd.storage.feed import Feed
from mlpd.storage.files import DataDirectory, make_dirs
from mlpd.storage.tables import Head
from mlpd.storage.writer import Writer

FILE_CHUNK_BYTES = 4 << 20
SNAPSHOTS_MAX = 2
"""Backups that are kept for followers that fetch them; the oldest go."""
WAIT_S = 0.25
"""How long a question waits for a commit; so stale is a follower of an owner that does nothing."""
FOLLOWERS_MAX = 64
IDLE_S = 86_400.0
"""A feed that nobody has asked for so long ends."""
RECENT_S = 60.0
"""A follower that hasn't asked for so long is none."""
_SENT = ("segments/", "predictions/", "registry/blobs/")


@dataclass
class Follower:
    """What is known of a follower: when it last asked, and up to where it had come."""

    asked_s: float
    head: Head
    fresh_s: float
    """When it last had all that there was."""


class Feeding:
    """Sends commits; one instance per daemon."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        feed: Feed,
        roles: Roles,
        ownership: Ownership,
        backup: Backup,
        paths: DataDirectory,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._monotonic = monotonic
        self._since_s = monotonic()
        self._environment = environment
        self._writer = writer
        self._feed = feed
        self._roles = roles
        self._ownership = ownership
        self._backup = backup
        self._paths = paths
        self._lock = asyncio.Lock()
        self.followers: dict[str, Follower] = {}
        """By URL, those that asked lately."""

    async def commits(
        self, head: Head, follower: str, ticket: int | None, *, wait: bool
    ) -> dict[str, Any]:
        """Return the commits that follow a head, and what a follower has to know.

        `wait`: up to a second for one where there is none.  `follower`: its URL; `ticket`: of the
        answer that it had before, its promise.  Raises ConflictError(code="feed_gone") if the feed
        doesn't reach back so far, or the head is none of this history.
        """
        if self._roles.role.name not in ("owner", "paused"):
            raise elsewhere(self._roles.role, self._ownership.member)
        self._roles.lease.renew(follower, ticket)
        records, newest = await self._read(head, wait=wait)
        if records is None:
            raise ConflictError(
                "the feed of commits doesn't reach back to what the follower has",
                code="feed_gone",
                hint="It starts again from a backup of this daemon.",
                details={"sequence": newest.sequence},
            )
        self._note(follower, head, newest)
        return {
            "commits": records,
            "head": newest.text,
            "epoch": self._ownership.epoch,
            "ticket": self._roles.lease.give(self._monotonic()),
            "lease_us": round(self._roles.lease.lease_s * 1e6),
        }

    async def snapshot(self) -> dict[str, Any]:
        """Take a backup for a follower to fetch, and note commits from before it on.

        Returns its `snapshot` id and `files`: path, size_bytes and digest of each.  Raises
        ConflictError: `no_cluster`, `backup_running`.
        """
        if self._roles.role.name != "owner":
            raise elsewhere(self._roles.role, self._ownership.member)
        if self._ownership.member is None:
            raise ConflictError(
                "this daemon is no member of a cluster, so nobody can take its place",
                code="no_cluster",
                hint="mlpd shard init NAME=URL makes a cluster of it alone; it keeps its data.",
            )
        async with self._lock:
            await self._writer.write(lambda _: self._feed.start())
            snapshot = secrets.token_hex(8)
            folder = self._paths.snapshots / snapshot
            await asyncio.to_thread(self._make_room)
            await self._backup.run(str(folder), within=True)
            manifest = await asyncio.to_thread(load_backup, folder)
        files = [
            {"path": file.path, "size_bytes": file.size_bytes, "digest": file.digest}
            for file in manifest.files
        ]
        return {"snapshot": snapshot, "sequence": manifest.sequence, "files": files}

    async def file(self, snapshot: str | None, path: str, offset: int) -> dict[str, Any]:
        """Return up to 4 MiB of a file of a snapshot, or of this daemon, and its size.

        Raises NotFoundError(code="unknown_file").
        """
        return await asyncio.to_thread(self._file, snapshot, path, offset)

    async def forget(self, snapshot: str) -> None:
        """Remove a backup that was fetched; idempotent."""
        folder = self._snapshot_folder(snapshot)
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def start(self) -> None:
        """Remove what an earlier process left for followers."""
        await asyncio.to_thread(shutil.rmtree, self._paths.snapshots, ignore_errors=True)

    async def rest(self) -> None:
        """End the feed once nobody has followed for a day, and the map has no followers."""
        now_s = self._monotonic()
        asked_s = max((one.asked_s for one in self.followers.values()), default=self._since_s)
        if self._feed.is_on and now_s - asked_s > IDLE_S and not self._roles.replicas():
            await self._writer.write(lambda _: self._feed.stop())

    def recent(self) -> dict[str, Follower]:
        """Return the followers that asked within the last minute."""
        since_s = self._monotonic() - RECENT_S
        return {url: one for url, one in self.followers.items() if one.asked_s >= since_s}

    def lags(self) -> dict[str, tuple[int, float]]:
        """Return, by URL, how many rows and seconds each recent follower is behind."""
        with self._environment.snapshot() as snapshot:
            newest, now_s = snapshot.head, self._monotonic()
        return {
            url: (
                int(newest.sequence - one.head.sequence),
                0.0 if one.head == newest else now_s - one.fresh_s,
            )
            for url, one in self.recent().items()
        }

    async def _read(self, head: Head, *, wait: bool) -> tuple[bytes | None, Head]:
        """Return the records after a head, None if they are gone, and the newest head.

        They may be empty though the newest head is another: a commit can be read a moment before
        the feed counts it.
        """
        for is_last in (not wait, True):
            with self._environment.snapshot() as snapshot:
                newest = snapshot.head
            if newest != head:
                break
            if not is_last:
                await self._writer.follow(head, deadline_s=time.monotonic() + WAIT_S)
        if newest == head:
            return b"", newest
        return await asyncio.to_thread(self._feed.read, head), newest

    def _note(self, follower: str, head: Head, newest: Head) -> None:
        now_s = self._monotonic()
        known = self.followers.get(follower)
        fresh_s = now_s if head == newest or known is None else known.fresh_s
        self.followers[follower] = Follower(now_s, head, fresh_s)
        if len(self.followers) > FOLLOWERS_MAX:
            self.followers = self.recent() or {follower: self.followers[follower]}

    def _make_room(self) -> None:
        make_dirs(self._paths.snapshots)
        found = sorted(self._paths.snapshots.iterdir(), key=lambda path: path.stat().st_mtime)
        for path in found[: max(0, len(found) + 1 - SNAPSHOTS_MAX)]:
            shutil.rmtree(path, ignore_errors=True)

    def _snapshot_folder(self, snapshot: str) -> Path:
        if not (snapshot.isascii() and snapshot.isalnum()):
            raise _unknown_file(snapshot)
        return self._paths.snapshots / snapshot

    def _file(self, snapshot: str | None, path: str, offset: int) -> dict[str, Any]:
        root = self._paths.root if snapshot is None else self._snapshot_folder(snapshot)
        if snapshot is None and not path.startswith(_SENT):
            raise _unknown_file(path)
        try:
            target = (root / path).resolve()
            if not target.is_relative_to(root.resolve()) or offset < 0:
                raise _unknown_file(path)
            with target.open("rb") as file:
                size_bytes = file.seek(0, 2)
                file.seek(offset)
                return {"data": file.read(FILE_CHUNK_BYTES), "size_bytes": size_bytes}
        except (OSError, ValueError, OverflowError):
            raise _unknown_file(path) from None


def _unknown_file(path: str) -> NotFoundError:
    return NotFoundError(
        f"there is no file {path!r:.200} for followers",
        code="unknown_file",
        hint="It may have been replaced meanwhile: ask for the newest commits.",
    )
