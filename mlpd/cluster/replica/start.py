"""Starting to follow: a backup of the owner becomes the data directory, whole or not at all."""

import asyncio
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlpd import __version__
from mlpd.client import AsyncClient
from mlpd.cluster.replica.files import fetch_file
from mlpd.core.errors import ConflictError
from mlpd.core.time import format_time, system_clock
from mlpd.daemon.restore import LOST_AND_FOUND, restore
from mlpd.storage.backup import BackupFile, BackupManifest, describe, finish_backup
from mlpd.storage.files import DataDirectory, make_dirs, write_durably
from mlpd.storage.roles import ROLE_FILE, Role, RoleStore

Told = Callable[[str], None]
"""Called with a line for people, of what is done."""
RUNNING_S = 1.0
_OF_OTHERS = ("cache", "daemon.lock", "mlpd.sock")
"""What a data directory may have beside data."""


def has_data(directory: Path) -> bool:
    """Tell whether a directory holds anything but what a new filesystem and a cache have."""
    known = (LOST_AND_FOUND, *_OF_OTHERS)
    return directory.is_dir() and any(path.name not in known for path in directory.iterdir())


async def start_following(
    directory: Path, url: str, told: Told, *, discard: bool, again: bool = False
) -> None:
    """Make `directory` a follower's of the owner at `url`, unless it is one already.

    `again`: fetch everything even so.  `discard`: also where there is other data, which goes once
    all is here.  Raises ConflictError(code="holds_data") else, and what fetching raises.
    """
    store, data = RoleStore(directory), DataDirectory(directory)
    unfinished = data.restoring.is_dir()
    role = store.load() if has_data(directory) and not unfinished else None
    if role is not None and role.follows:
        if not again:
            if role.url != url:
                await asyncio.to_thread(store.store, Role("follower", url, lease_us=role.lease_us))
            return
    elif role is not None and not discard:
        raise ConflictError(
            f"{directory} holds data of its own",
            code="holds_data",
            hint="Follow with an empty directory; or give --discard, and this data is replaced "
            "once the owner's is here.",
        )
    await _fetch_all(await asyncio.to_thread(directory.resolve), url, told)


async def _fetch_all(directory: Path, url: str, told: Told) -> None:
    staging = directory.with_name(f".{directory.name}.fetching")
    await asyncio.to_thread(shutil.rmtree, staging, ignore_errors=True)
    await asyncio.to_thread(make_dirs, staging)
    try:
        async with AsyncClient(url, by="mlpd serve --follow") as client:
            told(f"taking a backup of {url}")
            taken = await _snapshot(client)
            files = taken["files"]
            total = sum(file["size_bytes"] for file in files)
            told(f"fetching {len(files)} files, {total >> 20} MiB")
            for file in files:
                await fetch_file(
                    client, file["path"], file["digest"], staging, snapshot=taken["snapshot"]
                )
            await client.cluster.forget_snapshot(taken["snapshot"])
        told("checking them")
        await asyncio.to_thread(_finish, staging, directory, url, taken)
    finally:
        await asyncio.to_thread(shutil.rmtree, staging, ignore_errors=True)


async def _snapshot(client: AsyncClient) -> Mapping[str, Any]:
    """Let the owner take a backup; after another one that is under way."""
    while True:
        try:
            found: Mapping[str, Any] = await client.cluster.snapshot()
        except ConflictError as error:
            if error.code != "backup_running":
                raise
            await asyncio.sleep(RUNNING_S)
        else:
            return found


def _finish(staging: Path, directory: Path, url: str, taken: Mapping[str, Any]) -> None:
    """Make the fetched backup a follower's, and restore it in the place of what is there."""
    write_durably(staging / ROLE_FILE, Role("follower", url).encode())
    files = [BackupFile(**row) for row in taken["files"]]
    files.append(describe(staging, staging / ROLE_FILE))
    files.sort(key=lambda file: file.path)
    time = format_time(system_clock())
    finish_backup(staging, BackupManifest(__version__, time, taken["sequence"], tuple(files)))
    if directory.is_dir():
        DataDirectory(directory).restoring.mkdir(mode=0o700, exist_ok=True)
    restore(staging, directory, system_clock)
