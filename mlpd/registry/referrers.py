"""Referrers: signatures as OCI artifacts whose `subject` is what they sign, bytes out and in.

Made from the records whenever index.json is: equal signatures give equal bytes.  Of a signed
digest there are, as the OCI distribution specification has it:

- for each key a manifest with the signed manifest as its `subject`, and the signature as its layer;
- an image index that lists these, tagged `sha256-<64 hex digits of the signed digest>`: where who
  has no referrers API looks (the "referrers tag schema").
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlpd.core.errors import MlpdError, ValidationError
from mlpd.core.hashing import canonical_json
from mlpd.registry.descriptors import Descriptor
from mlpd.storage.blobs import BlobStore

SIGNATURE_TYPE = "application/vnd.mlpd.signature.ed25519.v1+json"
EMPTY_TYPE, EMPTY = "application/vnd.oci.empty.v1+json", b"{}"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
REF_NAME = "org.opencontainers.image.ref.name"
TITLE = "org.opencontainers.image.title"
KEY = "vnd.mlpd.signature.key"

SIGNATURES_MAX = 16
"""Keys that may sign one version."""


@dataclass(frozen=True, slots=True)
class Referrers:
    """What refers to one manifest: `blobs` by digest, and `entries` for index.json."""

    blobs: Mapping[str, bytes]
    entries: tuple[dict[str, Any], ...]


def build_referrers(subject: Descriptor, signatures: Mapping[str, str]) -> Referrers:
    """Return the artifacts for a manifest's signatures by public key, both hex; empty for none."""
    if not signatures:
        return Referrers({}, ())
    blobs: dict[str, bytes] = {}
    empty = _kept(blobs, EMPTY_TYPE, EMPTY)
    entries = [
        _signature(blobs, subject, empty, key, signatures[key]) for key in sorted(signatures)
    ]
    listing = canonical_json({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries})
    tag = f"sha256-{subject.digest.removeprefix('sha256:')}"
    tagged = _kept(blobs, INDEX_TYPE, listing, {REF_NAME: tag})
    return Referrers(blobs, (*entries, tagged.to_dict()))


def merge_signatures(
    signed: Iterable[tuple[Descriptor, Mapping[str, str]]],
) -> dict[str, tuple[Descriptor, dict[str, str]]]:
    """Return by digest the manifest and its signatures, of however many versions it is."""
    found: dict[str, tuple[Descriptor, dict[str, str]]] = {}
    for subject, signatures in signed:
        found.setdefault(subject.digest, (subject, {}))[1].update(signatures)
    return found


def is_referrer(entry: object) -> bool:
    """Tell whether an entry of index.json is a signature, or a list of referrers."""
    match entry:
        case {"artifactType": str(kind)} if kind == SIGNATURE_TYPE:
            return True
        case {"mediaType": str(kind), "annotations": {"org.opencontainers.image.ref.name": str(t)}}:
            return kind == INDEX_TYPE and t.startswith("sha256-")
    return False


def read_referrers(
    entries: Iterable[object], subject: Descriptor, blobs: BlobStore
) -> dict[str, str]:
    """Return the signatures of `subject` by key among the entries of an index; nothing is verified.

    Raises ValidationError(code="invalid_signature") for an artifact that can't be read, or that
    signs something else.
    """
    pointers = [
        Descriptor.parse(entry, "a signature's entry")
        for entry in entries
        if is_referrer(entry) and isinstance(entry, dict) and "artifactType" in entry
    ]
    return dict(_read(pointer, subject, blobs) for pointer in pointers)


def check_count(signatures: Mapping[str, str]) -> None:
    """Raise ValidationError(code="invalid_signature") for more than a version has room for."""
    if len(signatures) > SIGNATURES_MAX:
        raise _invalid(f"there are {len(signatures)}; a version has at most {SIGNATURES_MAX}")


def _signature(
    blobs: dict[str, bytes], subject: Descriptor, empty: Descriptor, key: str, signature: str
) -> dict[str, Any]:
    """Add one signature's blobs; return its entry."""
    content = canonical_json({"key": key, "signature": signature})
    layer = _kept(blobs, SIGNATURE_TYPE, content, {TITLE: f"signature-{key[:16]}.json"})
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": SIGNATURE_TYPE,
        "config": empty.to_dict(),
        "layers": [layer.to_dict()],
        "subject": {
            "mediaType": subject.media_type,
            "digest": subject.digest,
            "size": subject.size_bytes,
        },
        "annotations": {KEY: key},
    }
    pointer = _kept(blobs, MANIFEST_TYPE, canonical_json(manifest), {KEY: key})
    return pointer.to_dict() | {"artifactType": SIGNATURE_TYPE}


def _kept(
    blobs: dict[str, bytes],
    media_type: str,
    data: bytes,
    annotations: Mapping[str, str] | None = None,
) -> Descriptor:
    """Add a blob and return what points to it."""
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    blobs[digest] = data
    return Descriptor(media_type, digest, len(data), annotations or {})


def _read(pointer: Descriptor, subject: Descriptor, blobs: BlobStore) -> tuple[str, str]:
    """Return key and signature of an artifact."""
    try:
        manifest = json.loads(blobs.get(pointer.digest, pointer.size_bytes))
        match manifest:
            case {"subject": {"digest": str(digest)}, "layers": [form]}:
                if digest != subject.digest:
                    raise _invalid(f"it signs {digest}, not {subject.digest}")
                layer = Descriptor.parse(form, "a signature's layer")
                found = json.loads(blobs.get(layer.digest, layer.size_bytes))
                if isinstance(found, dict):
                    key, signature = found.get("key"), found.get("signature")
                    if isinstance(key, str) and isinstance(signature, str):
                        return key, signature
    except (MlpdError, ValueError, RecursionError) as error:
        if isinstance(error, ValidationError) and error.code == "invalid_signature":
            raise
        raise _invalid(f"the artifact {pointer.digest} can't be read: {error}") from None
    raise _invalid(f"the artifact {pointer.digest} has no subject, or no signature in its layer")


def _invalid(problem: str) -> ValidationError:
    return ValidationError(
        f"a signature beside the version can't be taken: {problem}",
        code="invalid_signature",
        hint="Export the version anew, or sign it again: mlpd models sign.",
    )
