"""Splitting and merging without any daemon: every row where it belongs, in its order, once."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import IntEnum, StrEnum
from typing import Any

import msgpack
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpd.client.operations import Operations
from mlpd.client.requests import Request
from mlpd.client.scatter import Scatter, Topology
from mlpd.client.topology import Guide
from mlpd.core.columns import DType
from mlpd.core.errors import (
    ConfigurationError,
    ConflictError,
    MisdirectedError,
    MlpdError,
    OverloadedError,
    UnavailableError,
    ValidationError,
)
from mlpd.core.hashing import SLOTS, slot_of
from mlpd.core.keys import encode_entity
from mlpd.core.routing import Routing
from mlpd.core.shards import Shard, ShardMap, parse_runs
from mlpd.core.specs import EntitySpec
from mlpd.http.predict import RECORDED

USER = EntitySpec("user", (("user", DType.STRING),))
SHOP = EntitySpec("shop", (("shop", DType.INT64),))
ROUTING = Routing(
    {"sales": (SHOP, USER), "notes": ()},
    {"person": (USER,), "both": (SHOP, USER), "bare": ()},
    {"risk": (USER,)},
    {"profile": (USER,), "takings": (SHOP,)},
)
COUNTS = [field for field in RECORDED.fields if field != "rejected"]
SHARDS = tuple(Shard(name, f"http://{name}:1") for name in "abc")


def a_map(seed: int = 0, epoch: int = 1) -> ShardMap:
    owners = np.random.default_rng(seed).integers(0, 3, SLOTS).tolist()
    return ShardMap("0f" * 16, epoch, SHARDS, tuple(owners))


class Caught(Operations[Any, Any, Any, Any, Any, Any]):
    """Keeps what would be sent."""

    def __init__(self) -> None:
        super().__init__(deadline_s=None)
        self.last: Any = None

    def send(self, request: Request | Scatter) -> Any:
        self.last = request


def scatter_of(call: Callable[[Any], Any]) -> Scatter:
    client = Caught()
    call(client)
    assert isinstance(client.last, Scatter)
    return client.last


class Fleet:
    """Daemons that answer by a map of their own; `calls` is what they were asked."""

    def __init__(self, shard_map: ShardMap) -> None:
        self.shard_map = shard_map
        self.calls: list[tuple[str, Request, Any]] = []
        self.down: set[str] = set()
        self.stored: dict[str, list[Any]] = {shard.name: [] for shard in SHARDS}

    def answer(self, url: str, request: Request) -> Any:
        name = url[len("http://")]
        body = None if request.body is None else msgpack.unpackb(request.body)  # type: ignore[arg-type]
        self.calls.append((name, request, body))
        if name in self.down:
            return UnavailableError("it is down", code="unreachable")
        if request.path == "/v1/cluster/map":
            return {"shard": name, "map": self.shard_map.to_dict()}
        if request.path == "/v1/cluster/routing":
            return ROUTING.to_dict()
        epoch = request.headers.get("x-mlpd-epoch")
        if epoch is None or int(epoch) < self.shard_map.epoch:
            return MisdirectedError("old", code="stale_epoch")
        return getattr(self, request.path.split("/")[2])(name, body)

    def features(self, name: str, body: Any) -> Any:
        rows = body["entities"]
        return {
            "columns": {"x": [row.get("user") for row in rows]},
            "statuses": {"x": [0] * len(rows)},
            "event_times": {},
            "t_us": ord(name),
            "sequence": ord(name),
        }

    def cluster(self, name: str, body: Any) -> Any:
        groups = [
            {
                "columns": asked["columns"],
                "keys": asked["values"],
                "views": {
                    "v": {
                        "values": [f"{asked['columns'][0]} {key}" for (key,) in asked["values"]],
                        "older": None,
                    }
                },
            }
            for asked in body["keys"]
        ]
        return {"t_us": ord(name), "sequence": 1, "groups": groups}

    def predict(self, name: str, body: Any) -> Any:
        rows = [{"prediction_id": row["user"], "score": 1.0, "at": name} for row in body["rows"]]
        return {"route": "risk", "route_version": 3, "predictions": rows} | {
            "t_us": 1,
            "sequence": 2,
        }

    def feedback(self, name: str, body: Any) -> Any:
        self.stored[name] += body["labels"]
        counts = {count: i * len(body["labels"]) for i, count in enumerate(COUNTS, 1)}
        return {**counts, "rejected": []}

    def events(self, name: str, body: Any) -> Any:
        rows = body.get("rows", [])
        self.stored[name] += rows
        return {
            "accepted": len(rows),
            "sequence": len(self.stored[name]),
            "rejected": [],
            "clamped": 0,
            "duplicates": 0,
            "known_us": 1,
            "replayed": False,
        }


def drive(guide: Guide, scatter: Scatter, fleet: Fleet) -> Any:
    calls = guide.calls(scatter)
    try:
        asked = next(calls)
        while True:
            asked = calls.send([fleet.answer(*call) for call in asked])
    except StopIteration as stop:
        return stop.value


def guide_with(shard_map: ShardMap) -> Guide:
    guide = Guide(["http://a:1", "http://b:1"])
    guide.topology = Topology(shard_map, ROUTING)
    return guide


def owner(shard_map: ShardMap, dtype: DType, value: Any) -> str:
    encoded = encode_entity([dtype], [value], "e")
    assert encoded is not None
    return shard_map.owner(slot_of(encoded)).name


def owners_of(shard_map: ShardMap, row: dict[str, Any]) -> list[str]:
    """The shards of a sale, by the definition alone; the home first."""
    keys = [(DType.INT64, row.get("shop")), (DType.STRING, row.get("user"))]
    found = [owner(shard_map, dtype, value) for dtype, value in keys if value is not None]
    return list(dict.fromkeys(found or [shard_map.owner(slot_of(b"sales")).name]))


def slots_of_sale(row: dict[str, Any]) -> set[int]:
    keys = [(DType.INT64, row["shop"]), (DType.STRING, row["user"])]
    encoded = [encode_entity([dtype], [value], "e") for dtype, value in keys]
    return {slot_of(e) for e in encoded if e is not None}


users = st.none() | st.sampled_from([f"u{i}" for i in range(20)])
sale_rows = st.lists(
    st.fixed_dictionaries({"user": users, "shop": st.none() | st.integers(0, 9)}), max_size=25
)


@settings(max_examples=40)
@given(st.lists(users, max_size=30), st.integers(0, 3))
def test_reads_come_back_in_the_order_of_the_rows(asked: list[str | None], seed: int) -> None:
    fleet = Fleet(a_map(seed))
    rows = [{"user": user} for user in asked]
    found = drive(
        guide_with(fleet.shard_map),
        scatter_of(lambda c: c.read_features("person", entities=rows)),
        fleet,
    )
    assert found["columns"] == {"x": asked}
    assert "errors" not in found
    for name, _, body in fleet.calls:
        for row in body["entities"]:
            assert row["user"] is None or owner(fleet.shard_map, DType.STRING, row["user"]) == name
    assert len({name for name, *_ in fleet.calls}) == len(fleet.calls)  # one call a shard
    assert found["sequence"] == {name: ord(name) for name, *_ in fleet.calls}


@settings(max_examples=60)
@given(sale_rows, st.integers(0, 3), st.sampled_from(["rows", "columns", "frame", "many"]))
def test_events_go_to_every_shard_that_they_concern(
    rows: list[dict[str, Any]], seed: int, form: str
) -> None:
    fleet = Fleet(a_map(seed))
    columns = {name: [row[name] for row in rows] for name in ("user", "shop")}
    data: Any = {"rows": rows, "columns": columns, "many": rows}.get(form)
    if form == "frame":
        data = pl.DataFrame(columns, schema={"user": pl.String, "shop": pl.Int64})
    topology = Topology(fleet.shard_map, ROUTING)
    pieces = split_events(data, form, topology)
    homes: list[int] = []
    got: dict[str, set[int]] = {name: set() for name in "abc"}
    for piece in pieces:
        assert not got[piece.shard.name] & set(piece.rows)
        got[piece.shard.name].update(piece.rows)
        homes += () if piece.is_copy else piece.rows
        for row in piece.rows:
            assert (owners_of(fleet.shard_map, rows[row])[0] == piece.shard.name) != piece.is_copy
    assert sorted(homes) == list(range(len(rows)))
    for row, values in enumerate(rows):
        assert {n for n, mine in got.items() if row in mine} == set(
            owners_of(fleet.shard_map, values)
        )


def split_events(data: Any, form: str, topology: Topology) -> list[Any]:
    from mlpd.client.scatter import Gathered  # noqa: PLC0415 - here alone

    call: Callable[[Any], Any] = lambda c: c.events.send("sales", data)  # noqa: E731
    if form == "many":
        call = lambda c: c.events.send_many({"sales": data, "notes": []})  # noqa: E731
    return scatter_of(call).split(topology, None, Gathered())


def test_a_client_of_one_daemon_asks_for_no_map() -> None:
    fleet, guide = Fleet(a_map()), Guide(["http://a:1"])
    fleet.answer = lambda url, request: (url, request.path)  # type: ignore[method-assign,assignment]
    assert drive(guide, scatter_of(lambda c: c.feedback([])), fleet) == (
        "http://a:1",
        "/v1/feedback",
    )
    assert guide.topology is None


def test_a_client_of_one_daemon_learns_from_its_refusal() -> None:
    fleet, guide = Fleet(a_map()), Guide(["http://a:1"])
    rows = [{"user": f"u{i}"} for i in range(9)]
    read = scatter_of(lambda c: c.read_features("person", entities=rows))
    assert drive(guide, read, fleet)["columns"]["x"] == [row["user"] for row in rows]
    paths = [request.path.rpartition("/")[2] for _, request, _ in fleet.calls]
    assert paths == ["read", "map", "routing", "read", "read", "read"]
    drive(guide, read, fleet)
    assert len(fleet.calls) == 9  # what it knows it keeps


def test_an_old_map_is_fetched_anew_and_tried_once_more() -> None:
    fleet = Fleet(a_map(1, epoch=2))
    guide = guide_with(a_map(0))
    rows = [{"user": f"u{i}", "shop": i} for i in range(30)]
    answer = drive(guide, scatter_of(lambda c: c.events.send("sales", rows)), fleet)
    assert answer["accepted"] == 30
    for name in "abc":
        want = [row for row in rows if name in owners_of(fleet.shard_map, row)]
        assert sorted(map(str, fleet.stored[name])) == sorted(map(str, want))
    fleet.shard_map = replace(fleet.shard_map, epoch=9)
    fleet.features = lambda *_: MisdirectedError("elsewhere")  # type: ignore[method-assign]
    with pytest.raises(MisdirectedError):  # and no third time
        drive(guide, scatter_of(lambda c: c.read_features("person", entities=rows[:1])), fleet)


@pytest.mark.parametrize("seed", range(4))
def test_each_event_counts_once_for_each_of_its_slots_over_a_change_of_maps(seed: int) -> None:
    """Only one shard has the new map when the events come: the others take them by the old one."""
    maps = {1: a_map(0), 2: a_map(1 + seed, epoch=2)}
    fleet, guide = Fleet(maps[2]), guide_with(maps[1])
    behind = {"b", "c"}
    plain, counted = fleet.answer, Counter[tuple[int, int]]()

    def answer(url: str, request: Request) -> Any:
        name, epoch = url[len("http://")], request.headers.get("x-mlpd-epoch")
        if epoch == "1" and name in behind:
            found = fleet.events(name, msgpack.unpackb(request.body))  # type: ignore[arg-type]
        else:
            found = plain(url, request)
        if epoch is not None and not isinstance(found, MlpdError):
            only = request.headers.get("x-mlpd-slots")
            meant = range(SLOTS) if only is None else parse_runs(only)
            for row in msgpack.unpackb(request.body)["rows"]:  # type: ignore[arg-type]
                for slot in slots_of_sale(row):
                    if maps[int(epoch)].owner(slot).name == name and slot in meant:
                        counted[row["n"], slot] += 1
        return found

    fleet.answer = answer  # type: ignore[method-assign]
    rows = [{"user": f"u{i}", "shop": i, "n": i} for i in range(30)]
    answer_ = drive(guide, scatter_of(lambda c: c.events.send("sales", rows)), fleet)
    assert answer_["accepted"] == 30
    assert counted == Counter((row["n"], slot) for row in rows for slot in slots_of_sale(row))


def test_a_shard_that_is_down_costs_its_rows_alone() -> None:
    fleet, rows = Fleet(a_map()), [{"user": f"u{i}"} for i in range(20)]
    fleet.down = {"b"}
    lost = [i for i, r in enumerate(rows) if owner(fleet.shard_map, DType.STRING, r["user"]) == "b"]
    assert 0 < len(lost) < 20
    guide = guide_with(fleet.shard_map)
    found = drive(guide, scatter_of(lambda c: c.read_features("person", entities=rows)), fleet)
    assert [error["index"] for error in found["errors"]] == lost
    assert {error["code"] for error in found["errors"]} == {"unreachable"}
    for i, row in enumerate(rows):
        assert found["columns"]["x"][i] == (None if i in lost else row["user"])
        assert found["statuses"]["x"][i] == (None if i in lost else 0)
    served = drive(guide, scatter_of(lambda c: c.predict("risk", rows)), fleet)["predictions"]
    assert [i for i, p in enumerate(served) if "error" in p] == lost
    assert all(p["score"] is None for i, p in enumerate(served) if i in lost)
    assert [p["prediction_id"] for i, p in enumerate(served) if i not in lost] == [
        row["user"] for i, row in enumerate(rows) if i not in lost
    ]
    with pytest.raises(UnavailableError):  # nothing came back at all
        drive(guide, scatter_of(lambda c: c.predict("risk", [rows[lost[0]]])), fleet)


def test_a_write_that_is_not_confirmed_raises_and_says_which_rows() -> None:
    fleet = Fleet(a_map())
    fleet.down = {"b"}
    rows = [{"user": f"u{i}", "shop": i} for i in range(20)]
    lost = [i for i, row in enumerate(rows) if "b" in owners_of(fleet.shard_map, row)]
    send = scatter_of(lambda c: c.events.send("sales", rows, idempotency_key="k"))
    with pytest.raises(UnavailableError) as failed:
        drive(guide_with(fleet.shard_map), send, fleet)
    assert failed.value.details["failed_rows"] == lost
    assert failed.value.details["idempotency_key"] == "k"
    before = {request.headers["Idempotency-Key"] for _, request, _ in fleet.calls}
    fleet.calls.clear()
    fleet.down = set()
    again = scatter_of(lambda c: c.events.send("sales", rows, idempotency_key="k"))
    drive(guide_with(fleet.shard_map), again, fleet)
    assert {request.headers["Idempotency-Key"] for _, request, _ in fleet.calls} == before
    labels = [{"prediction_id": f"{1:016x}{slot:04x}{1:012x}", "label": 1} for slot in range(30)]
    fleet.down = {"c"}
    with pytest.raises(UnavailableError) as failed:
        drive(guide_with(fleet.shard_map), scatter_of(lambda c: c.feedback(labels)), fleet)
    missed = [i for i in range(30) if fleet.shard_map.owner(i).name == "c"]
    assert failed.value.details["failed_rows"] == missed


def test_labels_go_by_their_ids() -> None:
    fleet = Fleet(a_map())
    labels = [{"prediction_id": f"{1:016x}{slot:04x}{1:012x}", "label": 1} for slot in range(40)]
    bad: list[Any] = [{"label": 1}, {"prediction_id": "x"}, {"prediction_id": "f" * 32}, 7]
    answer = drive(
        guide_with(fleet.shard_map), scatter_of(lambda c: c.feedback([*labels, *bad])), fleet
    )
    assert answer == {count: i * 44 for i, count in enumerate(COUNTS, 1)} | {"rejected": []}
    for name in "bc":
        mine = [label for i, label in enumerate(labels) if fleet.shard_map.owner(i).name == name]
        assert fleet.stored[name] == mine
    assert [label for label in fleet.stored["a"] if label in bad] == bad


@settings(max_examples=40)
@given(sale_rows, st.integers(0, 3), st.sets(st.sampled_from("abc"), max_size=1))
def test_rows_of_several_shards_bring_what_their_home_lacks(
    rows: list[dict[str, Any]], seed: int, down: set[str]
) -> None:
    fleet = Fleet(a_map(seed))
    fleet.down = down
    guide = guide_with(fleet.shard_map)
    read = scatter_of(lambda c: c.read_features("both", entities=rows))
    if down and not all(shards_of(fleet.shard_map, row) for row in rows or [NO_KEY]):
        return  # rows without keys go anywhere
    lost = [i for i, row in enumerate(rows) if down & set(shards_of(fleet.shard_map, row))]
    if rows and len(lost) == len(rows):
        with pytest.raises(UnavailableError):
            drive(guide, read, fleet)
        return
    found = drive(guide, read, fleet)
    assert [error["index"] for error in found.get("errors", [])] == lost
    seen = [None if i in lost else row["user"] for i, row in enumerate(rows)]
    assert found["columns"]["x"] == seen
    for name, request, body in fleet.calls:
        if not request.path.endswith("/read") or name in down:
            continue
        for row in body["entities"]:
            here = shards_of(fleet.shard_map, row)
            assert not here or name == here[0]
            for column, dtype in (("user", DType.STRING), ("shop", DType.INT64)):
                if row[column] is None or owner(fleet.shard_map, dtype, row[column]) == name:
                    continue
                assert cell_of(body["cells"], column, row[column]) == f"{column} {row[column]}"


NO_KEY = {"user": None, "shop": None}


def shards_of(shard_map: ShardMap, row: dict[str, Any]) -> list[str]:
    return [] if row["shop"] is None and row["user"] is None else owners_of(shard_map, row)


def cell_of(cells: dict[str, Any], column: str, key: Any) -> Any:
    (group,) = [g for g in cells["groups"] if g["columns"] == [column] and [key] in g["keys"]]
    return group["views"]["v"]["values"][group["keys"].index([key])]


def test_sequences_are_by_shard() -> None:
    fleet, rows = Fleet(a_map()), [{"user": f"u{i}"} for i in range(9)]
    guide = guide_with(fleet.shard_map)

    def read(sequence: Any) -> Scatter:
        return scatter_of(lambda c: c.read_features("person", entities=rows, min_sequence=sequence))

    drive(guide, read({"a": 5, "b": 7}), fleet)
    assert {name: body.get("min_sequence") for name, _, body in fleet.calls} == {
        "a": 5,
        "b": 7,
        "c": None,
    }
    with pytest.raises(ValidationError, match="by shard"):
        drive(guide, read(5), fleet)
    fleet.calls.clear()  # what it is of, a router knows; a daemon refuses it
    drive(Guide(["http://a:1"]), read({"a": 5}), fleet)
    assert fleet.calls[0][2]["min_sequence"] == {"a": 5}


def test_all_or_nothing_does_not_go_over_shards() -> None:
    fleet = Fleet(a_map())
    rows = [{"user": f"u{i}"} for i in range(9)]
    send = scatter_of(lambda c: c.events.send("sales", rows, all_or_nothing=True))
    with pytest.raises(ConflictError, match="concern several shards"):
        drive(guide_with(fleet.shard_map), send, fleet)
    assert not fleet.calls


class Color(StrEnum):
    RED = "u1"


class Number(IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    ("user", "shop"),
    [(np.str_("u1"), np.int64(1)), (Color.RED, Number.ONE), ("u1", np.int32(1))],
    ids=["numpy", "enum", "int32"],
)
def test_keys_of_other_types_go_where_their_values_do(user: Any, shop: Any) -> None:
    fleet = Fleet(a_map())
    pieces = split_events(
        [{"user": user, "shop": shop}], "rows", Topology(fleet.shard_map, ROUTING)
    )
    assert {p.shard.name for p in pieces} == set(
        owners_of(fleet.shard_map, {"user": "u1", "shop": 1})
    )


def test_whoever_answers_gives_the_map() -> None:
    fleet, guide = Fleet(a_map()), Guide(["http://a:1", "http://b:1"])
    fleet.down = {"a"}
    rows = [{"user": user} for user in (f"u{i}" for i in range(30))]
    found = drive(guide, scatter_of(lambda c: c.read_features("person", entities=rows)), fleet)
    assert found["errors"]
    assert guide.topology is not None


def test_daemons_without_a_map_are_no_cluster() -> None:
    guide = Guide(["http://a:1", "http://b:1"])
    fleet = Fleet(a_map())
    fleet.answer = lambda *_: {"map": None, **ROUTING.to_dict()}  # type: ignore[method-assign,assignment]
    with pytest.raises(ConfigurationError) as refused:
        drive(guide, scatter_of(lambda c: c.feedback([])), fleet)
    assert refused.value.code == "no_cluster"
    with pytest.raises(ConfigurationError, match="needs the URL"):
        Guide([])


def test_the_first_error_counts_where_nobody_answers() -> None:
    def outcomes(*_: Any) -> MlpdError:
        return OverloadedError("busy", code="queue_full")

    fleet = Fleet(a_map())
    fleet.answer = outcomes  # type: ignore[method-assign]
    with pytest.raises(OverloadedError, match="busy"):
        drive(Guide(["http://a:1", "http://b:1"]), scatter_of(lambda c: c.feedback([])), fleet)


def test_an_unknown_service_is_asked_of_a_daemon_after_a_look_at_the_routing() -> None:
    fleet = Fleet(a_map())
    fleet.features = lambda *_: ValidationError("no such service")  # type: ignore[method-assign]
    plain = fleet.answer

    def answer(url: str, request: Request) -> Any:
        if request.path.endswith("/read") and "x-mlpd-epoch" not in request.headers:
            return ValidationError("no such service")
        return plain(url, request)

    fleet.answer = answer  # type: ignore[method-assign]
    calls: Sequence[dict[str, Any]] = [{"user": "u1"}]
    with pytest.raises(ValidationError, match="no such"):
        drive(
            guide_with(fleet.shard_map),
            scatter_of(lambda c: c.read_features("new", entities=calls)),
            fleet,
        )
    assert [request.path for _, request, _ in fleet.calls] == [
        "/v1/cluster/map",
        "/v1/cluster/routing",
    ]
