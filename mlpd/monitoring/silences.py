"""Silences: alerts with such labels are judged but told to nobody, for a time."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

import msgpack

from mlpd.core.errors import ConflictError, NotFoundError, ValidationError
from mlpd.core.matchers import matches
from mlpd.core.time import DAY_US, format_time

SILENCES_MAX: Final = 1_000
LASTS_US_MAX: Final = 90 * DAY_US
WHY_CHARS_MAX: Final = 500
_ID: Final = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Silence:
    """Holds from `starts_us` (inclusive) to `ends_us` (exclusive), by the wall clock."""

    silence_id: str
    matchers: Mapping[str, str]
    starts_us: int
    ends_us: int
    by: str
    why: str

    def covers(self, labels: Mapping[str, str], now_us: int) -> bool:
        """Whether an alert of these labels is silenced now."""
        return self.starts_us <= now_us < self.ends_us and matches(self.matchers, labels)

    def describe(self) -> dict[str, Any]:
        """Return it as the API shows it."""
        return {
            "id": self.silence_id,
            "matchers": dict(self.matchers),
            "starts": format_time(self.starts_us),
            "ends": format_time(self.ends_us),
            "by": self.by,
            "why": self.why,
        }

    def encode(self) -> bytes:
        """Return the bytes that `decode` reads."""
        packed: bytes = msgpack.packb(asdict(self))
        return packed

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Return the silence that `encode` packed."""
        return cls(**msgpack.unpackb(data))


def make_silence(
    matchers: Mapping[str, str],
    *,
    now_us: int,
    lasts_us: int,
    by: str,
    why: str,
    silence_id: str | None = None,
) -> Silence:
    """Return a silence from now on; raises ValidationError for one too long or without words.

    `silence_id`: 16 hex digits, drawn by default.
    """
    if silence_id is not None and not _ID.fullmatch(silence_id):
        raise ValidationError(
            f"the id of a silence is {silence_id[:60]!r}, not 16 hex digits",
            code="wrong_silence_id",
            hint="Leave it out, and one is drawn.",
        )
    if not 0 < lasts_us <= LASTS_US_MAX:
        raise ValidationError(
            "a silence lasts at most 90 days",
            code="silence_too_long",
            hint="Silence it again when it ends, or change what is measured under [alerts].",
        )
    if len(why) > WHY_CHARS_MAX:
        raise ValidationError(f"'why' has over {WHY_CHARS_MAX} characters", code="why_too_long")
    return Silence(
        silence_id or os.urandom(8).hex(), dict(matchers), now_us, now_us + lasts_us, by, why
    )


class Silences:
    """The silences of a daemon.  One thread at a time."""

    def __init__(self, silences: Iterable[Silence] = ()) -> None:
        self._silences = {silence.silence_id: silence for silence in silences}

    def active(self, now_us: int) -> list[Silence]:
        """Return those that hold now, the first to end first."""
        held = [silence for silence in list(self._silences.values()) if now_us < silence.ends_us]
        return sorted(held, key=lambda silence: silence.ends_us)

    def ended(self, now_us: int) -> list[Silence]:
        """Return those that are over; after a clock that has jumped they may hold again."""
        return [silence for silence in self._silences.values() if silence.ends_us <= now_us]

    def check_room(self, now_us: int) -> None:
        """Raise ConflictError(code="too_many_silences") if no more is taken."""
        if len(self.active(now_us)) >= SILENCES_MAX:
            raise ConflictError(
                f"there are {SILENCES_MAX} silences already",
                code="too_many_silences",
                hint="End some (mlpd alerts unsilence ID), or use patterns.",
            )

    def add(self, silence: Silence) -> None:
        """Hold one more."""
        self._silences[silence.silence_id] = silence

    def get(self, silence_id: str) -> Silence:
        """Return a silence; raises NotFoundError(code="unknown_silence")."""
        found = self._silences.get(silence_id)
        if found is None:
            raise NotFoundError(
                f"there is no silence {silence_id[:60]!r}",
                code="unknown_silence",
                hint="mlpd alerts list shows them.",
            )
        return found

    def find(self, silence_id: str, matchers: Mapping[str, str]) -> Silence | None:
        """Return the silence of this id, None if it is new.

        Raises ConflictError(code="known_silence") if its matchers are others.
        """
        found = self._silences.get(silence_id)
        if found is not None and found.matchers != matchers:
            raise ConflictError(
                f"there is a silence {silence_id} of other labels",
                code="known_silence",
                hint="Leave the id out, and another one is drawn.",
            )
        return found

    def remove(self, silence_id: str) -> None:
        """Let go of one; unknown is fine."""
        self._silences.pop(silence_id, None)

    def cover(self, labels: Mapping[str, str], now_us: int) -> bool:
        """Whether any of them silences an alert of these labels now."""
        return any(silence.covers(labels, now_us) for silence in list(self._silences.values()))
