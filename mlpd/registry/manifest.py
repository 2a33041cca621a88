"""Manifests: a model version as an OCI image manifest in CNCF ModelPack form, bytes out and in.

Equal content gives equal bytes: keys sorted, layers in one order, no number and no time.  Numbers
and times belong to the records and to the tags in index.json.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlpd.core.errors import ValidationError
from mlpd.core.hashing import canonical_json
from mlpd.core.names import check_name
from mlpd.core.time import format_time, parse_time
from mlpd.registry.descriptors import Descriptor, invalid_manifest
from mlpd.registry.records import ModelVersion, VersionState
from mlpd.registry.referrers import (
    INDEX_TYPE,
    MANIFEST_TYPE,
    REF_NAME,
    TITLE,
    Referrers,
    build_referrers,
    merge_signatures,
)

ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
WEIGHT_TYPE = "application/vnd.cncf.model.weight.v1.raw"

FILEPATH = "org.cncf.model.filepath"
CREATED = "org.opencontainers.image.created"
MODEL_NAME = "vnd.mlpd.model.name"
MODEL_VERSION = "vnd.mlpd.model.version"
MODEL_STATE = "vnd.mlpd.model.state"
SIGNATURE = "vnd.mlpd.signature."
"""Followed by a public key in hex: how signatures were kept before they were referrers."""

MODEL_FILE = "model.onnx"
LINEAGE_FILE = "lineage.json"
WEIGHT_FILES = (MODEL_FILE, "model.txt")
ROLES = (
    "signature",
    "encoder",
    "lineage",
    "profile",
    "golden",
    "parity",
    "report",
    "calibration",
    "components",
)
"""Kinds of files beside the weights; a file is named `<role>.<format>`."""

FORMATS = ("json", "msgpack", "arrow")
PICTURES = ("importance", "contributions", "learning", "calibration", "roc")
"""What a version may be looked at by, as files `<picture>.svg`."""

PICTURE_TYPE = "image/svg+xml"


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
        raise invalid_manifest(f"it is not an image manifest of artifactType {ARTIFACT_TYPE}")


def media_type_of(filename: str) -> str:
    """Return a file's media type, else raise ValidationError(code="unknown_file")."""
    if filename in WEIGHT_FILES:
        return WEIGHT_TYPE
    role, _, suffix = filename.partition(".")
    if role in ROLES and suffix in FORMATS and (role != "lineage" or filename == LINEAGE_FILE):
        return f"application/vnd.mlpd.{role}.v1+{suffix}"
    if role in PICTURES and suffix == "svg":
        return PICTURE_TYPE
    raise ValidationError(
        f"a model version has no file {filename!r}",
        code="unknown_file",
        hint=f"Files are {', '.join(WEIGHT_FILES)} and ROLE.FORMAT with a role out of "
        f"{', '.join(ROLES)} and a format out of {', '.join(FORMATS)}; pictures are "
        f"{', '.join(PICTURES)}, as .svg.",
    )


def ordered(filenames: Iterable[str]) -> list[str]:
    """Return file names in the order of a manifest's layers: weights first, then by role."""
    ranks = {name: rank for rank, name in enumerate((*WEIGHT_FILES, *ROLES, *PICTURES))}
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


def build_index(entries: Iterable[tuple[ModelVersion, Mapping[str, str]]]) -> bytes:
    """Return index.json: one tagged manifest per version that is not deleted, canonical JSON.

    `entries` are versions with their signatures by key; referrers to these come last.
    """
    live = [entry for entry in entries if not entry[0].is_deleted]
    signed = [entry for found in referrers_of(live) for entry in found.entries]
    return canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": INDEX_TYPE,
            "manifests": [*(_index_entry(version) for version, _ in live), *signed],
        }
    )


def referrers_of(entries: Iterable[tuple[ModelVersion, Mapping[str, str]]]) -> list[Referrers]:
    """Return what refers to each signed manifest, of versions with their signatures by key."""
    merged = merge_signatures(
        (Descriptor(MANIFEST_TYPE, version.digest, version.size_bytes), signatures)
        for version, signatures in entries
        if signatures
    )
    return [build_referrers(*found) for found in merged.values()]


def parse_index(data: bytes | None) -> list[ModelVersion]:
    """Return the versions that an index.json lists; entries that are not ours are left out.

    Bytes that are no index list nothing: the file is derived and is written anew.
    """
    match _try_json(data):
        case {"manifests": [*forms]}:
            return [version for form in forms if (version := _parse_entry(form))]
    return []


def read_signatures(annotations: Mapping[str, str]) -> dict[str, str]:
    """Return the signatures by key among the annotations of an entry; nothing is verified."""
    return {
        name.removeprefix(SIGNATURE): value
        for name, value in annotations.items()
        if name.startswith(SIGNATURE)
    }


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
            raise invalid_manifest(f"layer {filename!r} has another media type or comes twice")
        files[filename] = descriptor
    if MODEL_FILE not in files or LINEAGE_FILE not in files:
        raise invalid_manifest(f"it lacks {MODEL_FILE} or {LINEAGE_FILE}")
    return files


def _role(filename: str) -> str:
    return filename.partition(".")[0]


def _load_json(data: bytes) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise invalid_manifest(f"it is not JSON: {error}") from None


def _try_json(data: bytes | None) -> object:
    try:
        return None if data is None else _load_json(data)
    except ValidationError:
        return None
