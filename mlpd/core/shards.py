"""The shard map: which shard owns each slot, at which epoch; checked, and in one canonical form.

docs/formats/shard_map.md describes it; docs/decisions/shards.md says why.  It is a value: a change
makes a new one, whose epoch is one more.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ConflictError, NotFoundError, ValidationError
from mlpd.core.hashing import SLOTS, canonical_json, definition_hash
from mlpd.core.names import check_name

FORMAT = 1
SHARDS_MAX = 1000
EPOCH_MAX = 2**53 - 1
"""What JSON carries as an exact integer everywhere."""
CLUSTER_DIGITS = 32

_FIELDS = frozenset(("format", "cluster", "epoch", "shards", "slots"))
_SHARD_FIELDS = frozenset(("url", "replicas"))
_NOBODY = -1


@dataclass(frozen=True, slots=True)
class Shard:
    """A member of a cluster: where it is, and where its `replicas` are."""

    name: str
    url: str
    replicas: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShardMap:
    """Who owns what at one `epoch`.

    `shards`: by name, ascending.  `owners`: per slot the index of its owner in `shards`.
    """

    cluster: str
    epoch: int
    shards: tuple[Shard, ...]
    owners: tuple[int, ...]

    @property
    def arbiter(self) -> Shard:
        """The shard whose copy of the map decides."""
        return self.shards[0]

    @cached_property
    def digest(self) -> str:
        """32 hex digits over the canonical form: maps with the same one are the same."""
        return definition_hash(self.to_dict())

    @cached_property
    def _owners(self) -> NDArray[np.int64]:
        return np.array(self.owners, np.int64)

    def owner(self, slot: int) -> Shard:
        """Return the shard that owns `slot`."""
        return self.shards[self.owners[slot]]

    def shard(self, name: str) -> Shard:
        """Return a shard by name; raises NotFoundError(code="unknown_shard")."""
        return self.shards[self.index(name)]

    def index(self, name: str) -> int:
        """Return the place of a shard in `shards`; raises NotFoundError(code="unknown_shard")."""
        for index, shard in enumerate(self.shards):
            if shard.name == name:
                return index
        known = ", ".join(shard.name for shard in self.shards)
        raise NotFoundError(
            f"there is no shard {name!r} in the map", code="unknown_shard", hint=f"Known: {known}."
        )

    def slots_of(self, name: str) -> list[int]:
        """Return the slots that a shard owns, ascending."""
        found: list[int] = np.flatnonzero(self._owners == self.index(name)).tolist()
        return found

    def flags(self, name: str) -> bytes:
        """Return, per slot, 1 if a shard owns it and 0 if not; a lookup costs 30 ns."""
        flags: bytes = (self._owners == self.index(name)).astype(np.uint8).tobytes()
        return flags

    def next(self, shards: Sequence[Shard], owners: Sequence[int]) -> "ShardMap":
        """Return the map that follows this one."""
        return replace(self, epoch=self.epoch + 1, shards=tuple(shards), owners=tuple(owners))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that `decode_map` reads."""
        return {
            "format": FORMAT,
            "cluster": self.cluster,
            "epoch": self.epoch,
            "shards": {s.name: {"url": s.url, "replicas": list(s.replicas)} for s in self.shards},
            "slots": _slots_by_name(self),
        }

    def encode(self) -> bytes:
        """Return the canonical JSON."""
        return canonical_json(self.to_dict())


def format_runs(slots: Iterable[int]) -> str:
    """Return ascending slots as text, such as `0-8191 9000`; `parse_runs` reads it."""
    found = slots if isinstance(slots, np.ndarray) else np.array([*slots], np.int64)
    if not len(found):
        return ""
    cuts = np.flatnonzero(np.diff(found) != 1) + 1
    firsts, lasts = found[[0, *cuts]].tolist(), found[[*(cuts - 1), -1]].tolist()
    runs = zip(firsts, lasts, strict=True)
    return " ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def parse_runs(text: object) -> list[int]:
    """Return the slots in such a text; raises ValidationError(code="invalid_slots")."""
    slots: list[int] = []
    for run in text.split() if isinstance(text, str) else (None,):
        first, dash, last = (run or "").partition("-")
        bounds = [_slot(first), _slot(last if dash else first)]
        least = slots[-1] + 1 if slots else 0
        if not least <= bounds[0] <= bounds[1] < SLOTS:
            raise ValidationError(
                f"{run or text!r:.60} is no run of slots",
                code="invalid_slots",
                hint=f"Write ascending numbers and runs from 0 to {SLOTS - 1}: 0-8191 9000.",
            )
        slots.extend(range(bounds[0], bounds[1] + 1))
    return slots


def decode_map(value: object) -> ShardMap:
    """Return the map of a JSON object.

    Raises ValidationError: `invalid_map`, `invalid_slots`, `invalid_name`, `overlapping_slots`,
    `uncovered_slots`, `repeated_url`.
    """
    fields = _object(value, _FIELDS, "a map")
    if fields["format"] != FORMAT:
        raise _invalid(f"its format is {fields['format']!r:.40}, not {FORMAT}")
    epoch, cluster = fields["epoch"], fields["cluster"]
    if type(epoch) is not int or not 1 <= epoch <= EPOCH_MAX:
        raise _invalid(f"its epoch is {epoch!r:.40}, not a positive integer")
    if not (isinstance(cluster, str) and _is_hex(cluster)):
        raise _invalid(f"its cluster is {cluster!r:.40}, not {CLUSTER_DIGITS} hex digits")
    shards = _decode_shards(fields["shards"])
    return ShardMap(cluster, epoch, shards, _decode_owners(shards, fields["slots"]))


def check_successor(current: ShardMap, new: ShardMap) -> None:
    """Raise ConflictError unless a member that goes by `current` may go by `new`.

    `other_cluster`, `older_map`, `map_differs`.  The same map may come again.
    """
    if new.cluster != current.cluster:
        raise ConflictError(
            f"the map is of cluster {new.cluster}, this shard belongs to {current.cluster}",
            code="other_cluster",
            hint="Ask the members of one cluster alone; a shard never changes its cluster.",
        )
    if new.epoch < current.epoch:
        raise ConflictError(
            f"the map is of epoch {new.epoch}, this shard goes by {current.epoch}",
            code="older_map",
            hint="Fetch the newest map and make the change again.",
            details={"epoch": current.epoch},
        )
    if new.epoch == current.epoch and new != current:
        raise ConflictError(
            f"there is another map of epoch {new.epoch}: {current.digest} here, {new.digest} given",
            code="map_differs",
            hint="Somebody else changed the map; the arbiter's is the one that counts.",
            details={"epoch": current.epoch, "digest": current.digest},
        )


def _slots_by_name(shard_map: ShardMap) -> dict[str, str]:
    owners = np.array(shard_map.owners, np.int64)
    by_owner = np.argsort(owners, kind="stable")
    cuts = np.searchsorted(owners[by_owner], np.arange(1, len(shard_map.shards)))
    named = zip(shard_map.shards, np.split(by_owner, cuts), strict=True)
    return {shard.name: format_runs(owned) for shard, owned in named if len(owned)}


def _decode_shards(value: object) -> tuple[Shard, ...]:
    if not isinstance(value, Mapping) or not 1 <= len(value) <= SHARDS_MAX:
        raise _invalid(f"'shards' is no object of 1 to {SHARDS_MAX} shards")
    shards = tuple(_decode_shard(name, value[name]) for name in sorted(value, key=str))
    urls = [url for shard in shards for url in (shard.url, *shard.replicas)]
    repeated = [url for url, count in Counter(urls).items() if count > 1]
    if repeated:
        raise ValidationError(
            f"two members of the map have the URL {repeated[0]}",
            code="repeated_url",
            hint="Each is a daemon of its own.",
        )
    return shards


def _decode_shard(name: object, value: object) -> Shard:
    fields = _object(value, _SHARD_FIELDS, f"shard {name!r:.60}")
    replicas = fields["replicas"]
    if not isinstance(replicas, list):
        raise _invalid(f"'replicas' of shard {name!r:.60} is no list")
    urls = [_check_url(url) for url in (fields["url"], *replicas)]
    return Shard(check_name(name, "shard"), urls[0], tuple(urls[1:]))


def _decode_owners(shards: Sequence[Shard], value: object) -> tuple[int, ...]:
    names = [shard.name for shard in shards]
    if not isinstance(value, Mapping):
        raise _invalid("'slots' is no object")
    owners = np.full(SLOTS, _NOBODY, np.int64)
    for name, text in value.items():
        if name not in names:
            raise _invalid(f"'slots' names {name!r:.60}, which is no shard of it")
        slots = np.array(parse_runs(text), np.int64)
        taken = slots[owners[slots] != _NOBODY]
        if len(taken):
            raise ValidationError(
                f"slot {taken[0]} is claimed by {names[owners[taken[0]]]} and by {name}",
                code="overlapping_slots",
                hint="Every slot has exactly one owner.",
            )
        owners[slots] = names.index(name)
    nobody = np.flatnonzero(owners == _NOBODY)
    if len(nobody):
        raise ValidationError(
            f"nobody owns {len(nobody)} slots: {format_runs(nobody)[:100]}",
            code="uncovered_slots",
            hint="Every slot has exactly one owner.",
        )
    return tuple(owners.tolist())


def _object(value: object, fields: frozenset[str], what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or value.keys() != fields:
        raise _invalid(f"{what} has the fields {', '.join(sorted(fields))}, no others")
    return value


def _slot(text: str) -> int:
    """Return the number, one that is no slot for anything else."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= len("16383") else -1


def _is_hex(text: str) -> bool:
    return len(text) == CLUSTER_DIGITS and set(text) <= set("0123456789abcdef")


def _check_url(url: object) -> str:
    try:
        if isinstance(url, str) and url.isascii() and url.isprintable():
            parts = urlsplit(url)
            _ = parts.port  # a ValueError if it is none
            is_http = parts.scheme == "http" and parts.hostname and parts.path in ("", "/")
            if url.startswith("unix:/") or is_http:
                return url.rstrip("/")
    except ValueError:
        pass
    raise _invalid(f"{url!r:.100} is not the URL of a daemon: http://HOST:PORT or unix:/PATH")


def _invalid(problem: str) -> ValidationError:
    return ValidationError(
        f"the map can't be used: {problem}",
        code="invalid_map",
        hint="docs/formats/shard_map.md describes maps; mlpd shard makes them.",
    )
