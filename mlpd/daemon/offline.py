"""What child processes share: the store read-only, the catalog, and the events of a source."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlpd.core.columns import Column, Columns, DType
from mlpd.core.specs import SourceSpec
from mlpd.core.time import system_clock
from mlpd.features.catalog import Catalog, build_catalog
from mlpd.features.offline import Events
from mlpd.features.stamps import Stamps
from mlpd.features.windows import load_window_kernels
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.offline import scan_events
from mlpd.storage.segments import EVENT_TIME, KNOWN_TIME, SEQUENCE

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True, slots=True)
class Offline:
    """The data directory as a child sees it, up to and including the sequence `through`."""

    paths: DataDirectory
    environment: Environment
    catalog: Catalog
    through: int

    def events(self, source: str, columns: tuple[str, ...]) -> Events:
        """Return all events of `source` in sequence order, with `columns` of its schema."""
        spec = self.catalog.definitions.source(source)
        frame = self.frame(spec, {name: spec.schema[name] for name in columns})
        return Events(
            {name: from_series(frame[name], spec.schema[name]) for name in columns},
            stamps_of(frame),
        )

    def frame(self, source: SourceSpec, columns: Mapping[str, DType]) -> "pl.DataFrame":
        """Return the events of a source in sequence order, as polars sees them."""
        lazy = scan_events(
            self.environment,
            self.paths.segments,
            source.name,
            columns=columns,
            through_sequence=self.through,
        )
        return lazy.sort(SEQUENCE).collect()


@contextmanager
def open_offline(request: Mapping[str, Any]) -> Iterator[Offline]:
    """Open the data directory for a child's request: `directory`, `catalog` and `through`."""
    paths = DataDirectory(Path(request["directory"]))
    kernels = load_window_kernels()
    with Environment.open(paths.lmdb, clock=system_clock, readonly=True) as environment:
        catalog = build_catalog(
            **request["catalog"], kernels=kernels, cache=paths.cache / "kernels"
        )
        yield Offline(paths, environment, catalog, request["through"])


def offline_request(paths: DataDirectory, catalog: Catalog, through: int) -> dict[str, Any]:
    """Return the part of a child's request that `open_offline` reads."""
    return {"directory": str(paths.root), "catalog": catalog.to_state(), "through": through}


def stamps_of(frame: "pl.DataFrame") -> Stamps:
    """Return the stamps of a frame of events."""
    return Stamps(*(frame[name].to_numpy() for name in (EVENT_TIME, KNOWN_TIME, SEQUENCE)))


def from_series(series: "pl.Series", dtype: DType) -> Column:
    """Return a polars series as a column; null stays null, NaN stays NaN."""
    valid = None if series.null_count() == 0 else series.is_not_null().to_numpy()
    if not dtype.is_numeric:
        empty: Any = "" if dtype is DType.STRING else b""
        values = np.empty(len(series), object)
        values[:] = series.fill_null(empty).to_list()
        return Column(dtype, values, valid)
    physical = series.to_physical()
    zero: Any = False if dtype is DType.BOOL else 0
    array = (physical if valid is None else physical.fill_null(zero)).to_numpy()
    return Column(dtype, np.ascontiguousarray(array, dtype.numpy), valid)


def take_columns(frame: "pl.DataFrame", schema: Mapping[str, DType]) -> Columns:
    """Return the columns of `schema` from a frame."""
    return {name: from_series(frame[name], dtype) for name, dtype in schema.items()}
