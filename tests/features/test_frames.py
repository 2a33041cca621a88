"""Frames of a service with every type of feature: online rows, together and alone, and joined."""

# ruff: noqa: F821  annotations of transforms name features and types

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpd.core.columns import Column, DType, concat
from mlpd.core.convert import column_of
from mlpd.core.definitions import (
    Aggregate,
    Entity,
    FeatureService,
    FeatureView,
    Source,
    WindowView,
    build_document,
    transform,
)
from mlpd.core.errors import ConflictError, InternalError, ValidationError
from mlpd.core.specs import Closure
from mlpd.core.time import SECOND_US
from mlpd.core.vector import VectorFeature, Vectorizer
from mlpd.features.assemble import FeatureFrame
from mlpd.features.catalog import Catalog, build_catalog
from mlpd.features.ingest import apply_batch
from mlpd.features.kernels import load_feature_kernels
from mlpd.features.offline import Events, JoinOptions, Spine, join_history
from mlpd.features.on_stale import apply_on_stale
from mlpd.features.online import read_online
from mlpd.features.stamps import Stamps
from mlpd.features.status import Status
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

NOW_US = 1_700_000_000 * SECOND_US

rider, area = Entity("rider", key="string"), Entity("area", key={"city": "string", "zone": "int64"})
trips = Source(
    "trips",
    timestamp="event_time",
    schema={
        "rider": "string",
        "city": "string",
        "zone": "int64",
        "fare": "float64",
        "tip": "float32",
        "stops": "int64",
        "shared": "bool",
        "driver": "string",
        "token": "bytes",
        "booked": "timestamp",
    },
)
VALUES = ["fare", "tip", "stops", "shared", "driver", "token", "booked"]
last_trip = FeatureView("last_trip", entity=rider, source=trips, features=VALUES)
last_here = FeatureView(
    "last_here",
    entity=area,
    source=trips,
    features=VALUES[:5],
    ttl="1m",
    defaults={"tip": 0.1, "stops": 7, "driver": "nobody", "shared": True},
)
load = WindowView(
    "load",
    entity=area,
    source=trips,
    windows=["1h"],
    aggregates=[Aggregate.count(), Aggregate.mean("fare"), Aggregate.max("stops")],
    defaults={"fare_mean_1h": -0.5, "stops_max_1h": 2**53 + 1},
)


@transform
def per_stop(fare: "last_trip.fare", stops: "last_trip.stops") -> "float64":
    """Divides by zero only where it must not run: over nulls, whose words are 0."""
    return fare / stops


@transform
def generous(tip: "last_here.tip", least: "request.least", shared: "last_here.shared") -> "bool":
    return tip >= least and shared


@transform
def half_tip(tip: "last_trip.tip") -> "float32":
    return tip * 0.3


@transform
def whole(ratio: "per_stop") -> "int64":
    return int(ratio)


service = FeatureService(
    "trip",
    features=[rider, "zone", last_here, load, last_trip, per_stop, generous, half_tip, whole],
    request={"least": "float32", "note": "string"},
)


@dataclass
class Store:
    """A real store with a catalog, and the events that went into it."""

    catalog: Catalog
    environment: Environment
    writer: Writer
    batches: list[Events] = field(default_factory=list)

    @property
    def closure(self) -> Closure:
        return self.catalog.closures["trip"]

    def ingest(self, rows: Sequence[dict[str, Any]]) -> None:
        schema = self.catalog.definitions.source("trips").schema
        columns = {n: column_of(t, [row.get(n) for row in rows]) for n, t in schema.items()}
        event_us = np.array([row["at"] for row in rows], np.int64)

        def write(txn: WriteTransaction) -> Stamps:
            first = txn.take_sequences(len(rows))
            stamps = Stamps(event_us, event_us, np.arange(first, first + len(rows)))
            views = self.catalog.views_by_source["trips"]
            apply_batch(txn, views, columns, stamps, int(event_us.max()))
            return stamps

        self.batches.append(Events(columns, self.writer.write_blocking(write)))

    def read(self, given: dict[str, Column], *, keep_stale: bool = False) -> FeatureFrame:
        with self.environment.snapshot() as snapshot:
            return read_online(
                self.catalog,
                self.closure,
                given,
                snapshot.get_many,
                NOW_US,
                keep_stale=keep_stale,
            )

    def join(self, given: dict[str, Column], *, keep_stale: bool = False) -> FeatureFrame:
        spine = Spine(given, np.full(len(given["rider"]), NOW_US))
        return join_history(
            *(self.catalog, self.closure, spine, self._load),
            JoinOptions(keep_stale=keep_stale),
        )

    def _load(self, source: str, columns: tuple[str, ...]) -> Events:
        assert source == "trips"
        parts = {name: concat(batch.columns[name] for batch in self.batches) for name in columns}
        stamps = (
            np.concatenate(part) for part in zip(*(b.stamps for b in self.batches), strict=True)
        )
        return Events(parts, Stamps(*stamps))


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    definitions = (rider, area, trips, last_trip, last_here, load)
    document = build_document((*definitions, per_stop, generous, half_tip, whole, service))
    return build_catalog(
        document,
        version=1,
        view_ids={},
        next_view_id=1,
        kernels=load_feature_kernels(),
        cache=tmp_path_factory.mktemp("kernels"),
    )


@pytest.fixture
def store(catalog: Catalog, tmp_path: Path) -> Iterator[Store]:
    with Environment.open(tmp_path / "lmdb", clock=lambda: NOW_US) as environment:
        writer = Writer(environment)
        yield Store(catalog, environment, writer)
        writer.close()


def ago(seconds: float, **values: Any) -> dict[str, Any]:
    return {"at": NOW_US - int(seconds * SECOND_US), **values}


def random_rows(n: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)

    def some(value: Any) -> Any:
        return None if rng.random() < 0.2 else value

    return [
        ago(
            float(rng.integers(1, 4000)) / 10,
            rider=some(f"r{rng.integers(8)}"),
            city=some(["Rome", "", "Öl"][rng.integers(3)]),
            zone=some(int(rng.integers(-2, 2))),
            fare=some([math.nan, -0.0, 0.1, math.inf, float(rng.normal())][rng.integers(5)]),
            tip=some(float(np.float32(rng.normal()))),
            stops=some([2**53 + 1, -1, 3, 2**40][rng.integers(4)]),
            shared=some(bool(rng.integers(2))),
            driver=some(["", "Ünal", "x" * 300][rng.integers(3)]),
            token=some(bytes(rng.integers(0, 256, 5, np.uint8))),
            booked=some(int(rng.integers(2**50))),
        )
        for _ in range(n)
    ]


def request(rows: Sequence[tuple[str | None, str | None, int | None]]) -> dict[str, Column]:
    riders, cities, zones = zip(*rows, strict=True)
    return {
        "rider": column_of(DType.STRING, riders),
        "city": column_of(DType.STRING, cities),
        "zone": column_of(DType.INT64, zones),
        "least": column_of(DType.FLOAT32, [0.1 * i if i % 3 else None for i in range(len(rows))]),
        "note": column_of(DType.STRING, [f"n{i}" if i % 4 else None for i in range(len(rows))]),
    }


SPINE = [
    (rider, city, zone)
    for rider in ("r0", "r1", "r5", "nobody", None)
    for city, zone in (("Rome", 1), ("", -1), ("Öl", 0), ("Öl", None), (None, 1), ("none", 5))
]


def values_of(frame: FeatureFrame, rows: Any = slice(None)) -> dict[str, Any]:
    """All that a frame says, comparable to the bit."""
    found: dict[str, Any] = {f"event {v}": t[rows].tolist() for v, t in frame.event_us.items()}
    for name, column in frame.columns.items():
        part = column.take(rows)
        assert part.values.dtype == part.dtype.numpy
        values = part.values if part.values.dtype == object else np.ascontiguousarray(part.values)
        bits = values.tolist() if values.dtype == object else values.tobytes()
        found[name] = (part.dtype, bits, part.mask().tolist(), frame.statuses[name][rows].tolist())
    return found


def test_rows_read_alone_equal_rows_read_together_to_the_bit(store: Store) -> None:
    store.ingest(random_rows(300, seed=1))
    given = request(SPINE)
    together = store.read(given)
    for i in range(len(SPINE)):
        row = np.array([i])
        alone = store.read({name: column.take(row) for name, column in given.items()})
        assert values_of(alone) == values_of(together, row)
        assert values_of(together.take(row)) == values_of(together, row)


@pytest.mark.parametrize("view", ["last_trip", "last_here", "load"])
def test_a_damaged_value_is_refused_by_its_views_name(store: Store, view: str) -> None:
    store.ingest(random_rows(60, seed=1))
    given, damaged = request(SPINE), store.catalog.views[view].view_id

    def get_many(table: Table, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        with store.environment.snapshot() as snapshot:
            values = snapshot.get_many(table, keys)
        return [
            value[:8] if value and key[2:6] == damaged.to_bytes(4, "big") else value
            for key, value in zip(keys, values, strict=True)
        ]

    with pytest.raises(InternalError, match=f"'{view}'"):
        read_online(store.catalog, store.closure, given, get_many, NOW_US)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_read_online_equals_what_the_join_finds(store: Store, seed: int) -> None:
    for part in range(3):
        store.ingest(random_rows(60, seed=10 * seed + part))
    store.ingest([ago(300, city="none", zone=5, fare=1.5, tip=2.0, driver="Ada")])  # stale for sure
    given = request(SPINE)
    assert values_of(store.read(given)) == values_of(store.join(given))
    kept = store.read(given, keep_stale=True)
    assert values_of(kept) == values_of(store.join(given, keep_stale=True))
    assert values_of(kept) != values_of(store.read(given))
    for name, status in store.read(given).statuses.items():
        if name.partition(".")[0] in store.catalog.views:
            assert kept.statuses[name].tolist() == status.tolist()


def test_a_store_without_events_reads_as_missing(store: Store) -> None:
    store.ingest([ago(1, rider="x")])
    store.batches.clear()
    frame = store.read(request([("r0", "Rome", 1)]))
    assert {int(frame.statuses[f"last_trip.{name}"][0]) for name in VALUES} == {Status.MISSING}
    assert frame.columns["load.count_1h"].to_list() == [0]
    assert frame.statuses["load.fare_mean_1h"].tolist() == [Status.NULL]
    assert frame.event_us["last_trip"].tolist() == [0]


def test_statuses_and_defaults_tell_null_missing_and_stale_apart(store: Store) -> None:
    here = {"city": "Rome", "tip": 2.0, "driver": "Ada"}
    store.ingest([ago(10, zone=1, **here), ago(61, zone=2, **here), ago(60, zone=3, **here)])
    frame = store.read(request([("r", "Rome", zone) for zone in (1, 2, 3, 4)]))
    present, null, missing, stale = Status.PRESENT, Status.NULL, Status.MISSING, Status.STALE

    def read(name: str) -> tuple[list[Any], list[int]]:
        return frame.columns[name].to_list(), frame.statuses[name].tolist()

    tenth = float(np.float32(0.1))
    assert read("last_here.tip") == ([2.0, tenth, 2.0, tenth], [present, stale, present, missing])
    assert read("last_here.stops") == ([7, 7, 7, 7], [null, stale, null, missing])
    assert read("last_here.fare") == ([None] * 4, [null, stale, null, missing])
    assert read("last_here.driver")[0] == ["Ada", "nobody", "Ada", "nobody"]
    assert read("last_here.shared")[0] == [True] * 4
    assert frame.event_us["last_here"].tolist() == [
        NOW_US - age * SECOND_US if age else 0 for age in (10, 61, 60, 0)
    ]


def test_a_windows_default_stands_in_for_null_online_and_offline(store: Store) -> None:
    store.ingest([ago(10, city="Rome", zone=1, fare=2.0), ago(4000, city="Rome", zone=2, fare=1.0)])
    given = request([("r", "Rome", zone) for zone in (1, 2, 3)])
    for frame in (store.read(given), store.join(given)):
        assert frame.columns["load.fare_mean_1h"].to_list() == [2.0, -0.5, -0.5]
        assert frame.statuses["load.fare_mean_1h"].tolist() == [0, 1, 1]
        assert frame.columns["load.stops_max_1h"].to_list() == [2**53 + 1] * 3
        assert frame.statuses["load.stops_max_1h"].tolist() == [1, 1, 1]
        assert frame.columns["load.count_1h"].to_list() == [1, 0, 0]
        part = frame.take(np.array([2, 0]))
        assert part.columns["load.fare_mean_1h"].to_list() == [-0.5, 2.0]
        assert part.statuses["load.fare_mean_1h"].tolist() == [1, 0]


def test_stale_values_stay_where_they_are_wanted(store: Store) -> None:
    here = {"city": "Rome", "tip": 2.0, "driver": "Ada", "shared": False}
    store.ingest([ago(10, zone=1, **here), ago(61, zone=2, **here), ago(60, zone=3, **here)])
    given = request([("r", "Rome", zone) for zone in (1, 2, 3, 4, 2)])
    present, null, missing, stale = Status.PRESENT, Status.NULL, Status.MISSING, Status.STALE
    for frame in (store.read(given, keep_stale=True), store.join(given, keep_stale=True)):
        tips = frame.columns["last_here.tip"].to_list()
        assert tips == [2.0, 2.0, 2.0, float(np.float32(0.1)), 2.0]
        statuses = frame.statuses["last_here.tip"].tolist()
        assert statuses == [present, stale, present, missing, stale]
        assert frame.columns["last_here.stops"].to_list() == [7] * 5  # null as written
        assert frame.statuses["last_here.stops"].tolist() == [null, stale, null, missing, stale]
        assert frame.columns["last_here.fare"].to_list() == [None] * 5
        drivers = frame.columns["last_here.driver"].to_list()
        assert drivers == ["Ada", "Ada", "Ada", "nobody", "Ada"]
        assert frame.columns["generous"].to_list()[1] is False  # of the stale tip, not its default


def test_a_stale_value_is_refused_by_name_where_it_is_an_error(store: Store) -> None:
    store.ingest([ago(10, city="Rome", zone=1), ago(61, city="Rome", zone=2)])
    fresh, old = (request([("r", "Rome", zone) for zone in zones]) for zones in ((1, 4), (1, 2)))
    for read in (store.read, store.join):
        apply_on_stale(read(fresh), "error")
        apply_on_stale(read(old), "null")
        with pytest.raises(ConflictError, match="'last_here.fare' of row 1") as refused:
            apply_on_stale(read(old), "error")
        assert refused.value.code == "stale_feature"
        assert refused.value.details == {"feature": "last_here.fare", "index": 1}


def test_transforms_run_where_all_their_arguments_are_valid(store: Store) -> None:
    store.ingest(
        [
            ago(5, rider="a", fare=9.0, stops=4, tip=0.7),
            ago(5, rider="b", fare=9.0, stops=None, tip=None),
            ago(5, rider="c", fare=math.nan, stops=1, tip=-0.7),
        ]
    )
    frame = store.read(request([(rider, "Rome", 1) for rider in ("a", "b", "c", "d")]))
    ratio = frame.columns["per_stop"].to_list()
    assert ratio[:2] == [2.25, None]
    assert math.isnan(ratio[2])
    assert ratio[3] is None
    assert frame.columns["whole"].to_list()[:2] == [2, None]
    tips = [float(np.float32(float(np.float32(tip)) * 0.3)) for tip in (0.7, -0.7)]
    assert frame.columns["half_tip"].to_list() == [tips[0], None, tips[1], None]
    assert frame.columns["generous"].to_list() == [None, True, False, None]
    assert frame.statuses["generous"].tolist() == [1, 0, 0, 1]


def test_a_vector_from_the_block_equals_one_from_the_columns(store: Store) -> None:
    store.ingest(random_rows(200, seed=3))
    frame = store.read(request(SPINE))
    columns = {n: c for n, c in frame.columns.items() if c.dtype is not DType.BYTES}
    texts = [name for name, column in columns.items() if column.dtype is DType.STRING]
    vectorizer = Vectorizer.fit(columns, [*texts, "zone", "last_here.shared"])
    placed = vectorizer.place(frame.layout.vector, frame.layout.dtypes)
    vectors = placed.vectorize(frame.block.words, frame.block.valid, frame.block.texts)
    assert vectors.tobytes() == vectorizer.vectorize(columns).tobytes()


def test_a_missing_or_mistyped_key_or_field_is_named(store: Store) -> None:
    given = request([("r0", "Rome", 1)])
    for name, code in (("zone", "missing_entity_key"), ("least", "missing_request_field")):
        with pytest.raises(ValidationError, match=f"'{name}'") as refusal:
            store.read({n: column for n, column in given.items() if n != name})
        assert refusal.value.code == code
        with pytest.raises(ValidationError, match=f"'{name}'") as refusal:
            store.read({**given, name: column_of(DType.STRING, ["1"])})
        assert refusal.value.code == "wrong_type"


def test_a_model_is_refused_features_of_another_type(store: Store) -> None:
    layout = store.read(request([("r0", "Rome", 1)])).layout
    for feature in (VectorFeature("rider", DType.FLOAT64), VectorFeature("nothing", DType.INT64)):
        with pytest.raises(ValidationError, match=feature.name):
            Vectorizer((feature,)).place(layout.vector, layout.dtypes)
