"""JSON values: what a document of the registry may hold, so that it has one byte form."""

import math
from collections.abc import Mapping

MAX_DEPTH = 16


def is_json(value: object, depth: int = MAX_DEPTH) -> bool:
    """Return whether `value` is JSON with text keys and finite numbers, at most `depth` deep."""
    if isinstance(value, str):
        return _is_unicode(value)
    if value is None or isinstance(value, int):
        return True
    if isinstance(value, float):
        return math.isfinite(value)
    if depth == 0:
        return False
    if isinstance(value, Mapping):
        return all(is_text(k) and is_json(v, depth - 1) for k, v in value.items())
    return isinstance(value, list | tuple) and all(is_json(v, depth - 1) for v in value)


def is_text(value: object) -> bool:
    """Return whether `value` is text that UTF-8 can write."""
    return isinstance(value, str) and _is_unicode(value)


def _is_unicode(text: str) -> bool:
    # JSON admits lone surrogates, UTF-8 does not: such a document could not be stored.
    return not any("\ud800" <= character <= "\udfff" for character in text)
