"""The named LMDB databases of one environment, and the head record that sums up the log."""

import struct
from enum import StrEnum
from typing import NamedTuple

from mlpd.core.errors import ValidationError
from mlpd.core.names import Sequence, TimeUs
from mlpd.core.time import MIN_TIME_US


class Table(StrEnum):
    """A named LMDB database; docs/formats/lmdb.md tells who owns its keys.

    Keys of ONLINE, TILES, PREDICTIONS, LABELS and UNITS begin with the u16be slot.
    """

    META = "meta"
    LOG = "log"
    SEGMENTS = "segments"
    ONLINE = "online"
    TILES = "tiles"
    DEFINITIONS = "definitions"
    EVENT_IDS = "event_ids"
    IDEMPOTENCY = "idempotency"
    PREDICTIONS = "predictions"
    LABELS = "labels"
    SERVED = "served"
    ORPHANS = "orphans"
    MODELS = "models"
    ROUTES = "routes"
    EXPERIMENTS = "experiments"
    UNITS = "units"
    JOBS = "jobs"
    RUNS = "runs"
    MONITORING = "monitoring"
    CHANGES = "changes"


class Head(NamedTuple):
    """What the last committed group left behind; key `head` of META, 32 bytes `<4q`."""

    sequence: Sequence
    """Newest sequence in the log, 0 before the first."""
    group_us: TimeUs
    """Arrival time K of the last group, of whatever kind."""
    known_us: TimeUs
    """Newest known_time of any event; `MIN_TIME_US` before the first."""
    event_us: TimeUs
    """Newest event_time of any event; `MIN_TIME_US` before the first."""

    @classmethod
    def decode(cls, data: bytes | None) -> "Head":
        """Return the head from its bytes; None is the head of an empty environment."""
        return EMPTY_HEAD if data is None else tuple.__new__(cls, _HEAD.unpack(data))

    @classmethod
    def parse(cls, text: str) -> "Head":
        """Return the head of 64 hex digits; raises ValidationError(code="invalid_head")."""
        try:
            return tuple.__new__(cls, _HEAD.unpack(bytes.fromhex(text)))
        except (ValueError, struct.error):
            raise ValidationError(
                f"{text[:80]!r} is no head of a commit",
                code="invalid_head",
                hint="64 hex digits, as /v1/cluster/replica shows them.",
            ) from None

    def encode(self) -> bytes:
        """Return the 32 bytes that `decode` reads."""
        return _HEAD.pack(*self)

    @property
    def text(self) -> str:
        """The 64 hex digits that `parse` reads."""
        return self.encode().hex()


_HEAD = struct.Struct("<4q")
_BEFORE = TimeUs(MIN_TIME_US)
EMPTY_HEAD = Head(Sequence(0), _BEFORE, _BEFORE, _BEFORE)
HEAD_KEY = b"head"
FORMAT_KEY = b"format"
ROWS_PREFIX = b"rows/"
"""Before the name of a source in META: how many event rows it ever had."""
FORMAT_VERSION = 1
"""Version of the whole data directory; an environment with another one is refused."""

_U64 = struct.Struct(">Q")


def u64be(number: int) -> bytes:
    """Return the 8 bytes of an unsigned number that sort as the number does."""
    return _U64.pack(number)


def from_u64be(data: bytes) -> int:
    """Return the number that `u64be` packed."""
    number: int = _U64.unpack(data)[0]
    return number


def rows_key(source: str) -> bytes:
    """Return the key in META of a source's count of event rows."""
    return ROWS_PREFIX + source.encode()
