"""Names and ids: what users may call things, and the types that keep ids apart."""

import re
from typing import NewType

from mlpd.core.errors import ValidationError

TimeUs = NewType("TimeUs", int)
"""Microseconds since 1970-01-01T00:00:00Z; signed, int64 on disk."""

Sequence = NewType("Sequence", int)
"""Dense position of an event in a daemon's log; the first event is 1, 0 means "before any"."""

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
IDENTIFIER_PATTERN = re.compile(r"[a-z][a-z0-9_]{0,127}")


def check_name(name: object, what: str) -> str:
    """Return `name` if it may name a model, route, job or experiment, else raise."""
    if isinstance(name, str) and NAME_PATTERN.fullmatch(name):
        return name
    raise ValidationError(
        f"{what} {name!r} is not a valid name",
        code="invalid_name",
        hint="Use 1 to 128 lower-case letters, digits, '.', '_' or '-', "
        "starting with a letter or digit.",
    )


def check_identifier(name: object, what: str) -> str:
    """Return `name` if it may name a column, feature, view, source or entity, else raise."""
    if isinstance(name, str) and IDENTIFIER_PATTERN.fullmatch(name):
        return name
    raise ValidationError(
        f"{what} {name!r} is not a valid identifier",
        code="invalid_name",
        hint="Use 1 to 128 lower-case letters, digits or '_', starting with a letter.",
    )
