"""Following: a registry that repeats another one's events, its blobs brought over by digest."""

import asyncio
import hashlib
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from typing import IO

from mlpd.core.errors import ConflictError, InternalError, MlpdError, NotFoundError
from mlpd.registry import rows
from mlpd.registry.exports import export
from mlpd.registry.layout import Layout
from mlpd.registry.manifest import Manifest
from mlpd.registry.records import Event, EventKind, ModelVersion
from mlpd.storage.environment import Environment, WriteTransaction
from mlpd.storage.writer import Writer

Fetch = Callable[[str, IO[bytes]], Awaitable[None]]
"""Writes the content of a digest to a file; raises NotFoundError where nobody has it."""


class RegistryFollower:
    """Repeats events of another registry; one per registry, used by one task."""

    def __init__(self, env: Environment, writer: Writer, layout: Layout) -> None:
        self._env = env
        self._writer = writer
        self._layout = layout

    async def pull(self, digest: str, size_bytes: int, fetch: Fetch) -> int:
        """Bring a version's manifest and all that it names, as far as it isn't here and whole.

        Returns the bytes that came.  Raises what `fetch` does, InternalError(code="blob_corrupt")
        for what differs from its digest; nothing of that is kept.
        """
        pulled = await self._pull(digest, size_bytes, fetch)
        manifest = await asyncio.to_thread(self._manifest, digest, size_bytes)
        for needed in manifest.blobs:
            pulled += await self._pull(needed.digest, needed.size_bytes, fetch)
        await asyncio.to_thread(self._layout.sync_blobs)
        return pulled

    async def pull_registered(self, events: Sequence[Event], fetch: Fetch) -> int:
        """Bring the blobs of all versions that events register; return the bytes that came.

        What nobody has any more is passed over: such a version was deleted since, or is found to be
        damaged when it is loaded.
        """
        pulled = 0
        for event in events:
            if event.kind is EventKind.REGISTERED:
                try:
                    pulled += await self.pull(event.body["digest"], event.body["size_bytes"], fetch)
                except NotFoundError:
                    continue
        return pulled

    async def repeat(self, events: Sequence[Event]) -> list[str]:
        """Append events, those that are here already aside; return the models that they concern.

        Journal and index.json follow.  Raises ConflictError(code="members_differ") for an event
        that is another one here.
        """
        await asyncio.to_thread(self._repeat, events)
        return sorted({event.model for event in events})

    def version_of(self, name: str, number: int) -> ModelVersion:
        """Return a version's record."""
        with self._env.snapshot() as snapshot:
            return rows.get_version(snapshot, name, number)

    @property
    def has_events(self) -> bool:
        """Whether the registry ever changed."""
        with self._env.snapshot() as snapshot:
            return rows.last_sequence(snapshot) > 0

    async def _pull(self, digest: str, size_bytes: int, fetch: Fetch) -> int:
        blobs = self._layout.blobs
        if await asyncio.to_thread(self._is_whole, digest, size_bytes):
            return 0
        folder = self._layout.root / ".mlpd" / "tmp"
        with tempfile.TemporaryFile(dir=folder) as file:  # a cancelled thread would leave it open
            await fetch(digest, file)
            await asyncio.to_thread(_check, file, digest, size_bytes)
            await asyncio.to_thread(blobs.put, file)
        return size_bytes

    def _is_whole(self, digest: str, size_bytes: int) -> bool:
        try:
            self._layout.blobs.verify(digest, size_bytes)
        except MlpdError:
            return False
        return True

    def _manifest(self, digest: str, size_bytes: int) -> Manifest:
        return Manifest.decode(self._layout.blobs.get(digest, size_bytes))

    def _repeat(self, events: Sequence[Event]) -> None:
        def write(txn: WriteTransaction) -> None:
            for event in events:
                if event.sequence > rows.last_sequence(txn):
                    rows.apply_event(txn, event)
                elif rows.get_event(txn, event.sequence) != event.encode():
                    raise ConflictError(
                        f"event {event.sequence} of the registry here is another one than the "
                        "arbiter's",
                        code="members_differ",
                        hint="Members are made of empty daemons: mlpd models export and import "
                        "what is only here, and start this one on an empty directory.",
                    )

        self._writer.write_blocking(write)
        export(self._env, self._layout, changes_only=True)


def _check(file: IO[bytes], digest: str, size_bytes: int) -> None:
    """Raise unless the file holds what its digest says; it is at its start afterwards."""
    file.seek(0)
    found = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"  # type: ignore[arg-type]  # a file
    if found != digest or file.tell() != size_bytes:
        raise InternalError(
            f"a member sent {file.tell()} bytes with digest {found} for {digest}",
            code="blob_corrupt",
            hint="mlpd fsck there shows which file is damaged.",
        )
    file.seek(0)
