"""Media types of bodies and answers, their short names, and the names of files that have them."""

from collections.abc import Iterable

from mlpd.core.errors import ValidationError

JSON, MSGPACK = "application/json", "application/msgpack"
OCTETS = "application/octet-stream"
ARROW = "application/vnd.apache.arrow.stream"
ARROW_FILE = "application/vnd.apache.arrow.file"
PARQUET = "application/vnd.apache.parquet"

FRAME_FORMATS = {
    "arrow": ARROW,
    "arrow_file": ARROW_FILE,
    "parquet": PARQUET,
    "msgpack": MSGPACK,
    "json": JSON,
}
"""What frames come as, by the names of the field `format`."""
SPINE_FILES = (ARROW, ARROW_FILE, PARQUET)
"""What a spine may be sent as instead of rows; it goes to disk as it comes."""

_SUFFIXES = {
    "parquet": ("parquet", "pq"),
    "arrow_file": ("arrow", "feather", "ipc"),
    "arrow": ("arrows",),
    "msgpack": ("msgpack",),
    "json": ("json",),
}


def frame_format(name: str, *, only: Iterable[str] = FRAME_FORMATS.values()) -> str:
    """Return the media type, one of `only`, of a file by its name.

    Raises ValidationError(code="unknown_format").
    """
    kinds = {
        f".{suffix}": FRAME_FORMATS[form] for form, ends in _SUFFIXES.items() for suffix in ends
    }
    known = {suffix: kind for suffix, kind in kinds.items() if kind in set(only)}
    for suffix, kind in known.items():
        if name.lower().endswith(suffix):
            return kind
    raise ValidationError(
        f"the name of {name!r} doesn't say what it is",
        code="unknown_format",
        hint=f"It ends with {', '.join(known)}.",
    )
