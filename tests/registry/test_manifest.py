"""Manifest, config and index: their exact form, and what is refused when read."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mlpd.core.errors import ValidationError
from mlpd.core.hashing import canonical_json
from mlpd.registry.descriptors import Descriptor
from mlpd.registry.manifest import (
    CONFIG_TYPE,
    Manifest,
    build_config,
    build_index,
    layer,
    media_type_of,
    ordered,
)
from mlpd.registry.records import ModelVersion, VersionState
from mlpd.registry.referrers import build_referrers

DIGEST = "sha256:" + "ab" * 32
SUBJECT = Descriptor("application/vnd.oci.image.manifest.v1+json", DIGEST, 321)
FILES = ["parity.json", "golden.msgpack", "lineage.json", "model.txt", "model.onnx"]


def manifest() -> Manifest:
    files = {name: layer(name, DIGEST, 10) for name in ordered(FILES)}
    return Manifest("clf", Descriptor(CONFIG_TYPE, DIGEST, 5), files)


def form() -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(manifest().encode())
    return decoded


def test_a_manifest_survives_its_bytes() -> None:
    assert Manifest.decode(manifest().encode()) == manifest()


def test_layers_come_weights_first_and_then_by_role() -> None:
    titles = [x["annotations"]["org.opencontainers.image.title"] for x in form()["layers"]]
    assert titles == ["model.onnx", "model.txt", "lineage.json", "golden.msgpack", "parity.json"]
    assert ordered(FILES) == ordered(reversed(FILES))


def test_a_manifest_is_modelpack() -> None:
    decoded = form()
    assert decoded["schemaVersion"] == 2
    assert decoded["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert decoded["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert decoded["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    assert [x["mediaType"] for x in decoded["layers"]] == [
        "application/vnd.cncf.model.weight.v1.raw",
        "application/vnd.cncf.model.weight.v1.raw",
        "application/vnd.mlpd.lineage.v1+json",
        "application/vnd.mlpd.golden.v1+msgpack",
        "application/vnd.mlpd.parity.v1+json",
    ]
    assert decoded["layers"][0]["annotations"]["org.cncf.model.filepath"] == "model.onnx"


MODELPACK = json.loads(Path(__file__).with_name("modelpack-config-schema.json").read_bytes())
"""schema/config-schema.json of github.com/modelpack/model-spec at commit d78bf3231b4f."""


@pytest.mark.parametrize("revision", [None, "0f" * 20])
def test_the_config_is_valid_under_the_modelpack_schema(revision: str | None) -> None:
    config = json.loads(build_config("clf", manifest().files, revision))
    jsonschema.Draft202012Validator(MODELPACK).validate(config)
    with pytest.raises(jsonschema.ValidationError):  # the schema does refuse what isn't in it
        jsonschema.Draft202012Validator(MODELPACK).validate({**config, "more": 1})
    assert config.keys() == {"descriptor", "config", "modelfs"}
    assert config["descriptor"].keys() <= {"name", "revision"}
    assert config["config"] == {"architecture": "gbdt", "format": "onnx"}
    assert config["modelfs"] == {"type": "layers", "diffIds": [DIGEST] * 5}


@pytest.mark.parametrize(
    "filename",
    [
        "",
        "model",
        "model.pkl",
        "../model.onnx",
        "notes.json",
        "lineage",
        "lineage.msgpack",
        "report.exe",
        "a/b.json",
    ],
)
def test_files_outside_the_list_are_refused(filename: str) -> None:
    with pytest.raises(ValidationError) as caught:
        media_type_of(filename)
    assert caught.value.code == "unknown_file"


def broken(path: str, value: object) -> dict[str, Any]:
    decoded = form()
    *parents, last = path.split("/")
    place: Any = decoded
    for step in parents:
        place = place[int(step) if step.isdigit() else step]
    place[last] = value
    return decoded


@pytest.mark.parametrize(
    "decoded",
    [
        broken("artifactType", "application/vnd.docker.image"),
        broken("schemaVersion", 1),
        broken("annotations", {}),
        broken("layers", []),
        broken("layers", {}),
        broken("layers/0/digest", "sha256:../../etc/passwd"),
        broken("layers/0/digest", "sha512:" + "0" * 64),
        broken("layers/0/size", -1),
        broken("layers/0/size", "10"),
        broken("layers/0/mediaType", "application/vnd.mlpd.lineage.v1+json"),
        broken("layers/0/annotations", {"org.cncf.model.filepath": 5}),
        broken("layers/1/annotations", {"org.cncf.model.filepath": "model.onnx"}),
        broken("config", None),
        [],
        None,
    ],
)
def test_a_wrong_manifest_is_refused(decoded: object) -> None:
    with pytest.raises(ValidationError):
        Manifest.decode(canonical_json(decoded))


@pytest.mark.parametrize("data", [b"", b"\x80", b"[" * 100_000])
def test_bytes_that_are_no_json_are_refused(data: bytes) -> None:
    with pytest.raises(ValidationError) as caught:
        Manifest.decode(data)
    assert caught.value.code == "invalid_manifest"


def version(number: int, state: VersionState) -> ModelVersion:
    return ModelVersion(
        name="clf",
        number=number,
        digest=DIGEST,
        size_bytes=321,
        state=state,
        created_us=1_385_856_000_000_000,
        created_by="tester",
        reason="",
    )


def test_the_index_tags_every_version_that_is_not_deleted() -> None:
    signed = {"ab" * 32: "cd" * 64}
    versions = [(version(1, VersionState.READY), signed), (version(2, VersionState.DELETED), {})]
    index = json.loads(build_index(versions))
    assert index["manifests"][:1] == [
        {
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "artifactType": "application/vnd.cncf.model.manifest.v1+json",
            "digest": DIGEST,
            "size": 321,
            "annotations": {
                "org.opencontainers.image.ref.name": "clf-v1",
                "org.opencontainers.image.created": "2013-12-01T00:00:00Z",
                "vnd.mlpd.model.name": "clf",
                "vnd.mlpd.model.version": "1",
                "vnd.mlpd.model.state": "ready",
            },
        }
    ]
    assert index["manifests"][1:] == [*build_referrers(SUBJECT, signed).entries]
