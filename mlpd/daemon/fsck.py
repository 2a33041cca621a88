"""Verb fsck: checks a data directory in a child process, stopped or beside the running daemon."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlpd.core.errors import ConfigurationError, ConflictError, MlpdError
from mlpd.core.time import Clock
from mlpd.daemon.process import Child
from mlpd.storage.files import DataDirectory
from mlpd.storage.lock import DaemonLock
from mlpd.storage.whole import refuse_incomplete

MEMORY_BYTES_MAX = 4 * 1024**3
"""Of the child: the stamps of one manifest and, with replay, the rows of one compaction."""

ONLINE = {"online": True, "deep": False, "repair": False}

OnSection = Callable[[str], None]
"""Called with each section's name as its check begins."""


class Fsck:
    """Checks the running daemon's directory, as far as a writer beside it allows; one at a time."""

    def __init__(self, paths: DataDirectory) -> None:
        self._paths = paths
        self._lock = asyncio.Lock()

    async def run(self) -> dict[str, Any]:
        """Return the report; raises ConflictError(code="fsck_running")."""
        if self._lock.locked():
            raise ConflictError(
                "the data directory is being checked already",
                code="fsck_running",
                hint="Wait for its report; one check reads everything once.",
            )
        async with self._lock:
            return await _check(self._paths, ONLINE, _ignore)


def check_stopped(
    directory: Path,
    clock: Clock,
    *,
    deep: bool = False,
    repair: bool = False,
    on_section: OnSection | None = None,
) -> dict[str, Any]:
    """Return the report on a data directory that no daemon holds; blocks, holding its lock.

    `deep`: compare online rows with a replay of the log, about 10 s per million events and view.
    `repair`: mend what can be, then check again.  Raises ConfigurationError(
    code="no_data_directory"), ConflictError(code="log_missing"), UnavailableError(
    code="data_directory_in_use").
    """
    paths = DataDirectory(directory.resolve())
    refuse_incomplete(paths)
    if not (paths.lmdb / "data.mdb").is_file():
        raise ConfigurationError(
            f"{directory} is no data directory: there is no lmdb/data.mdb in it",
            code="no_data_directory",
            hint="Name it with --data-dir; mlpd serve makes one, mlpd restore brings one back.",
        )
    with DaemonLock(paths.lock_file, clock, url="mlpd fsck"):
        return asyncio.run(
            _check(paths, {"online": False, "deep": deep, "repair": repair}, on_section or _ignore)
        )


async def _check(
    paths: DataDirectory, options: dict[str, bool], on_section: OnSection
) -> dict[str, Any]:
    request = {"directory": str(paths.root), **options}
    section = "start"
    try:
        async with Child("fsck", request, memory_bytes_max=MEMORY_BYTES_MAX) as child:
            async for message in child.messages():
                if message["kind"] == "done":
                    report: dict[str, Any] = message["result"]
                    return report
                section = message["section"]
                on_section(section)
    except ConfigurationError:
        raise  # another format: nothing is wrong with it, but it can't be read here
    except MlpdError as error:
        return _broken_off(section, error)
    raise AssertionError("messages end with done or an error")


def _broken_off(section: str, error: MlpdError) -> dict[str, Any]:
    """Return the report of a check that could not go on: what it read is damaged, or killed it."""
    problem = {
        "section": section,
        "code": error.code,
        "subject": "the check itself",
        "message": error.message,
        "hint": "Restore from a backup: mlpd restore BACKUP --data-dir DIR.",
    }
    return {
        "clean": False,
        "problems": [problem],
        "more": 0,
        "checked": {},
        "skipped": {section: "the check broke off here"},
        "repaired": [],
    }


def _ignore(_: str) -> None:
    pass
