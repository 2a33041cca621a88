"""Segments written anew without the rows that their source keeps no longer; for children only.

Which rows those are, and which stay although they are as old: decisions/retention-of-history.md.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlpd.core.columns import DType
from mlpd.core.routing import key_slots
from mlpd.core.specs import EntitySpec
from mlpd.storage.environment import Environment
from mlpd.storage.frames import polars_type
from mlpd.storage.lineage import Lineage, load_lineage
from mlpd.storage.log import RecordKind
from mlpd.storage.rewrite import rewrite_without
from mlpd.storage.segments import (
    EVENT_TIME,
    KNOWN_TIME,
    SEQUENCE,
    Manifest,
    Segment,
    load_manifests,
)

if TYPE_CHECKING:
    import polars as pl

SHARE = 2
"""A file is written anew once at least this part of its rows (one half) goes."""

Keys = Mapping[str, DType]
"""Key columns of an entity, with their types."""


@dataclass(frozen=True, slots=True)
class Expiry:
    """What is due: rows of `source` whose event and known time are before `before_us`.

    Up to the sequence `through`; without the newest of every entity that one of `entities` makes.
    """

    source: str
    before_us: int
    through: int
    entities: Sequence[Keys]

    @property
    def cause(self) -> str:
        """What manifests call it."""
        return f"retention before {self.before_us}"

    def may_touch(self, segment: Segment) -> bool:
        """Tell whether a segment can have such rows."""
        return (
            segment.kind is RecordKind.EVENTS
            and segment.source == self.source
            and segment.min_event_us < self.before_us
            and segment.min_known_us < self.before_us
            and segment.first_sequence <= self.through
        )

    def read(self, path: Path, columns: Iterable[str] = ()) -> "pl.DataFrame":
        """Return the stamps of such rows in a file, and `columns`."""
        import polars as pl  # noqa: PLC0415 - not in the daemon

        stamps = [EVENT_TIME, KNOWN_TIME, SEQUENCE]
        rows = pl.read_parquet(path, columns=[*stamps, *columns], glob=False)
        is_old = (pl.col(EVENT_TIME) < self.before_us) & (pl.col(KNOWN_TIME) < self.before_us)
        return rows.filter(is_old & (pl.col(SEQUENCE) <= self.through))


class _Expired:
    """The rows that go, as `rewrite_without` asks for them."""

    def __init__(self, expiry: Expiry, winners: "pl.Series") -> None:
        self.cause = expiry.cause
        self._expiry = expiry
        self._winners = winners

    def may_hold(self, segment: Segment) -> bool:
        return self._expiry.may_touch(segment)

    def find(self, path: Path) -> "pl.DataFrame":
        import polars as pl  # noqa: PLC0415 - not in the daemon

        rows = self._expiry.read(path).select(SEQUENCE)
        gone = rows.filter(~pl.col(SEQUENCE).is_in(self._winners.implode()))
        height: int = pl.scan_parquet(path, glob=False).select(pl.len()).collect().item()
        return gone if SHARE * len(gone) >= height else gone.clear()


def expire(environment: Environment, directory: Path, expiry: Expiry) -> list[Manifest]:
    """Write the files of a source anew without what is due; return the manifests that differ.

    As `rewrite_without`: all is on disk when it returns, nothing is left when it raises OSError.
    Holds a file's rows, and per entity one row of keys and stamps.
    """
    with environment.snapshot() as snapshot:
        manifests, lineage = load_manifests(snapshot), load_lineage(snapshot)
    segments = [s for m in manifests for s in m.segments if expiry.may_touch(s)]
    winners = find_newest(directory, segments, expiry, lineage)
    return rewrite_without(environment, directory, _Expired(expiry, winners), lambda *_: None)


def find_newest(
    directory: Path, segments: Iterable[Segment], expiry: Expiry, lineage: Lineage | None = None
) -> "pl.Series":
    """Return the sequences of the rows that stay: the newest old one of every entity.

    `lineage`: for which slots rows count; one that doesn't for its entity's is no row of it.
    """
    import polars as pl  # noqa: PLC0415 - not in the daemon

    found = [pl.Series(SEQUENCE, [], pl.Int64)]
    for keys in expiry.entities:
        frames = _keyed(directory, segments, expiry, keys)
        if lineage is not None:
            frames = (_counting(frame, keys, lineage) for frame in frames)
        newest = _newest(frames, keys)
        found.append(newest[SEQUENCE])
    return pl.concat(found).unique()


def _keyed(
    directory: Path, segments: Iterable[Segment], expiry: Expiry, keys: Keys
) -> "Iterator[pl.DataFrame]":
    """Yield the old rows, file by file; those of files that lack a key are of no entity."""
    for segment in segments:
        if all(segment.columns.get(name) == dtype for name, dtype in keys.items()):
            yield expiry.read(directory / segment.path, keys).drop_nulls([*keys])


def _counting(frame: "pl.DataFrame", keys: Keys, lineage: Lineage) -> "pl.DataFrame":
    """Return the rows that count for the slots of their keys."""
    entity = EntitySpec("entity", tuple(keys.items()))
    slots = key_slots(entity, {name: frame[name].to_list() for name in keys}, len(frame))
    return frame.filter(lineage.counts(np.maximum(slots, 0), frame[SEQUENCE].to_numpy()))


def _newest(frames: "Iterator[pl.DataFrame]", keys: Keys) -> "pl.DataFrame":
    """Return the row with the largest (event time, known time, sequence) of every key."""
    import polars as pl  # noqa: PLC0415 - not in the daemon

    stamps = [EVENT_TIME, KNOWN_TIME, SEQUENCE]
    schema = {name: polars_type(dtype) for name, dtype in keys.items()}
    best = pl.DataFrame(schema={**dict.fromkeys(stamps, pl.Int64()), **schema})
    for frame in frames:
        both = pl.concat([best, frame.select(best.columns)])
        best = both.sort(stamps).unique([*keys], keep="last", maintain_order=True)
    return best
