"""The ways in which a power cut may decide what is open: from nothing written to torn at random."""

import random
from typing import Any, TypeVar

from tests.storage.powercut.disk import Choice, Versions

V = TypeVar("V")
SECTORS, BLOCKS = 1, 8
"""Granularities of tearing, in sectors: a disk's, and a page of the page cache."""


class Everything:
    """All that was written is there, as after kill -9."""

    def sector(self, _place: int, _number: int, versions: Versions[bytes]) -> bytes:
        return versions.newest

    def size(self, _place: int, versions: Versions[int]) -> int:
        return versions.newest

    def name(self, _place: int, _name: str, versions: Versions[int | None]) -> int | None:
        return versions.newest


class NoNames(Everything):
    """Data is there, names that were not flushed are not."""

    def name(self, _place: int, _name: str, versions: Versions[int | None]) -> int | None:
        return versions.flushed


class NoData(Everything):
    """Names and sizes are there, data that was not flushed is not: files full of zeros."""

    def sector(self, _place: int, _number: int, versions: Versions[bytes]) -> bytes:
        return versions.flushed


class Nothing(NoData, NoNames):
    """What was not flushed is lost."""

    def size(self, _place: int, versions: Versions[int]) -> int:
        return versions.flushed


class Without:
    """All that was written is there, but for one operation."""

    def __init__(self, operation: int) -> None:
        self._operation = operation

    def _left(self, versions: Versions[V]) -> V:
        left = [version for number, version in versions.later if number != self._operation]
        return left[-1] if left else versions.flushed

    def sector(self, _place: int, _number: int, versions: Versions[bytes]) -> bytes:
        return self._left(versions)

    def size(self, _place: int, versions: Versions[int]) -> int:
        return self._left(versions)

    def name(self, _place: int, _name: str, versions: Versions[int | None]) -> int | None:
        return self._left(versions)


class Only:
    """One operation is there, no other one that was not flushed."""

    def __init__(self, operation: int) -> None:
        self._operation = operation

    def _one(self, versions: Versions[V]) -> V:
        return dict(versions.later).get(self._operation, versions.flushed)

    def sector(self, _place: int, _number: int, versions: Versions[bytes]) -> bytes:
        return self._one(versions)

    def size(self, _place: int, versions: Versions[int]) -> int:
        return self._one(versions)

    def name(self, _place: int, _name: str, versions: Versions[int | None]) -> int | None:
        return self._one(versions)


class Torn:
    """Every unit of `sectors`, every size and every name is of a moment of its own."""

    def __init__(self, rng: random.Random, sectors: int) -> None:
        self._rng, self._sectors = rng, sectors
        self._moments: dict[Any, int] = {}

    def _at(self, key: Any, versions: Versions[V]) -> V:
        if key not in self._moments:
            self._moments[key] = self._rng.choice([0, *(number for number, _ in versions.later)])
        found = versions.flushed
        for number, version in versions.later:
            if number <= self._moments[key]:
                found = version
        return found

    def sector(self, place: int, number: int, versions: Versions[bytes]) -> bytes:
        return self._at((place, number // self._sectors), versions)

    def size(self, place: int, versions: Versions[int]) -> int:
        return self._at((place, "size"), versions)

    def name(self, place: int, name: str, versions: Versions[int | None]) -> int | None:
        return self._at((place, name), versions)


FIXED = (
    ("everything", Everything),
    ("nothing", Nothing),
    ("no names", NoNames),
    ("no data", NoData),
)


def choose(rng: random.Random, open_operations: list[int]) -> tuple[str, Choice]:
    """Return one way to decide and what it is called; most often one that tears at random."""
    kind = rng.randrange(10)
    if kind < len(FIXED):
        name, make = FIXED[kind]
        return name, make()
    operation = rng.choice(open_operations)
    if kind == len(FIXED):
        return f"without operation {operation}", Without(operation)
    if kind == len(FIXED) + 1:
        return f"only operation {operation}", Only(operation)
    unit = rng.choice((SECTORS, BLOCKS))
    return f"torn in units of {unit}", Torn(rng, unit)
