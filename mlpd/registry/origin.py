"""Origin: the lineage.json of a version that was not trained here, as far as its file tells."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from mlpd.core.errors import ValidationError
from mlpd.core.hashing import canonical_json
from mlpd.registry.json_values import is_json, is_text
from mlpd.registry.lineage import Lineage


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What is known of a user's ONNX file; JSON, canonical bytes.

    `producer` and `producer_version`: as the file says, may be empty.  `opsets`: version by domain.
    `nodes` and `parameters`: how many operators and constant values it holds, subgraphs included.
    `packages`: versions of what looked at it.
    """

    source: Literal["upload"] = "upload"
    producer: str
    producer_version: str
    opsets: Mapping[str, int]
    nodes: int
    parameters: int
    packages: Mapping[str, str]

    @classmethod
    def parse(cls, document: object) -> "Origin":
        """Return the origin that a mapping describes; raises ValidationError."""
        names = {field.name for field in fields(cls)}
        if not (isinstance(document, Mapping) and document.keys() == names and is_json(document)):
            raise _invalid(f"it takes the fields {', '.join(sorted(names))}")
        texts = ("producer", "producer_version")
        counts = ("nodes", "parameters")
        if document["source"] != "upload":
            raise _invalid(f"source {document['source']!r} is unknown")
        if not all(is_text(document[name]) for name in texts):
            raise _invalid("producer and producer_version are texts")
        if not all(type(document[name]) is int and document[name] >= 0 for name in counts):
            raise _invalid("nodes and parameters are counts")
        if not (_maps(document["opsets"], int) and _maps(document["packages"], str)):
            raise _invalid("opsets and packages are versions by name")
        return cls(**document)

    @classmethod
    def decode(cls, data: bytes) -> "Origin":
        """Return the origin that `encode` wrote."""
        return cls.parse(json.loads(data))

    def encode(self) -> bytes:
        """Return canonical JSON."""
        return canonical_json(asdict(self))


def decode_lineage(data: bytes) -> Lineage | Origin:
    """Return what a lineage.json holds; raises ValidationError(code="invalid_lineage")."""
    try:
        document: Any = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, Mapping) and "source" in document:
        return Origin.parse(document)
    return Lineage.decode(data)


def _maps(value: object, kind: type) -> bool:
    return isinstance(value, Mapping) and all(type(item) is kind for item in value.values())


def _invalid(problem: str) -> ValidationError:
    return ValidationError(
        f"the lineage of an uploaded model can't be read: {problem}",
        code="invalid_lineage",
        hint="docs/formats/registry.md lists its fields.",
    )
