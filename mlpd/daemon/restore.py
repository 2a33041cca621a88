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

    Until all is copied and checked it lies in `.<name>.restoring` beside it, where a killed restore
    leaves it; the next one removes that.  Raises NotFoundError(code="no_backup"), ConflictError:
    `backup_damaged`, `data_directory_not_empty`, `restore_running`, `restored_with_problems`
    (unless `despite_problems`); nothing is left of it then.
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
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConflictError(
            f"{directory} is not empty",
            code="data_directory_not_empty",
            hint="Restore into a new directory, then start the daemon on it.",
        )
    return target


def _verify(backup: Path, manifest: BackupManifest) -> None:
    damage = [*find_damage(backup, manifest)]
    if damage:
        more = f" and {len(damage) - NAMED_MAX} more" if len(damage) > NAMED_MAX else ""
        raise _damaged(f"{'; '.join(damage[:NAMED_MAX])}{more}", damage)


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside the target, locked; it is gone afterwards, or renamed."""
    staging = target.with_name(f".{target.name}.restoring")
    staging.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConflictError(
                f"another restore to {target} is under way",
                code="restore_running",
                hint="Wait for it, or restore to another directory.",
            ) from None
        _remove_content(staging)  # of a restore that was killed
        try:
            yield staging
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def _remove_content(directory: Path) -> None:
    for path in directory.iterdir():
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
    """Give the directory its name."""
    data = DataDirectory(staging)
    for path in (data.lock_file, data.lmdb / "lock.mdb"):  # fsck's
        path.unlink(missing_ok=True)
    sync_folders(staging)
    try:
        staging.rename(target)
    except OSError as error:
        raise ConflictError(
            f"{target} can't be replaced: {error.strerror}",
            code="data_directory_not_empty",
            hint="Restore to a directory that doesn't exist yet; a mount point can't be replaced, "
            "a folder below it can.",
        ) from error
    fsync_dir(target.parent)


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
