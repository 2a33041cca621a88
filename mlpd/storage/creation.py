"""Creates an environment so that a power cut or a full disk leaves either none or a whole one.

LMDB writes the two pages of a new file without flushing them.  What a power cut leaves of them is
no LMDB file, and no later start would open it.
"""

import shutil
from pathlib import Path

import lmdb

from mlpd.storage.files import fsync_dir, make_dirs

NEW = ".new"
"""Folder in the environment's where it is made; what a crash leaves there is made anew."""


def create_environment(directory: Path, databases: list[bytes], map_bytes: int) -> None:
    """Make `directory` with an environment of these empty databases, unless it has one; durable.

    Raises OSError or lmdb.Error; then there is none.  The name of an existing one is made durable
    too: the process that made it may have been killed before it could.
    """
    make_dirs(directory)
    if not (directory / "data.mdb").exists():
        _create(directory, databases, map_bytes)
    fsync_dir(directory)


def _create(directory: Path, databases: list[bytes], map_bytes: int) -> None:
    new = directory / NEW
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(0o700)
    environment = lmdb.open(str(new), map_bytes, mode=0o600, max_dbs=len(databases), lock=False)
    try:
        with environment.begin(write=True) as txn:  # a commit flushes all that was written
            for name in databases:
                environment.open_db(name, txn=txn)
    finally:
        environment.close()
    (new / "data.mdb").replace(directory / "data.mdb")
    shutil.rmtree(new)
