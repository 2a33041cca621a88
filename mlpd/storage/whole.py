"""Whether a directory is one that a daemon may start on."""

from mlpd.core.errors import ConflictError
from mlpd.storage.files import DataDirectory
from mlpd.storage.unnamed import FILE_NAME


def refuse_incomplete(data: DataDirectory) -> None:
    """Raise ConflictError if a restore hasn't finished or the log is lost; changes nothing.

    Codes: `restore_unfinished`; `log_missing` where there are segments and no LMDB, since an
    environment that a start would make there names none of them.
    """
    if data.restoring.exists():
        raise ConflictError(
            f"a restore into {data.root} has not finished",
            code="restore_unfinished",
            hint="Wait for it; if it was ended, run mlpd restore again: it begins anew.",
        )
    if (data.lmdb / "data.mdb").is_file():
        return
    found = next((p for p in data.segments.rglob("*") if FILE_NAME.fullmatch(p.name)), None)
    if found is not None:
        raise ConflictError(
            f"{data.root} has segments, such as {found.relative_to(data.root)}, but no "
            "lmdb/data.mdb: the log that they belong to is gone",
            code="log_missing",
            hint="Nothing was removed. Bring the folder lmdb back, or restore a backup into a new "
            "directory (mlpd restore). To begin anew, take an empty directory.",
        )
