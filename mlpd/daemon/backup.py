"""Verb backup: a consistent copy of everything while the daemon works; docs/paths/backup.md."""

import asyncio
import shutil
import time
from pathlib import Path
from typing import Any

from mlpd.core.config import Config, format_config
from mlpd.core.errors import ConflictError, OverloadedError, StorageFullError, ValidationError
from mlpd.daemon.predictions import PredictionLog
from mlpd.daemon.process import Child
from mlpd.storage.compactor import Compactor
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory, make_dirs
from mlpd.storage.writer import Writer

GROWTH_BYTES_MIN = 256 << 20
"""LMDB's file may grow by what was in use, and this, while the copy keeps pages from reuse."""

_WATCH_S = 0.25
_NICE = 10


class Backup:
    """Takes backups of the running daemon, one at a time; `running` while one is under way.

    Whoever deletes blobs of a running daemon does it inside `paused`, and whoever deletes segments
    while the compactor is paused, which it is during a backup.
    """

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        log: PredictionLog,
        compactor: Compactor,
        paths: DataDirectory,
        config: Config,
        *,
        growth_bytes_min: int = GROWTH_BYTES_MIN,
    ) -> None:
        self._environment = environment
        self._writer = writer
        self._log = log
        self._compactor = compactor
        self._paths = paths
        self._config = config
        self._growth_bytes_min = growth_bytes_min
        self._lock = asyncio.Lock()
        self._files = asyncio.Lock()

    @property
    def running(self) -> bool:
        """Whether a backup is under way."""
        return self._lock.locked()

    def paused(self) -> asyncio.Lock:
        """Return a lock that keeps backups waiting; taking it waits for one under way."""
        return self._files

    async def run(
        self, destination: str, *, copy: bool = False, within: bool = False
    ) -> dict[str, Any]:
        """Write a backup to `destination`, an absolute path to nothing or an empty folder.

        `copy`: no hard links.  `within`: it is a folder of the daemon's own.  It holds everything
        acknowledged before the call; an apply or a compaction under way is waited for, the next one
        waits.  Raises ConflictError (`backup_running`, `destination_not_empty`, `file_differs`,
        `backup_failed`), ValidationError, StorageFullError, OverloadedError(
        code="backup_outgrown"); whatever it raises, nothing is left at the destination.
        """
        if self.running:
            raise ConflictError(
                "another backup is under way",
                code="backup_running",
                hint="Wait for it; one backup reads everything once.",
            )
        async with self._lock, self._files:
            target = await asyncio.to_thread(self._prepare, destination, within=within)
            try:
                # An apply builds its views' rows before they are defined; a copy taken meanwhile
                # would have them, and the next apply there would count them as its own.
                async with self._compactor.paused():
                    return await self._write(target, link=not copy)
            except BaseException:
                await asyncio.shield(asyncio.to_thread(_remove_content, target))
                raise

    def _prepare(self, destination: str, *, within: bool) -> Path:
        """Return the destination, an empty folder now; raises if it can't be one."""
        target = Path(destination) if within else check_destination(destination, self._paths.root)
        try:
            make_dirs(target)
            free_bytes = shutil.disk_usage(target).free
        except OSError as error:
            raise ValidationError(
                f"the daemon can't write to {target}: {error.strerror}",
                code="destination_unwritable",
                hint="Choose a folder that the daemon's user may write to.",
            ) from None
        needed_bytes = self._environment.usage().used_bytes
        if free_bytes < needed_bytes:
            raise StorageFullError(
                f"{target} has {free_bytes} bytes free, LMDB's copy may take {needed_bytes}",
                hint="Free space there, or choose another destination.",
            )
        return target

    async def _write(self, target: Path, *, link: bool) -> dict[str, Any]:
        self._log.flush()
        await self._writer.write(lambda _: None)  # what was flushed is stored now
        started_s, used_bytes = time.monotonic(), self._environment.usage().used_bytes
        request = {
            "directory": str(self._paths.root),
            "destination": str(target),
            "link": link,
            "config": format_config(self._config),
        }
        async with Child("backup", request, nice=_NICE) as child:
            working = asyncio.create_task(child.result())
            try:
                while not (await asyncio.wait((working,), timeout=_WATCH_S))[0]:
                    self._check_growth(used_bytes)
                figures: dict[str, Any] = working.result()
            finally:
                working.cancel()
        growth_bytes = self._environment.usage().used_bytes - used_bytes
        took_s = round(time.monotonic() - started_s, 3)
        return {**figures, "lmdb_growth_bytes": growth_bytes, "took_s": took_s}

    def _check_growth(self, used_bytes: int) -> None:
        growth_bytes = self._environment.usage().used_bytes - used_bytes
        if growth_bytes > used_bytes + self._growth_bytes_min:
            raise OverloadedError(
                f"LMDB's file grew by {growth_bytes} bytes while it was copied, which holds back "
                "the reuse of pages; the backup was given up",
                code="backup_outgrown",
                hint="Take it when less is written, or to a faster disk.",
                details={"retry_after_s": 60.0},
            )


def check_destination(destination: str, root: Path) -> Path:
    """Return where a backup of the data directory `root` may go; raises if it may not."""
    target = Path(destination)
    if not target.is_absolute():
        raise ValidationError(
            f"the destination {destination!r} is not an absolute path",
            code="destination_not_absolute",
            hint="Name a folder on the daemon's host from the root on.",
        )
    try:
        target = target.resolve()
        empty = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValidationError(
            f"the destination {destination!r} can't be looked at: {error}",
            code="destination_unwritable",
            hint="Choose a folder that the daemon's user may write to.",
        ) from None
    if target.is_relative_to(root) or root.is_relative_to(target):
        raise ValidationError(
            f"the destination {target} and the data directory {root} lie in each other",
            code="destination_inside",
            hint="Choose a folder beside the data directory, best on another disk.",
        )
    if not empty:
        raise ConflictError(
            f"the destination {target} is not an empty folder",
            code="destination_not_empty",
            hint="Name a new one for each backup; remove what an unfinished one left.",
        )
    return target


def _remove_content(target: Path) -> None:
    """Remove the folder: it was empty or not there before."""
    shutil.rmtree(target, ignore_errors=True)
