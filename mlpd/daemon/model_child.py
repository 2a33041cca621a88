"""Child entry `model`: looks at an upload (an ONNX file or an archive of a version) under limits.

Whatever the bytes do, they do it here: the limits are on memory, processor time, size and number of
files, and the parent ends the process when it takes too long.
"""

import resource
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from mlpd.core.errors import MlpdError, ValidationError
from mlpd.daemon.child import Send
from mlpd.daemon.packages import read_package
from mlpd.registry.archive import read_archive
from mlpd.registry.manifest import MODEL_FILE
from mlpd.registry.origin import Origin
from mlpd.registry.records import ModelVersion, VersionState
from mlpd.registry.signing import require_valid
from mlpd.registry.versions import VersionStore
from mlpd.serving.check import check_model
from mlpd.serving.golden import load_golden
from mlpd.serving.sessions import Session
from mlpd.storage.blobs import BlobStore

_OPEN_FILES_MAX = 64


def run(request: dict[str, Any], _: Send) -> dict[str, Any]:
    """Return what the upload in `directory` is; raises ValidationError for one that is refused.

    `kind` onnx: `model.onnx`, perhaps `golden.json`; gives `signature` and `origin`.  `kind`
    archive: `archive.tar`, whose blobs are then below `directory`; gives `digest`, `size_bytes`,
    `signatures`, which hold.
    """
    _limit(request["cpu_s"], request["file_bytes_max"])
    directory = Path(request["directory"])
    return _look_at_archive(directory) if request["kind"] == "archive" else _look_at_onnx(directory)


def _look_at_onnx(directory: Path) -> dict[str, Any]:
    rows = directory / "golden.json"
    golden = load_golden(rows.read_bytes()) if rows.exists() else None
    found = check_model((directory / MODEL_FILE).read_bytes(), golden)
    origin = Origin(
        producer=found.producer,
        producer_version=found.producer_version,
        opsets=dict(found.opsets),
        nodes=found.nodes,
        parameters=found.parameters,
        packages={name: version_of(name) for name in ("onnx", "onnxruntime")},
    )
    return {"signature": found.signature.to_dict(), "origin": origin.encode()}


def _look_at_archive(directory: Path) -> dict[str, Any]:
    blobs = BlobStore(directory)
    pointer, manifest, signatures = read_archive(directory / "archive.tar", blobs)
    version = ModelVersion(
        name=manifest.name,
        number=1,
        digest=pointer.digest,
        size_bytes=pointer.size_bytes,
        state=VersionState.READY,
        created_us=0,
        created_by="",
        reason="",
    )
    try:
        package = read_package(VersionStore(blobs).load(version))
    except (MlpdError, ValueError, KeyError, TypeError, LookupError, AttributeError) as error:
        raise ValidationError(
            f"the archive can't be imported: a file of {manifest.name!r} can't be read: {error!r}",
            code="invalid_archive",
            hint="Export it anew, with the same version of mlpd.",
        ) from error
    check_model(package.onnx)
    if not package.trained:
        Session(package).verify()
    for key, signature in signatures.items():
        require_valid(key, signature, pointer.digest)
    return {
        "digest": pointer.digest,
        "size_bytes": pointer.size_bytes,
        "signatures": dict(signatures),
    }


def _limit(cpu_s: int, file_bytes_max: int) -> None:
    for kind, most in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, file_bytes_max),
        (resource.RLIMIT_NOFILE, _OPEN_FILES_MAX),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
