"""Segment files that no manifest names: left by a crash, or all that is left of a lost log.

Those of a crash go at the next start.  They hold rows that the log has, too; files with later rows
belong to another log than the one in LMDB, and are never removed.
"""

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from mlpd.core.errors import ConflictError
from mlpd.storage.segments import Manifest, load_manifests
from mlpd.storage.transactions import Snapshot

logger = logging.getLogger(__name__)

FILE_NAME = re.compile(r"\d+-(\d+)(\.\d+)?\.(parquet|json)")
"""Names of segments and of manifests' copies; what lies in `_tmp` has others."""


def find_unnamed(manifests: Iterable[Manifest], directory: Path) -> list[Path]:
    """Return the files below `directory` that no manifest names, sorted."""
    named = {directory / path for manifest in manifests for path in manifest.files}
    return sorted(p for p in directory.rglob("*") if p.is_file() and p not in named)


def find_beyond(paths: Iterable[Path], sequence: int) -> list[Path]:
    """Return the files that hold rows after `sequence`, the newest that LMDB has."""
    found = ((path, FILE_NAME.fullmatch(path.name)) for path in paths)
    return [path for path, name in found if name is not None and int(name[1]) > sequence]


def remove_orphans(snapshot: Snapshot, directory: Path) -> list[Path]:
    """Remove the files that no manifest names, left by a crashed compaction; return them.

    Only at start, before the first compaction: a running one has files that nobody names yet.
    Keeps them all where a file that a manifest names is missing: one of them may have its rows.
    Raises ConflictError(code="log_behind_segments") if one has rows that the log never had.
    """
    manifests = load_manifests(snapshot)
    orphans = find_unnamed(manifests, directory)
    beyond = find_beyond(orphans, snapshot.sequence)
    if beyond:
        raise _log_behind(beyond, snapshot.sequence, directory)
    missing = [p for m in manifests for p in m.files if not (directory / p).is_file()]
    if missing:
        logger.error("%d files of segments are missing: run mlpd fsck", len(missing))
        return []
    for path in orphans:
        path.unlink()
    return orphans


def _log_behind(beyond: list[Path], sequence: int, directory: Path) -> ConflictError:
    return ConflictError(
        f"{len(beyond)} files below {directory} hold rows that the log in LMDB, which ends at "
        f"sequence {sequence}, never had, such as {beyond[0].relative_to(directory)}",
        code="log_behind_segments",
        hint="Nothing was removed. Bring lmdb and segments back from one backup (mlpd restore); "
        "files that belong to another data directory, move away.",
    )
