"""Descriptors: pointers to blobs by media type, digest and size, in their OCI form."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from mlpd.core.errors import ValidationError

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
        raise invalid_manifest(f"{what} is not a descriptor with a sha256 digest and a size")


def invalid_manifest(reason: str) -> ValidationError:
    """Return the error for a manifest that can't be read."""
    return ValidationError(
        f"the manifest can't be read: {reason}",
        code="invalid_manifest",
        hint="Only versions that mlpd registered can be loaded.",
    )


def _is_annotations(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return all(isinstance(k, str) and isinstance(v, str) for k, v in value.items())
