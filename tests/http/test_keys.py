"""Keys of every kind, alone and composite, and transforms that read each other, end to end."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from mlpd import Aggregate, Entity, FeatureService, FeatureView, Job, Source, Spine, WindowView
from mlpd.client import Client
from mlpd.core.definitions import Transform, build_document
from tests.http.edge import Edge, serve

START_US = 1_356_998_400_000_000
BIG = 2**53 + 1
ADDED = Transform(
    *("added", "def added(number, add):\n    return number + add"),
    [("number", "by_place.number"), ("add", "request.add")],
    "int64",
)
ONE_LESS = Transform("one_less", "def one_less(x):\n    return x - 1", [("x", "added")], "int64")
KEYS = {"shop": "string", "shelf": "int64", "tag": "bytes"}
ENTITIES = {
    "shop": {"shop": "string"},
    "shelf": {"shelf": "int64"},
    "tag": {"tag": "bytes"},
    "place": KEYS,
}
PLACES: list[tuple[str, int, bytes]] = [
    ("1", 1, b"1"),
    ("1", BIG, b"1"),
    ("1", BIG - 1, b"1"),
    ("1\x00", 1, b""),
    ("", -(2**63), b"\x00"),
    ("\u00fc" * 300, 2**63 - 1, b"\xff" * 600),
]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """A daemon with latest values and counts by every kind of key, each place seen twice."""
    entities = [Entity(name, key=keys) for name, keys in ENTITIES.items()]
    source = Source("seen", timestamp="at", schema={**KEYS, "number": "int64"})
    latest = [FeatureView(f"by_{e.name}", e, source, ["number"]) for e in entities]
    counts = [
        WindowView(f"count_{e.name}", e, source, ["1h"], [Aggregate.count()]) for e in entities
    ]
    windows = WindowView(
        "numbers",
        *(entities[-1], source, ["1h"]),
        [Aggregate.sum("number"), Aggregate.max("number"), Aggregate.first("number")],
    )
    views = [*latest, *counts, windows]
    objects = [*entities, source, *views, ADDED, ONE_LESS]
    service = FeatureService("all", [*views, ADDED, ONE_LESS], request={"add": "int64"})
    with serve(tmp_path_factory.mktemp("keyed") / "data") as running:
        with Client(running.url) as client:
            client.apply(build_document([*objects, service]))
            for i, column in enumerate((None, [BIG + i for i in range(len(PLACES))])):
                client.events.send("seen", sightings(column or [None] * len(PLACES), i))
        yield running


def sightings(numbers: list[Any], i: int) -> dict[str, list[Any]]:
    times = [START_US + i] * len(PLACES)
    columns = {name: list(c) for name, c in zip(KEYS, zip(*PLACES, strict=True), strict=True)}
    return {"at": times, "known_at": times, **columns, "number": numbers}


def asked(places: list[tuple[str, int, bytes]]) -> list[dict[str, Any]]:
    return [{**dict(zip(KEYS, place, strict=True)), "add": 2} for place in places]


def expected(places: list[tuple[str, int, bytes]]) -> dict[str, list[Any]]:
    """By brute force: every place was seen twice, the second time with a number."""

    def last(part: int, place: tuple[str, int, bytes]) -> int:
        return max(BIG + i for i, other in enumerate(PLACES) if other[part] == place[part])

    own = [BIG + PLACES.index(place) for place in places]
    return {
        **{f"by_{name}.number": [last(i, p) for p in places] for i, name in enumerate(KEYS)},
        "by_place.number": own,
        **{
            f"count_{name}.count_1h": [2 * sum(q[i] == p[i] for q in PLACES) for p in places]
            for i, name in enumerate(KEYS)
        },
        "count_place.count_1h": [2] * len(places),
        **{f"numbers.number_{f}_1h": own for f in ("sum", "max", "first")},
        "added": [number + 2 for number in own],
        "one_less": [number + 1 for number in own],
        "add": [2] * len(places),
    }


def test_every_kind_of_key_joins_exactly(keyed: Edge) -> None:
    rows = asked(PLACES)
    spine = [{**row, "event_time": START_US + 60_000_000} for row in rows]
    with Client(keyed.url) as client:
        frames = [client.history("all", spine=spine)]
        kinds = {"event_time": pl.Datetime("us", "UTC"), "tag": pl.Binary}
        given = pl.DataFrame(spine).cast(kinds)
        frames.append(client.history("all", spine=given))
    for frame in frames:
        found = {name: frame[name].to_list() for name in expected(PLACES)}
        assert found == expected(PLACES)
        assert frame["tag"].to_list() == [place[2] for place in PLACES]


def test_every_kind_of_key_reads_exactly(keyed: Edge) -> None:
    online = {n: v for n, v in expected(PLACES).items() if not n.startswith(("count_", "numbers"))}
    rows = asked(PLACES)
    with Client(keyed.url) as client:
        for entities in (rows, {name: [row[name] for row in rows] for name in rows[0]}):
            found = client.read_features("all", entities=entities)["columns"]
            assert {name: found[name] for name in online} == online
    texts = [{**row, "tag": f"0x{row['tag'].hex()}"} for row in rows]
    status, value, _ = keyed.call(
        "POST", "/v1/features/read", {"service": "all", "entities": texts}
    )
    assert status == 200, value
    assert {name: value["columns"][name] for name in online} == online


def test_events_bring_every_kind_of_key_by_every_form(tmp_path: Path, keyed: Edge) -> None:
    with serve(tmp_path / "data") as edge, Client(edge.url) as client, Client(keyed.url) as other:
        client.apply(other.definitions()["document"])
        columns = sightings([None] * len(PLACES), 0)
        columns["tag"] = [f"0x{tag.hex()}" for tag in columns["tag"]]
        done = edge.call("POST", "/v1/events/seen", {"columns": columns})[1]
        assert (done["accepted"], done["rejected"]) == (len(PLACES), [])
        frame = pl.DataFrame(sightings([BIG + i for i in range(len(PLACES))], 1))
        assert client.events.send("seen", frame)["accepted"] == len(PLACES)
        found = client.read_features("all", entities=asked(PLACES))["columns"]
        assert found["by_place.number"] == expected(PLACES)["by_place.number"]
        assert found["by_shelf.number"] == expected(PLACES)["by_shelf.number"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"shelf": "1"}, "wrong_type"),
        ({"shelf": 1.0}, "wrong_type"),
        ({"shelf": True}, "wrong_type"),
        ({"shelf": 2**63}, "wrong_type"),
        ({"shop": 1}, "wrong_type"),
        ({"tag": "1"}, "wrong_type"),
        ({"tag": 1}, "wrong_type"),
    ],
    ids=str,
)
def test_a_key_of_another_type_is_an_error(keyed: Edge, change: Any, code: str) -> None:
    row = {"shop": "1", "shelf": 1, "tag": "0x31", "add": 0, **change}
    status, value, _ = keyed.call(
        "POST", "/v1/features/read", {"service": "all", "entities": [row]}
    )
    assert (status, value["error"]["code"]) == (400, code)
    row = {"at": START_US, "known_at": START_US, **row}
    del row["add"]
    value = keyed.call("POST", "/v1/events/seen", {"rows": [row]})[1]
    assert [refused["code"] for refused in value["rejected"]] == [code]


def test_a_key_with_a_null_part_is_no_entity(keyed: Edge) -> None:
    rows = [{**asked(PLACES[:1])[0], name: None} for name in KEYS]
    with Client(keyed.url) as client:
        answer = client.read_features("all", entities=rows)
        assert answer["statuses"]["by_place.number"] == [2, 2, 2]
        assert answer["columns"]["count_place.count_1h"] == [0, 0, 0]
        assert answer["columns"]["one_less"] == [None] * 3
        assert answer["statuses"]["by_tag.number"] == [0, 0, 2]


def test_a_model_by_composite_key_serves_what_it_trained_on(tmp_path: Path) -> None:
    place = Entity("place", key=KEYS)
    schema = {**KEYS, "number": "int64", "add": "int64", "bought": "bool", "shown": "timestamp"}
    source = Source("seen", timestamp="at", schema=schema)
    latest = FeatureView("by_place", place, source, ["number"])
    sums = WindowView("sums", place, source, ["1h"], [Aggregate.sum("number")])
    service = FeatureService("all", [latest, sums, ADDED, ONE_LESS], request={"add": "int64"})
    job = Job(
        *("buys", service, Spine(source, time="shown")),
        label="bought",
        params={"min_data_in_leaf": 5},
        num_boost_round=10,
        deploy="champion",
    )
    objects = [place, source, latest, sums, ADDED, ONE_LESS, service, job]
    n, times = 600, ("at", "known_at", "shown")
    events = {
        **{name: [START_US + i * 1_000_000 for i in range(n)] for name in times},
        **{name: [PLACES[i % 3][part] for i in range(n)] for part, name in enumerate(KEYS)},
        "number": [i * 7 % 31 for i in range(n)],
        "add": [i % 5 for i in range(n)],
        "bought": [i * i * 13 % 17 > 8 for i in range(n)],
    }
    with serve(tmp_path / "data") as edge, Client(edge.url) as client:
        client.apply(build_document(objects))
        client.events.send("seen", events)
        run = client.runs.wait(client.runs.start("buys")["run_id"], timeout_s=50)
        assert run["state"] == "succeeded", run["error"]
        client.routes.put("buys", {"service": "all", "arms": [{"model": "buys@champion"}]})
        rows = asked(PLACES)
        answer = client.predict("buys", rows, include=["features"])
        features = [row["features"] for row in answer["predictions"]]
        assert [f["by_place.number"] for f in features[:3]] == events["number"][-3:]
        assert [f["added"] for f in features[:3]] == [x + 2 for x in events["number"][-3:]]
        assert [f["one_less"] for f in features[:3]] == [x + 1 for x in events["number"][-3:]]
        assert [f["one_less"] for f in features[3:]] == [None] * 3
        texts = [{**row, "tag": f"0x{row['tag'].hex()}"} for row in rows]
        value = edge.call("POST", "/v1/predict/buys", {"rows": texts})[1]
        scores = [[p["score"] for p in v["predictions"]] for v in (value, answer)]
        assert scores[0] == scores[1]
        audit = client.run_consistency()
        assert (audit["rows_compared"], audit["mismatches"], audit["unavailable"]) == (12, 0, 0)
