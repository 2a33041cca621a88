"""A registered version's files as what serving and monitoring need, and back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from mlpd.core.vector import Vectorizer
from mlpd.monitoring.reference import ReferenceProfile
from mlpd.registry.lineage import Lineage
from mlpd.registry.versions import LoadedVersion
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


def read_version(loaded: LoadedVersion) -> TrainedVersion:
    """Return the version in a registry's files; parses about 1 MB of JSON: call it in a thread."""
    encoder = json.loads(loaded.files["encoder.json"])
    vectorizer = Vectorizer.from_dict(encoder)
    golden = _golden(loaded.files["golden.msgpack"])
    version = loaded.version
    lineage = loaded.lineage
    assert isinstance(lineage, Lineage)  # a run registered it
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


def _golden(data: bytes) -> GoldenRows:
    arrays: Mapping[str, Any] = {
        name: np.frombuffer(raw, np.float64).reshape(shape)
        for name, (shape, raw) in msgpack.unpackb(data).items()
    }
    outputs = {name: arrays[name] for name in ("raw_score", "score")}
    return GoldenRows({"features": arrays["features"]}, outputs)
