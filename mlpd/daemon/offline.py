"""What child processes share: the store read-only, the catalog, and the events of a source."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpd.core.columns import Columns, DType
from mlpd.core.time import system_clock
from mlpd.features.catalog import Catalog, build_catalog
from mlpd.features.kernels import load_feature_kernels
from mlpd.features.offline import Events
from mlpd.features.tombstones import DELETED
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.frames import from_series
from mlpd.storage.horizons import Horizon, load_horizons
from mlpd.storage.lineage import Lineage, load_lineage
from mlpd.storage.offline import collect_events, count_events, read_events, scan_events
from mlpd.storage.segments import EVENT_TIME, KNOWN_TIME, SEQUENCE

if TYPE_CHECKING:
    import polars as pl


_SHARD_SEQUENCES = 1 << 48
"""More sequences than a log has; times the 1,000 shards of a map they fit int64."""


@dataclass(frozen=True, slots=True)
class Offline:
    """The data directory as a child sees it, up to and including the sequence `through`."""

    paths: DataDirectory
    environment: Environment
    catalog: Catalog
    through: int
    gathered: Mapping[str, Any] | None = None
    """Of several shards, what `Gathering.gather` told: by source the `files` of all of them, which
    have each event once, and `horizons`; None where the log here has everything."""

    def events(self, source: str, columns: tuple[str, ...]) -> Events:
        """Return all events of `source`, in no promised order, with `columns` of its schema."""
        spec = self.catalog.definitions.source(source)
        schema = {name: spec.schema[name] for name in columns}
        return Events.of(collect_events(lambda: self.scan(source, schema)), schema)

    def horizons(self) -> dict[str, Horizon]:
        """Return what is gone of which source, by now; of any shard if their events are here."""
        if self.gathered is not None:
            horizons = self.gathered["horizons"].items()
            return {name: Horizon(*fields) for name, fields in horizons}
        with self.environment.snapshot() as snapshot:
            return load_horizons(snapshot)

    def lineage(self) -> Lineage | None:
        """Return for which slots rows count, by now; None for all."""
        with self.environment.snapshot() as snapshot:
            return load_lineage(snapshot)

    def count_events(self, source: str) -> int:
        """Return about how many events of `source` there are, but never too few."""
        if self.gathered is not None:
            return count_gathered(self.gathered["files"][source])
        return count_events(self.environment, source, through_sequence=self.through)

    def read_events(
        self, source: str, columns: tuple[str, ...], rows_max: int
    ) -> "Iterator[pl.DataFrame]":
        """Yield all events of `source` with `columns` and DELETED, about `rows_max` at a time."""
        schema = self.catalog.definitions.source(source).schema
        wanted = {**{name: schema[name] for name in columns}, DELETED: DType.BOOL}
        if self.gathered is not None:
            return read_gathered(self.gathered["files"][source], wanted, rows_max)
        return read_events(
            self.environment,
            self.paths.segments,
            source,
            columns=wanted,
            through_sequence=self.through,
            rows_max=rows_max,
        )

    def with_definitions(self, document: Mapping[str, Any]) -> "Offline":
        """Return the same events seen through other definitions; compiles their transforms."""
        kernels, cache = load_feature_kernels(), self.paths.cache / "kernels"
        catalog = build_catalog(
            document, version=0, view_ids={}, next_view_id=1, kernels=kernels, cache=cache
        )
        return replace(self, catalog=catalog)

    def frame(self, source: str, columns: Mapping[str, DType]) -> "pl.DataFrame":
        """Return the events of a source in sequence order, as polars sees them, with DELETED."""
        return collect_events(lambda: self.scan(source, columns).sort(SEQUENCE))

    def scan(self, source: str, columns: Mapping[str, DType]) -> "pl.LazyFrame":
        """Return the events of a source with DELETED, to be read when they are collected."""
        if self.gathered is not None:
            return scan_gathered(self.gathered["files"][source], {**columns, DELETED: DType.BOOL})
        return scan_events(
            self.environment,
            self.paths.segments,
            source,
            columns={**columns, DELETED: DType.BOOL},
            through_sequence=self.through,
        )


@contextmanager
def open_offline(request: Mapping[str, Any]) -> Iterator[Offline]:
    """Open the data directory for a child's request: `directory`, `catalog` and `through`."""
    paths = DataDirectory(Path(request["directory"]))
    kernels = load_feature_kernels()
    with Environment.open(paths.lmdb, clock=system_clock, readonly=True) as environment:
        catalog = build_catalog(
            **request["catalog"], kernels=kernels, cache=paths.cache / "kernels"
        )
        yield Offline(paths, environment, catalog, request["through"], request.get("gathered"))


def scan_gathered(files: Iterable[str], columns: Mapping[str, DType]) -> "pl.LazyFrame":
    """Return the events in files of several shards, to be read when they are collected.

    Their sequences are new: there is no order between shards but that of known times, so these come
    first, then event times, then shards; those of one shard stay in the order of its log.
    """
    import polars as pl  # noqa: PLC0415 - in the child alone

    shard = "__shard"
    scans = enumerate(pl.scan_parquet(path, glob=False) for path in files)
    frames = [scan.with_columns(pl.lit(number).alias(shard)) for number, scan in scans]
    order = [KNOWN_TIME, EVENT_TIME, shard, SEQUENCE]
    sorted_frame = pl.concat(frames).select([*order, *columns]).sort(order)
    numbered = sorted_frame.drop(SEQUENCE, shard).with_row_index(SEQUENCE, 1)
    return numbered.with_columns(pl.col(SEQUENCE).cast(pl.Int64)).select(
        [EVENT_TIME, KNOWN_TIME, SEQUENCE, *columns]
    )


def count_gathered(files: Iterable[str]) -> int:
    """Return how many events there are in files of several shards."""
    import polars as pl  # noqa: PLC0415 - in the child alone

    return sum(
        pl.scan_parquet(path, glob=False).select(pl.len()).collect().item() for path in files
    )


def read_gathered(
    files: Iterable[str], columns: Mapping[str, DType], rows_max: int
) -> "Iterator[pl.DataFrame]":
    """Yield what `scan_gathered` has, `rows_max` rows at a time, in no promised order.

    Among equal times sequences order rows as there: by shard, then by its log.
    """
    import polars as pl  # noqa: PLC0415 - in the child alone

    for number, path in enumerate(files):
        scan, start = pl.scan_parquet(path, glob=False), 0
        stamped = scan.with_columns(pl.col(SEQUENCE) + number * _SHARD_SEQUENCES)
        wanted = stamped.select([EVENT_TIME, KNOWN_TIME, SEQUENCE, *columns])
        while len(frame := wanted.slice(start, rows_max).collect()):
            yield frame
            start += len(frame)


def offline_request(paths: DataDirectory, catalog: Catalog, through: int) -> dict[str, Any]:
    """Return the part of a child's request that `open_offline` reads."""
    return {"directory": str(paths.root), "catalog": catalog.to_state(), "through": through}


def event_columns(
    frame: "pl.DataFrame", schema: Mapping[str, DType], names: Iterable[str]
) -> Columns:
    """Return columns of a frame of events, and DELETED if one is a tombstone."""
    columns = {name: from_series(frame[name], schema[name]) for name in names}
    mark = frame[DELETED]
    return columns if mark.is_null().all() else {**columns, DELETED: from_series(mark, DType.BOOL)}
