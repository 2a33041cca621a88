"""What an LMDB error means: the disk, the map, or a bug; and the mlpd error that says so."""

import errno

import lmdb

from mlpd.core.errors import InternalError, MlpdError, OverloadedError, StorageFullError

MAX_READERS = 512
"""Read transactions open at once, those of all child processes together."""

_DISK_ERRORS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ENOMEM)
)


def is_storage_failure(error: BaseException) -> bool:
    """Tell whether the disk or the map failed (the whole group), not one operation."""
    failures = (lmdb.MapFullError, lmdb.PanicError, lmdb.DiskError, lmdb.MapResizedError)
    return isinstance(error, failures) or (
        isinstance(error, lmdb.Error) and error.code in _DISK_ERRORS
    )


def translate_error(error: lmdb.Error) -> MlpdError:
    """Return the mlpd error that tells a caller what an LMDB error means."""
    if isinstance(error, lmdb.MapFullError):
        return StorageFullError(
            "the LMDB map is full; this write was not made",
            code="map_full",
            hint="Raise the map size in the configuration and restart the daemon.",
        )
    if isinstance(error, lmdb.ReadersFullError):
        return OverloadedError(
            f"all {MAX_READERS} reader slots are in use",
            code="readers_full",
            hint="Try again shortly.",
            details={"retry_after_s": 0.1},
        )
    if is_storage_failure(error):
        return StorageFullError(
            f"the disk is full or failing ({error}); this write was not made",
            hint="Free space or mend the disk; writes go on by themselves within seconds.",
        )
    return InternalError(f"LMDB failed: {error}", code="lmdb")
