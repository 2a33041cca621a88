"""Signing: Ed25519 over a version's manifest digest, and which versions may be served for it.

The digest covers the model's name and every file.  Public keys and signatures are hex; a private
key is a PEM file (PKCS 8) that never leaves whoever signs.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlpd.core.errors import ConflictError, UnavailableError, ValidationError
from mlpd.registry.records import ModelVersion

_KEY = re.compile(r"[0-9a-f]{64}")
_SIGNATURE = re.compile(r"[0-9a-f]{128}")


class TrustPolicy:
    """Whose signature a version needs; without keys it needs none.

    Constructing raises ValidationError(code="invalid_key"), UnavailableError(code="missing_extra").
    """

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        self._keys = tuple(map(check_key, keys))
        if keys:
            _load()

    def check(self, version: ModelVersion, signatures: Mapping[str, str]) -> None:
        """Raise ConflictError(code="signature_required") unless a trusted key has signed."""
        if self._keys and not any(
            verify(key, signatures[key], version.digest) for key in self._keys if key in signatures
        ):
            raise ConflictError(
                f"{version.reference} is not signed by a key that this daemon trusts",
                code="signature_required",
                hint=f"Sign it: mlpd models sign {version.reference} --key FILE.",
            )


def check_key(key: str) -> str:
    """Return a public key's hex if that is what it is, else raise ValidationError."""
    if _KEY.fullmatch(key):
        return key
    raise ValidationError(
        f"{key[:80]!r} is no public key",
        code="invalid_key",
        hint="A key is 64 lower-case hex digits, as mlpd models keygen prints them.",
    )


def verify(key: str, signature: str, digest: str) -> bool:
    """Tell whether `signature` is the key's over a manifest digest; 0.5 ms beside other work.

    Raises ValidationError(code="invalid_key" or "invalid_signature") for what is no hex of that
    length, UnavailableError(code="missing_extra").
    """
    check_key(key)
    if not _SIGNATURE.fullmatch(signature):
        raise _invalid_signature("it is not 128 lower-case hex digits")
    ed25519, exceptions, _ = _load()
    try:
        public = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
        public.verify(bytes.fromhex(signature), _message(digest))
    except (exceptions.InvalidSignature, ValueError):  # the latter: no point of the curve
        return False
    return True


def require_valid(key: str, signature: str, digest: str) -> None:
    """Raise ValidationError(code="invalid_signature") unless `verify` holds."""
    if not verify(key, signature, digest):
        raise _invalid_signature("it was made by another key, or for another version")


def create_key(path: Path) -> str:
    """Write a new private key to `path`, mode 0600, which must be new; return its public key."""
    ed25519, _, serialization = _load()
    private = ed25519.Ed25519PrivateKey.generate()
    pem = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
    return _public_hex(private)


def sign(path: Path, digest: str) -> tuple[str, str]:
    """Return public key and signature over a manifest digest with the private key in `path`.

    Raises ValidationError(code="invalid_key") for a file that holds no Ed25519 key without a
    password.
    """
    ed25519, _, serialization = _load()
    try:
        private = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise _no_private_key(path) from error
    if not isinstance(private, ed25519.Ed25519PrivateKey):
        raise _no_private_key(path)
    return _public_hex(private), private.sign(_message(digest)).hex()


def _message(digest: str) -> bytes:
    """Return what is signed: a digest, and that it is this program's."""
    return f"mlpd-signature-v1\n{digest}\n".encode()


def _public_hex(private: Any) -> str:
    return bytes(private.public_key().public_bytes_raw()).hex()


def _load() -> tuple[Any, Any, Any]:
    try:
        from cryptography import exceptions  # noqa: PLC0415 - an extra
        from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
        from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415
    except ImportError:
        raise UnavailableError(
            "signatures need the package cryptography",
            code="missing_extra",
            hint="pip install 'mlpd[signing]'",
        ) from None
    return ed25519, exceptions, serialization


def _no_private_key(path: Path) -> ValidationError:
    return ValidationError(
        f"{path} holds no Ed25519 key (PEM, without a password)",
        code="invalid_key",
        hint="mlpd models keygen FILE makes one.",
    )


def _invalid_signature(problem: str) -> ValidationError:
    return ValidationError(
        f"the signature doesn't fit: {problem}",
        code="invalid_signature",
        hint="Sign the version anew: mlpd models sign.",
    )
