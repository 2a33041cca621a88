"""The compactor: decides when the log is compacted, runs the child, stores its manifest."""

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlpd.core.errors import InternalError, MlpdError, StorageFullError
from mlpd.storage.compact import EXIT_DISK
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.log import compacted_through
from mlpd.storage.merge import find_mergeable
from mlpd.storage.segments import (
    Manifest,
    decode_manifest,
    load_manifests,
    purge_log,
    remove_files,
    replace_manifests,
    store_manifest,
)
from mlpd.storage.tables import Table
from mlpd.storage.unnamed import remove_orphans
from mlpd.storage.writer import Writer

logger = logging.getLogger(__name__)

CHILD_TIMEOUT_S = 600.0

REPLACED_S = 1800.0
"""So long the files that a merging has replaced stay for children that began with the former list;
a start, when there are no such children, removes them as those of no manifest."""


@dataclass(frozen=True, slots=True)
class CompactionPolicy:
    """When the log's tail is worth compacting: any one threshold is enough."""

    tail_rows: int = 200_000
    tail_bytes: int = 64 << 20
    """Size of the LOG table, DEFINITIONS records included."""
    interval_s: float = 3600.0
    """Time since the last compaction (or the start) with any row in the tail."""
    rows_max: int = 500_000
    """Rows of one compaction; what is left over is due again."""


@dataclass(frozen=True, slots=True)
class Tail:
    """What the log holds beyond the segments."""

    rows: int
    size_bytes: int
    last_sequence: int


class Compactor:
    """Owns the compactions of one data directory; lives on the event loop, one run at a time."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        data: DataDirectory,
        *,
        policy: CompactionPolicy | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._environment = environment
        self._writer = writer
        self._data = data
        self._policy = policy or CompactionPolicy()
        self._monotonic = monotonic
        self._last_s = monotonic()
        self._running = asyncio.Lock()
        self._replaced: list[tuple[float, list[str]]] = []
        self.merged_files = 0
        """Files that others took the place of, since the start."""

    async def start(self) -> None:
        """Clean up after a crash: files of no manifest, log records that segments hold."""
        orphans = await asyncio.to_thread(self._remove_orphans)
        if orphans:
            logger.warning("removed %d files of an unfinished compaction", len(orphans))
        await self._purge(0)

    def get_tail(self) -> Tail:
        """Return the size of the log beyond the segments; about 5 us."""
        with self._environment.snapshot() as snapshot:
            return Tail(
                rows=snapshot.sequence - compacted_through(snapshot),
                size_bytes=snapshot.table_bytes(Table.LOG),
                last_sequence=snapshot.sequence,
            )

    def is_due(self) -> bool:
        """Tell whether a threshold of the policy is reached."""
        tail, policy = self.get_tail(), self._policy
        return tail.rows > 0 and (
            tail.rows >= policy.tail_rows
            or tail.size_bytes >= policy.tail_bytes
            or self._monotonic() - self._last_s >= policy.interval_s
        )

    async def run_if_due(self) -> Manifest | None:
        """Compact once if it is due and not already running; the scheduler calls this."""
        if self._running.locked() or not self.is_due():
            return None
        return await self.run()

    async def run(self) -> Manifest | None:
        """Compact the oldest rows now, None if there are none; cancelling ends the child.

        Raises StorageFullError if the child could not write, InternalError if it failed otherwise;
        the log is then as it was.
        """
        async with self._running:
            return await self._compact()

    async def merge_if_due(self) -> Manifest | None:
        """Merge small files of neighbouring manifests where that is worth it.

        Returns the manifest in their place, None if nothing was worth it.  Cancelling ends the
        child.  Raises as `run` does; the segments are then as they were.
        """
        async with self._running:
            await self._remove_replaced(self._monotonic() - REPLACED_S)
            found = await asyncio.to_thread(self._find_mergeable)
            if not found:
                return None
            first, last = found[0].first_sequence, found[-1].last_sequence
            merged = decode_manifest(await self._run_merge(first, last))
            stale = await self._writer.write(partial(replace_manifests, manifests=[merged]))
            self.keep_replaced(stale)
            self.merged_files += len(stale)
            return merged

    def keep_replaced(self, paths: list[str]) -> None:
        """Remove files that no manifest names any more, once nobody reads them; in `paused`."""
        self._replaced.append((self._monotonic(), paths))

    async def remove_replaced(self) -> None:
        """Remove at once all files that others have replaced; only in `paused`."""
        await self._remove_replaced(self._monotonic())

    async def _remove_replaced(self, before_s: float) -> None:
        while self._replaced and self._replaced[0][0] <= before_s:
            await asyncio.to_thread(remove_files, self._data.segments, self._replaced[0][1])
            del self._replaced[0]

    def _find_mergeable(self) -> list[Manifest]:
        with self._environment.snapshot() as snapshot:
            manifests = load_manifests(snapshot)
        return find_mergeable(manifests)

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Wait for a compaction under way and hold off others: the log's tail stays whole.

        Whoever deletes segments of a running daemon does it in here, so that nobody else, who does
        so too or copies them, meets that.
        """
        async with self._running:
            yield

    async def compact_through(self, sequence: int) -> None:
        """Compact until `sequence` lies in segments and no longer in the log; only in `paused`."""
        while self._compacted_through() < sequence:
            await self._compact()
        await self._purge(0)

    def _compacted_through(self) -> int:
        with self._environment.snapshot() as snapshot:
            return compacted_through(snapshot)

    async def _compact(self) -> Manifest | None:
        tail = self.get_tail()
        if tail.rows == 0:
            return None
        manifest = decode_manifest(await self._run_child(tail.last_sequence))
        await self._writer.write(lambda txn: store_manifest(txn, manifest))
        self._last_s = self._monotonic()
        await self._purge(manifest.first_sequence)
        return manifest

    async def _purge(self, start: int | None) -> None:
        # In small operations: deleting 500,000 records in one would hold up ingest for a second.
        while start is not None:
            start = await self._writer.write(partial(purge_log, start=start))

    def _remove_orphans(self) -> list[Path]:
        with self._environment.snapshot() as snapshot:
            return remove_orphans(snapshot, self._data.segments)

    async def _run_child(self, through: int) -> bytes:
        limits = (f"--through={through}", f"--rows-max={self._policy.rows_max}")
        return await self._run_module("mlpd.storage.compact", *limits)

    async def _run_merge(self, first: int, last: int) -> bytes:
        return await self._run_module("mlpd.storage.merge", f"--first={first}", f"--last={last}")

    async def _run_module(self, module: str, *arguments: str) -> bytes:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, str(self._data.root), *arguments),
            "--with-parent",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(CHILD_TIMEOUT_S):
                return await _get_output(child)
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()


async def _get_output(child: asyncio.subprocess.Process) -> bytes:
    # Not communicate(): it may close stdin, and the child ends with it.
    if child.stdin is None or child.stdout is None or child.stderr is None:
        raise InternalError("the compaction child has no pipes")
    output, errors = await asyncio.gather(child.stdout.read(), child.stderr.read())
    code = await child.wait()
    child.stdin.close()
    if code != 0:
        raise _child_error(code, errors.decode(errors="replace")[-2000:])
    return output


def _child_error(code: int, errors: str) -> MlpdError:
    if code == EXIT_DISK:
        return StorageFullError(
            f"compaction could not write its segments: {errors.strip()}",
            hint="Free space or mend the disk; the log keeps all rows until then.",
        )
    return InternalError(
        f"the compaction child ended with code {code}",
        code="compaction_failed",
        hint="The log keeps all rows; the next run tries again.",
        details={"stderr": errors},
    )
