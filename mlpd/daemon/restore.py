"""Restore: a backup verified, copied beside the target, checked, and only then named."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlpd.core.errors import ConflictError, StorageFullError
from mlpd.core.time import Clock
from mlpd.daemon.fsck import check_stopped
from mlpd.storage.backup import (
    BackupFile,
    BackupManifest,
    copy_durably,
    find_damage,
    load_backup,
    sync_folders,
)
from mlpd.storage.files import DataDirectory, fsync_dir, make_dirs

NAMED_MAX = 20
"""Damaged files that an error's message names; its details have all."""

LOST_AND_FOUND = "lost+found"
"""What the root of a new ext4 filesystem has; it stays."""

_BLOB_MODE, _FILE_MODE = 0o444, 0o600
_BLOBS = "registry/blobs/"

OnStage = Callable[[str], None]
"""Called with what begins now: `verify`, `copy`, then fsck's sections."""


def restore(
    backup: Path,
    directory: Path,
    clock: Clock,
    *,
    despite_problems: bool = False,
    on_stage: OnStage = lambda _: None,
) -> dict[str, Any]:
    """Make `directory`, which must not exist or be empty, what the backup holds; blocking.

    Until all is copied and checked it lies in `.<name>.restoring` beside it; where the directory is
    there already (it may be a mount point), in `.restoring` inside, and no daemon starts on it.
    A killed restore leaves that; the next one removes it.  Raises NotFoundError(code="no_backup"),
    ConflictError: `backup_damaged`, `data_directory_not_empty`, `restore_running`,
    `restored_with_problems` (unless `despite_problems`); nothing is left of it then.
    """
    manifest = load_backup(backup)
    target = _check_target(directory)
    on_stage("verify")
    _verify(backup, manifest)
    make_dirs(target.parent)
    with _staging(target) as staging:
        on_stage("copy")
        for file in manifest.files:
            _copy(backup, staging, file)
        sync_folders(staging)
        report = check_stopped(staging, clock, on_section=on_stage)
        if not (report["clean"] or despite_problems):
            raise _with_problems(report)
        _publish(staging, target)
    return {
        "data_directory": str(target),
        "time": manifest.time,
        "sequence": manifest.sequence,
        "files": len(manifest.files),
        "size_bytes": manifest.size_bytes,
        "fsck": report,
    }


def _check_target(directory: Path) -> Path:
    target = directory.resolve()
    if target.exists() and not (target.is_dir() and _may_be_filled(target)):
        raise _not_empty(directory)
    return target


def _may_be_filled(target: Path) -> bool:
    """Tell whether a directory is empty, or holds what a killed restore has left."""
    return DataDirectory(target).restoring.is_dir() or not _content(target)


def _content(target: Path) -> list[Path]:
    """Return what is in a directory but for what a new filesystem has."""
    return [path for path in target.iterdir() if path.name != LOST_AND_FOUND]


def _verify(backup: Path, manifest: BackupManifest) -> None:
    damage = [*find_damage(backup, manifest)]
    if damage:
        more = f" and {len(damage) - NAMED_MAX} more" if len(damage) > NAMED_MAX else ""
        raise _damaged(f"{'; '.join(damage[:NAMED_MAX])}{more}", damage)


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside or in the target, locked; it is gone afterwards, or renamed."""
    within = target if target.is_dir() else None
    staging = target.with_name(f".{target.name}.restoring")
    if within is not None:
        staging = DataDirectory(target).restoring
    _make(staging, within)
    descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor, staging, target)
        _clear(staging, within)  # of a restore that was killed
        try:
            yield staging
        except BaseException:
            _clear(staging, within)
            shutil.rmtree(staging, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def _make(staging: Path, within: Path | None) -> None:
    """Make the folder unless a killed restore has left it; in `within` only while that is empty."""
    try:
        staging.mkdir(mode=0o700)
    except FileExistsError:
        return
    if within is not None and _content(within) != [staging]:  # another restore has just finished
        staging.rmdir()
        raise _not_empty(within)


def _lock(descriptor: int, staging: Path, target: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = os.fstat(descriptor).st_ino == staging.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        is_there = False
    if not is_there:
        raise ConflictError(
            f"another restore to {target} is under way",
            code="restore_running",
            hint="Wait for it, or restore to another directory.",
        )


def _clear(staging: Path, within: Path | None) -> None:
    """Empty the staging folder, and the one that it lies in, if it does; it stays itself."""
    around = [] if within is None else [path for path in _content(within) if path != staging]
    for path in [*around, *staging.iterdir()]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _copy(backup: Path, staging: Path, file: BackupFile) -> None:
    target = staging / file.path
    try:
        make_dirs(target.parent)
        digest = copy_durably(backup / file.path, target)
    except OSError as error:
        raise StorageFullError(
            f"{file.path} could not be restored: {error}",
            hint="Free space or mend the disk; nothing was restored.",
        ) from error
    if digest != file.digest:
        raise _damaged(f"{file.path} changed while it was read", [file.path])
    # The backup may have come through tools that keep no modes.
    target.chmod(_BLOB_MODE if file.path.startswith(_BLOBS) else _FILE_MODE)


def _publish(staging: Path, target: Path) -> None:
    """Give the directory its name, or its content where it is there."""
    data = DataDirectory(staging)
    for path in (data.lock_file, data.lmdb / "lock.mdb"):  # fsck's
        path.unlink(missing_ok=True)
    sync_folders(staging)
    if staging.parent != target:
        _rename(staging, target)
        return
    for path in sorted(staging.iterdir()):
        path.rename(target / path.name)
    fsync_dir(target)
    staging.rmdir()  # from here on a daemon may start on it
    fsync_dir(target)


def _rename(staging: Path, target: Path) -> None:
    try:
        staging.rename(target)
    except OSError as error:
        raise _not_empty(target) from error  # somebody has made it meanwhile
    fsync_dir(target.parent)


def _not_empty(directory: Path) -> ConflictError:
    return ConflictError(
        f"{directory} is not empty",
        code="data_directory_not_empty",
        hint="Restore into a new or empty directory, then start the daemon on it.",
    )


def _damaged(what: str, damage: list[str]) -> ConflictError:
    return ConflictError(
        f"the backup is damaged: {what}",
        code="backup_damaged",
        hint="Restore from another backup; nothing was restored from this one.",
        details={"damage": damage},
    )


def _with_problems(report: dict[str, Any]) -> ConflictError:
    problems = [f"{p['subject']}: {p['message']}" for p in report["problems"]]
    return ConflictError(
        f"the restored directory has problems: {'; '.join(problems[:NAMED_MAX])}",
        code="restored_with_problems",
        hint="They were there when the backup was taken. Restore an older one, or this one with "
        "--despite-problems.",
        details={"fsck": report},
    )
