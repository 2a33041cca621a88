"""A registered version's files as what serving and monitoring need, and back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from mlpd.core.errors import ConflictError
from mlpd.core.vector import Vectorizer
from mlpd.monitoring.reference import ReferenceProfile
from mlpd.registry.lineage import Lineage
from mlpd.registry.origin import Origin
from mlpd.registry.versions import LoadedVersion
from mlpd.serving.golden import load_golden, parse_golden
from mlpd.serving.package import GoldenRows, ModelPackage, Signature


@dataclass(frozen=True, slots=True)
class TrainedVersion:
    """A version trained here: `package` for serving, `vectorizer` and `profile` frozen into it."""

    package: ModelPackage
    vectorizer: Vectorizer
    profile: ReferenceProfile
    lineage: Lineage

    @property
    def reference(self) -> str:
        """`name@version`."""
        return self.package.reference


def read_package(loaded: LoadedVersion) -> ModelPackage:
    """Return what serves a version, trained here or uploaded; call it in a thread."""
    if isinstance(loaded.lineage, Origin):
        return _read_upload(loaded)
    return read_version(loaded).package


def read_version(loaded: LoadedVersion) -> TrainedVersion:
    """Return the version in a registry's files; parses about 1 MB of JSON: call it in a thread.

    Raises ConflictError(code="not_trained_here") for a user's ONNX file.
    """
    if isinstance(loaded.lineage, Origin):
        raise ConflictError(
            f"{loaded.version.reference} was uploaded: it has no features and no profile",
            code="not_trained_here",
            hint="Drift and routes are for models that mlpd trained; reach it under /v2.",
        )
    encoder = json.loads(loaded.files["encoder.json"])
    vectorizer = Vectorizer.from_dict(encoder)
    golden = _golden(loaded.files["golden.msgpack"])
    version = loaded.version
    lineage = loaded.lineage
    package = ModelPackage(
        name=version.name,
        version=version.number,
        digest=version.digest,
        onnx=loaded.files["model.onnx"],
        signature=Signature.of_vectors(vectorizer, golden.outputs["score"].shape[1]),
        link=encoder["link"],
        golden=golden,
        metadata={"service": lineage.service, "service_hash": lineage.service_hash},
    )
    profile = ReferenceProfile.from_dict(json.loads(loaded.files["profile.json"]))
    return TrainedVersion(package, vectorizer, profile, lineage)


def _read_upload(loaded: LoadedVersion) -> ModelPackage:
    signature = Signature.from_dict(json.loads(loaded.files["signature.json"]))
    rows = loaded.files.get("golden.json")
    version = loaded.version
    return ModelPackage(
        name=version.name,
        version=version.number,
        digest=version.digest,
        onnx=loaded.files["model.onnx"],
        signature=signature,
        golden=None if rows is None else parse_golden(load_golden(rows), signature),
    )


def _golden(data: bytes) -> GoldenRows:
    arrays: Mapping[str, Any] = {
        name: np.frombuffer(raw, np.float64).reshape(shape)
        for name, (shape, raw) in msgpack.unpackb(data).items()
    }
    outputs = {name: arrays[name] for name in ("raw_score", "score")}
    return GoldenRows({"features": arrays["features"]}, outputs)
