"""Manifests: a model version as an OCI image manifest in CNCF ModelPack form, bytes out and in.

Equal content gives equal bytes: keys sorted, layers in one order, no number and no time.  Numbers
and times belong to the records and to the tags in index.json.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from mlpd.core.errors import ValidationError
from mlpd.core.hashing import canonical_json
from mlpd.core.names import check_name
from mlpd.core.time import format_time, parse_time
from mlpd.registry.records import ModelVersion, VersionState

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
WEIGHT_TYPE = "application/vnd.cncf.model.weight.v1.raw"

FILEPATH = "org.cncf.model.filepath"
TITLE = "org.opencontainers.image.title"
REF_NAME = "org.opencontainers.image.ref.name"
CREATED = "org.opencontainers.image.created"
MODEL_NAME = "vnd.mlpd.model.name"
MODEL_VERSION = "vnd.mlpd.model.version"
MODEL_STATE = "vnd.mlpd.model.state"

MODEL_FILE = "model.onnx"
LINEAGE_FILE = "lineage.json"
WEIGHT_FILES = (MODEL_FILE, "model.txt")
ROLES = ("signature", "encoder", "lineage", "profile", "golden", "parity", "report")
"""Kinds of files beside the weights; a file is named `<role>.<format>`."""

FORMATS = ("json", "msgpack", "arrow")

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A pointer to a blob: media type, `sha256:...` digest, exact size in bytes."""

    media_type: str
    digest: str
    size_bytes: int
    annotations: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the OCI form."""
        form = {"mediaType": self.media_type, "digest": self.digest, "size": self.size_bytes}
        return form | ({"annotations": dict(self.annotations)} if self.annotations else {})

    @classmethod
    def parse(cls, form: object, what: str) -> "Descriptor":
        """Return the descriptor of an OCI form; raises ValidationError(code="invalid_manifest")."""
        match form:
            case {"mediaType": str(media_type), "digest": str(digest), "size": int(size_bytes)}:
                annotations = cast(Mapping[str, Any], form).get("annotations", {})
                if _DIGEST.fullmatch(digest) and size_bytes >= 0 and _is_annotations(annotations):
                    return cls(media_type, digest, size_bytes, annotations)
        raise _invalid(f"{what} is not a descriptor with a sha256 digest and a size")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a version consists of: its model's name, the ModelPack config and the files."""

    name: str
    config: Descriptor
    files: Mapping[str, Descriptor]
    """Layers by file name, in the order of the manifest."""

    @property
    def blobs(self) -> Iterable[Descriptor]:
        """Everything that the manifest points to, the config first."""
        return (self.config, *self.files.values())

    def encode(self) -> bytes:
        """Return the manifest's canonical JSON."""
        return canonical_json(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST_TYPE,
                "artifactType": ARTIFACT_TYPE,
                "config": self.config.to_dict(),
                "layers": [layer.to_dict() for layer in self.files.values()],
                "annotations": {MODEL_NAME: self.name},
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> "Manifest":
        """Return the manifest in `data`, checked; raises ValidationError(code="invalid_manifest").

        Layers of media types that are not ours are refused, as are two layers of one name.
        """
        match _load_json(data):
            case {
                "schemaVersion": 2,
                "artifactType": str(artifact_type),
                "config": config,
                "layers": [*layers],
                "annotations": {"vnd.mlpd.model.name": str(name)},
            } if artifact_type == ARTIFACT_TYPE:
                return cls(name, Descriptor.parse(config, "config"), _parse_layers(layers))
        raise _invalid(f"it is not an image manifest of artifactType {ARTIFACT_TYPE}")


def media_type_of(filename: str) -> str:
    """Return a file's media type, else raise ValidationError(code="unknown_file")."""
    if filename in WEIGHT_FILES:
        return WEIGHT_TYPE
    role, _, suffix = filename.partition(".")
    if role in ROLES and suffix in FORMATS and (role != "lineage" or filename == LINEAGE_FILE):
        return f"application/vnd.mlpd.{role}.v1+{suffix}"
    raise ValidationError(
        f"a model version has no file {filename!r}",
        code="unknown_file",
        hint=f"Files are {', '.join(WEIGHT_FILES)} and ROLE.FORMAT with a role out of "
        f"{', '.join(ROLES)} and a format out of {', '.join(FORMATS)}.",
    )


def ordered(filenames: Iterable[str]) -> list[str]:
    """Return file names in the order of a manifest's layers: weights first, then by role."""
    ranks = {name: rank for rank, name in enumerate((*WEIGHT_FILES, *ROLES))}
    return sorted(filenames, key=lambda name: (ranks.get(name, ranks.get(_role(name), 0)), name))


def layer(filename: str, digest: str, size_bytes: int) -> Descriptor:
    """Return the layer of one file, named so that oras and ModelPack tools restore it."""
    return Descriptor(
        media_type_of(filename), digest, size_bytes, {FILEPATH: filename, TITLE: filename}
    )


def build_config(name: str, files: Mapping[str, Descriptor], revision: str | None) -> bytes:
    """Return the ModelPack config: `files` in layer order, `revision` the git commit if known.

    Layers are raw, so that each diffId is the layer's digest.  The schema admits no other keys.
    """
    technical = {"format": "onnx"} | ({"architecture": "gbdt"} if "model.txt" in files else {})
    return canonical_json(
        {
            "descriptor": {"name": name} | ({"revision": revision} if revision else {}),
            "config": technical,
            "modelfs": {"type": "layers", "diffIds": [d.digest for d in files.values()]},
        }
    )


def build_index(versions: Iterable[ModelVersion]) -> bytes:
    """Return index.json: one tagged manifest per version that is not deleted, canonical JSON."""
    return canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": INDEX_TYPE,
            "manifests": [_index_entry(v) for v in versions if not v.is_deleted],
        }
    )


def parse_index(data: bytes | None) -> list[ModelVersion]:
    """Return the versions that an index.json lists; entries that are not ours are left out.

    Bytes that are no index list nothing: the file is derived and is written anew.
    """
    match _try_json(data):
        case {"manifests": [*forms]}:
            return [version for form in forms if (version := _parse_entry(form))]
    return []


def _index_entry(version: ModelVersion) -> dict[str, Any]:
    annotations = {
        REF_NAME: version.tag,
        CREATED: format_time(version.created_us),
        MODEL_NAME: version.name,
        MODEL_VERSION: str(version.number),
        MODEL_STATE: str(version.state),
    }
    form = Descriptor(MANIFEST_TYPE, version.digest, version.size_bytes, annotations).to_dict()
    return form | {"artifactType": ARTIFACT_TYPE}


def _parse_entry(form: object) -> ModelVersion | None:
    try:
        descriptor = Descriptor.parse(form, "entry")
        notes = descriptor.annotations
        return ModelVersion(
            name=check_name(notes[MODEL_NAME], "model"),
            number=int(notes[MODEL_VERSION]),
            digest=descriptor.digest,
            size_bytes=descriptor.size_bytes,
            state=VersionState(notes[MODEL_STATE]),
            created_us=parse_time(notes[CREATED]),
            created_by="",
            reason="",
        )
    except (KeyError, ValueError, ValidationError):
        return None


def _parse_layers(forms: list[object]) -> dict[str, Descriptor]:
    files: dict[str, Descriptor] = {}
    for form in forms:
        descriptor = Descriptor.parse(form, "layer")
        filename = descriptor.annotations.get(FILEPATH, "")
        if filename in files or descriptor.media_type != media_type_of(filename):
            raise _invalid(f"layer {filename!r} has another media type or comes twice")
        files[filename] = descriptor
    if MODEL_FILE not in files or LINEAGE_FILE not in files:
        raise _invalid(f"it lacks {MODEL_FILE} or {LINEAGE_FILE}")
    return files


def _role(filename: str) -> str:
    return filename.partition(".")[0]


def _load_json(data: bytes) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _invalid(f"it is not JSON: {error}") from None


def _try_json(data: bytes | None) -> object:
    try:
        return None if data is None else _load_json(data)
    except ValidationError:
        return None


def _is_annotations(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return all(isinstance(k, str) and isinstance(v, str) for k, v in value.items())


def _invalid(reason: str) -> ValidationError:
    return ValidationError(
        f"the manifest can't be read: {reason}",
        code="invalid_manifest",
        hint="Only versions that mlpd registered can be loaded.",
    )
