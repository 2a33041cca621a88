"""Hashes: content digests (sha256), of definitions (blake2b), slots of keys and values (xxh64)."""

import hashlib
import json
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

SLOTS = 16384
"""Number of slots that entity keys hash into; fixed for ever, it is on disk."""


def slot_of(routing_key: bytes) -> int:
    """Return the slot, 0 to 16383: `xxh64(routing_key, seed 0) & 16383`.  Costs about 0.2 us.

    If the key holds `{tag}` with a non-empty tag, only the first such tag is hashed, as in Redis
    Cluster: keys with the same tag live together.
    """
    opened = routing_key.find(b"{")
    if opened >= 0:
        closed = routing_key.find(b"}", opened + 1)
        if closed > opened + 1:
            routing_key = routing_key[opened + 1 : closed]
    return xxhash.xxh64_intdigest(routing_key) & (SLOTS - 1)


def hash_values(values: NDArray[Any]) -> NDArray[np.int64]:
    """Return 64 well mixed bits of each value of a column.

    Texts (as UTF-8) and bytes: xxh64, seed 0.  Numbers: the output function of splitmix64 (Steele,
    Lea and Flood, OOPSLA 2014) over the 64 bits of the integer or the float64, which is one to one;
    -0.0 counts as 0.0.
    """
    if values.dtype == object:
        encoded = (v.encode() if isinstance(v, str) else v for v in values.tolist())
        hashes = [xxhash.xxh64_intdigest(value) for value in encoded]
        return np.array(hashes, np.uint64).view(np.int64)
    if values.dtype.kind == "f":
        bits = (values.astype(np.float64) + 0.0).view(np.uint64)
    else:
        bits = values.astype(np.int64).view(np.uint64)
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = bits ^ (bits >> np.uint64(31))
    return mixed.view(np.int64)


def canonical_json(value: Any) -> bytes:
    """Return one fixed JSON encoding of `value`: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def definition_hash(value: Any) -> str:
    """Return 32 hex digits of BLAKE2b-128 over the canonical JSON of `value`."""
    return hashlib.blake2b(canonical_json(value), digest_size=16).hexdigest()


def sha256_digest(data: bytes) -> str:
    """Return the content digest as the OCI layout writes it: `sha256:` and 64 hex digits."""
    return "sha256:" + hashlib.sha256(data).hexdigest()
