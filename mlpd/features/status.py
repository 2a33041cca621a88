"""Status of a served value: why it is, or is not, there."""

from enum import IntEnum


class Status(IntEnum):
    """One byte beside every feature value, the same online and offline."""

    PRESENT = 0
    """A value; NaN in a float feature is one."""
    NULL = 1
    """Written as null, or an aggregate over an empty window."""
    MISSING = 2
    """Never written, deleted, or no entity key was given."""
    STALE = 3
    """Older than the view's ttl."""
