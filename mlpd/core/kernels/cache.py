"""Compiled objects on disk: written whole or not at all, verified on every load.

`<key>.o` is the native object as LLVM wrote it (readelf and objdump read it); `<key>.json` holds
the format version and the object's blake2b, and is renamed into place last.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

from mlpd.core.kernels.unit import FORMAT

FILES_MAX = 1024
"""Two for each module or set of transforms; a set is compiled anew whenever one changes."""


def symbol_of(kernel_name: str) -> str:
    """Return the object's symbol for a kernel."""
    return f"mlpd.{kernel_name}"


def store(cache_dir: Path, key: str, data: bytes) -> None:
    """Write an object under `key`; concurrent writers of one key leave one of their objects."""
    cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    digest = _digest(data)
    name = f"{key}-{digest[:8]}.o"
    record = {"format": FORMAT, "object": name, "blake2b": digest}
    _write(cache_dir / name, data)
    _write(cache_dir / f"{key}.json", json.dumps(record).encode())
    _prune(cache_dir)


def _prune(cache_dir: Path) -> None:
    """Delete the oldest files beyond FILES_MAX; whoever still wants one compiles it again."""
    try:
        aged = sorted((entry.stat().st_mtime_ns, entry.path) for entry in os.scandir(cache_dir))
    except FileNotFoundError:  # another process is pruning
        return
    for _, path in aged[:-FILES_MAX]:
        Path(path).unlink(missing_ok=True)


def fetch(cache_dir: Path, key: str) -> bytes | None:
    """Return the object stored under `key`, or None if it's absent or damaged."""
    try:
        record = json.loads((cache_dir / f"{key}.json").read_bytes())
        data = (cache_dir / Path(record["object"]).name).read_bytes()
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return data if _digest(data) == record.get("blake2b") else None


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _write(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
