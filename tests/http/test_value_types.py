"""Lists and vectors over HTTP: in by every form, out by every form, exact."""

import asyncio
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import polars as pl
import pytest

from mlpd import Entity, FeatureService, FeatureView, Source
from mlpd.client import Client
from mlpd.core.definitions import build_document
from mlpd.core.errors import MlpdError
from mlpd.storage.tables import Table
from tests.http.edge import Edge, serve

START_US = 1_356_998_400_000_000
ARROW = "application/vnd.apache.arrow.stream"
JSON, MSGPACK = "application/json", "application/msgpack"
BIG = 2**53 + 1
SCHEMA = {
    "user": "string",
    "flags": "list[bool]",
    "ids": "list[int64]",
    "small": "list[float32]",
    "reals": "list[float64]",
    "tags": "list[string]",
    "blobs": "list[bytes]",
    "seen": "list[timestamp]",
    "point": "vector[float32, 3]",
    "wide": "vector[float64, 2]",
}
FULL: dict[str, Any] = {
    "flags": [True, False],
    "ids": [BIG, -(2**63)],
    "small": [0.1, math.inf],
    "reals": [0.1, -0.0],
    "tags": ["a\x00b", "", "\u00e9"],
    "blobs": [b"\x00", b""],
    "seen": [START_US, -1],
    "point": [0.1, math.nan, -0.0],
    "wide": [1e300, 5e-324],
}
EMPTY = {name: None if dtype.startswith("vector") else [] for name, dtype in SCHEMA.items()}
NULL = dict.fromkeys(FULL)


def document(**changed: str | None) -> dict[str, Any]:
    schema = {name: t for name, t in {**SCHEMA, **changed}.items() if t is not None}
    user = Entity("user")
    seen = Source("seen", timestamp="at", schema=schema)
    latest = FeatureView("latest", user, seen, [name for name in schema if name != "user"])
    return build_document([user, seen, latest, FeatureService("all", [latest])])


def rows() -> list[dict[str, Any]]:
    values = {"full": FULL, "empty": {**EMPTY}, "null": NULL}
    return [
        {**row, "at": START_US + i, "known_at": START_US + i, "user": user}
        for i, (user, row) in enumerate(values.items())
    ]


def wanted(row: dict[str, Any]) -> dict[str, Any]:
    """What reads give for a row: float32 elements have gone through float32."""
    found = {name: row.get(name) for name in FULL}
    for name in ("small", "point"):
        if found[name] is not None:
            found[name] = np.array(found[name], np.float32).tolist()
    return found


def text(values: Any) -> str:
    """Values that are equal only if all bits are; every NaN is one."""
    return repr(values)


def read(client: Client, users: list[str] | None = None) -> list[dict[str, Any]]:
    users = users or ["full", "empty", "null"]
    columns = client.read_features("all", entities={"user": users})["columns"]
    return [{n.partition(".")[2]: v[i] for n, v in columns.items()} for i in range(len(users))]


def join(client: Client, **options: Any) -> list[dict[str, Any]]:
    spine = {"event_time": [START_US + 10] * 3, "user": ["full", "empty", "null"]}
    frame = client.history("all", spine=spine, **options)
    physical = {s.name.partition(".")[2] or s.name: s.to_physical().to_list() for s in frame}
    return [{name: physical[name][i] for name in FULL} for i in range(3)]


def check(client: Client) -> None:
    for row, online, offline in zip(rows(), read(client), join(client), strict=True):
        assert text(online) == text(wanted(row))
        assert text(offline) == text(wanted(row))


@pytest.fixture
def lists(tmp_path: Path) -> Iterator[Any]:
    with serve(tmp_path / "data") as running:
        with Client(running.url) as client:
            client.apply(document())
        yield running


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """One for tests that change nothing."""
    with serve(tmp_path_factory.mktemp("shared") / "data") as running:
        with Client(running.url) as client:
            client.apply(document())
        yield running


def frame(kind: type[pl.List] | type[pl.Array] = pl.Array) -> pl.DataFrame:
    inner = {
        "bool": pl.Boolean,
        "int64": pl.Int64,
        "float32": pl.Float32,
        "float64": pl.Float64,
        "string": pl.String,
        "bytes": pl.Binary,
        "timestamp": pl.Datetime("us", "UTC"),
    }
    schema: dict[str, Any] = {}
    for name, dtype in SCHEMA.items():
        if dtype.startswith("list["):
            schema[name] = pl.List(inner[dtype[5:-1]])
    for name, element, n in (("point", pl.Float32, 3), ("wide", pl.Float64, 2)):
        schema[name] = pl.List(element) if kind is pl.List else pl.Array(element, n)
    columns = [
        pl.Series(name, [row.get(name) for row in rows()], dtype=schema.get(name))
        for name in ("at", "known_at", *SCHEMA)
    ]
    return pl.DataFrame(columns)


@pytest.mark.parametrize("form", ["rows", "columns", "numpy", "frame", "arrow_lists"])
def test_lists_and_vectors_come_and_go_exactly(lists: Any, form: str) -> None:
    data: Any = rows()
    if form == "columns":
        data = {name: [row.get(name) for row in data] for name in data[0]}
    elif form == "numpy":
        data[0]["point"], data[0]["ids"] = np.array(FULL["point"], "f4"), np.array(FULL["ids"])
    elif form == "frame":
        data = frame()
    elif form == "arrow_lists":
        data = frame(pl.List)
    with Client(lists.url) as client:
        done = client.events.send("seen", data)
        assert (done["accepted"], done["rejected"]) == (3, [])
        check(client)


def test_json_brings_lists_as_msgpack_does(lists: Any) -> None:
    body = {"rows": [{**row, "blobs": row["blobs"] and ["0x00", "0x"]} for row in rows()]}
    status, done, _ = lists.call("POST", "/v1/events/seen", body)
    assert (status, done["rejected"]) == (200, [])
    asked = {"service": "all", "entities": {"user": ["full", "empty", "null"]}}
    _, by_json, _ = lists.call("POST", "/v1/features/read", asked)
    packed = lists.call("POST", "/v1/features/read", asked, {"Accept": MSGPACK})[1]
    unpacked = msgpack.unpackb(packed)["columns"]
    assert unpacked["latest.blobs"] == [FULL["blobs"], [], None]
    assert by_json["columns"]["latest.blobs"] == [["0x00", "0x"], [], None]
    assert text({**by_json["columns"], "latest.blobs": unpacked["latest.blobs"]}) == text(unpacked)
    assert text(by_json["columns"]["latest.point"][0]) == text(wanted(FULL)["point"])
    assert by_json["statuses"]["latest.ids"] == [0, 0, 1]
    spine = {"event_time": [START_US + 10] * 3, **asked["entities"]}
    joined = lists.call(
        *("POST", "/v1/features/history", {"service": "all", "entities": spine}),
        {"Accept": JSON},
    )[1]
    for name, values in by_json["columns"].items():
        assert text(joined["columns"][name]) == text(values)


def test_parquet_and_arrow_answers_have_list_types(lists: Any) -> None:
    with Client(lists.url) as client:
        client.events.send("seen", frame())
    spine = {"event_time": [START_US + 10], "user": ["full"]}
    asked = {"service": "all", "entities": spine}
    for accept, load in (
        (ARROW, pl.read_ipc_stream),
        ("application/vnd.apache.parquet", pl.read_parquet),
    ):
        answer = lists.call("POST", "/v1/features/history", asked, {"Accept": accept})[1]
        schema = load(io.BytesIO(answer)).schema
        assert schema["latest.point"] == pl.Array(pl.Float32, 3)
        assert schema["latest.seen"] == pl.List(pl.Datetime("us", "UTC"))


def test_only_the_wrong_row_is_refused(lists: Any) -> None:
    wrong = [
        ({"point": [1.0, 2.0]}, "wrong_length"),
        ({"point": [1.0, 2.0, "x"]}, "wrong_type"),
        ({"point": 1.0}, "wrong_type"),
        ({"small": [0.5, 1e300]}, "wrong_type"),
        ({"ids": [1, None]}, "null_element"),
        ({"ids": [1, 2.0]}, "wrong_type"),
        ({"ids": [2**63]}, "wrong_type"),
        ({"seen": [0, "2013-01-01T00:00:00"]}, "naive_time"),
        ({"tags": ["a", b"b"]}, "wrong_type"),
        ({"tags": [["a"]]}, "wrong_type"),
        ({"reals": [0.5] * 8_193}, "list_too_long"),
        ({"tags": ["a" * 70_000]}, "list_too_long"),
    ]
    sent = []
    for i, (change, _) in enumerate(wrong):
        row = {"at": START_US + i, "known_at": START_US + i}
        sent += [{**FULL, **row, "user": f"good{i}"}, {**FULL, **row, "user": "bad", **change}]
    with Client(lists.url) as client:
        done = client.events.send("seen", sent)
        assert done["accepted"] == len(wrong)
        assert [r["index"] for r in done["rejected"]] == list(range(1, 2 * len(wrong), 2))
        assert [r["code"] for r in done["rejected"]] == [code for _, code in wrong]
        assert all(r["hint"] for r in done["rejected"])
        assert text(read(client, ["good3"])) == text([wanted(FULL)])
        assert read(client, ["bad"]) == [NULL]


def test_wrong_lists_in_arrow_are_refused_row_by_row(lists: Any) -> None:
    sent = pl.DataFrame(
        {
            "at": [START_US + i for i in range(5)],
            "known_at": [START_US] * 5,
            "user": list("abcde"),
            "point": [[1.0, 2.0, 3.0], [1.0], None, [1.0, None, 3.0], [0.5, 1e300, 0.0]],
            "ids": pl.Series([[1], [], None, [2], [3]], dtype=pl.List(pl.Int8)),
        }
    )
    with Client(lists.url) as client:
        done = client.events.send("seen", sent)
        codes = [(r["index"], r["code"]) for r in done["rejected"]]
        assert codes == [(1, "wrong_length"), (3, "null_element"), (4, "wrong_type")]
        found = read(client, ["a", "c"])
        assert [(row["point"], row["ids"]) for row in found] == [
            ([1.0, 2.0, 3.0], [1]),
            (None, None),
        ]


def test_the_longest_lists_are_kept(lists: Any) -> None:
    row = {"reals": [1 / (i + 1) for i in range(8_192)], "tags": ["\u00e9"] * 20_000}
    with Client(lists.url) as client:
        sent = {**row, "at": START_US, "known_at": START_US, "user": "long"}
        assert client.events.send("seen", [sent])["rejected"] == []
        (found,) = read(client, ["long"])
        assert {name: found[name] for name in row} == row


@pytest.mark.parametrize(
    ("kind", "name", "body", "reason"),
    [
        ("entities", "odd", {"keys": {"ids": "list[int64]"}}, "at least one column of string"),
        (
            "views",
            "sums",
            {
                "kind": "window",
                "entity": "user",
                "source": "seen",
                "windows": ["1h"],
                "aggregates": [{"name": "s", "function": "sum", "input": "reals"}],
            },
            "column 'reals' is list[float64]",
        ),
        (
            "transforms",
            "first",
            {
                "source": "def first(x):\n    return 1",
                "inputs": [["x", "latest.ids"]],
                "output": "int64",
            },
            "'first' reads 'latest.ids', which is list[int64]",
        ),
        (
            "transforms",
            "many",
            {
                "source": "def many(x):\n    return x",
                "inputs": [["x", "user"]],
                "output": "list[int64]",
            },
            "the output is list[int64]",
        ),
        (
            "jobs",
            "train",
            {"service": "all", "label": "1 > 0", "spine": {"source": "seen", "time": "at"}},
            None,
        ),
    ],
)
def test_what_takes_no_list_says_so_at_apply(
    shared: Any, kind: str, name: str, body: dict[str, Any], reason: str | None
) -> None:
    wanted = document(when="timestamp", label="int64")
    if kind == "jobs":
        body = {**body, "label": "label", "spine": {"source": "seen", "time": "when"}}
        reason = "feature 'latest.flags' is list[bool], which no trainer takes"
    wanted[kind] = {**wanted.get(kind, {}), name: body}
    with Client(shared.url) as client, pytest.raises(MlpdError) as refused:
        client.apply(wanted)
    assert reason is not None
    assert reason in refused.value.message
    assert refused.value.hint


def test_a_filter_may_ask_whether_a_list_is_there(lists: Any) -> None:
    wanted = document()
    wanted["views"]["counts"] = {
        "kind": "window",
        "entity": "user",
        "source": "seen",
        "windows": ["1h"],
        "aggregates": [{"name": "n", "function": "count", "filter": "not is_null(ids)"}],
    }
    with Client(lists.url) as client:
        client.apply(wanted)
        now = {"at": client.read_features("all", entities={"user": []})["t_us"], "user": "u"}
        client.events.send("seen", [{**now, "ids": []}, {**now, "ids": None}, {**now, "ids": [1]}])
        found = client.read_features(features=["counts.n_1h"], entities=[{"user": "u"}])
        assert found["columns"] == {"counts.n_1h": [2]}


def test_list_features_come_and_go_with_definitions(lists: Any) -> None:
    with Client(lists.url) as client:
        client.apply(document(ids=None, point=None))
        client.events.send(
            "seen", [{k: v for k, v in row.items() if k not in ("ids", "point")} for row in rows()]
        )
        client.apply(document(more="vector[float64, 2]"))
        (found,) = read(client, ["full"])
        assert (found["ids"], found["point"], found["more"]) == (None, None, None)
        assert found["tags"] == FULL["tags"]
        client.events.send("seen", [{**row, "more": [1.0, 2.0]} for row in rows()[:1]])
        assert read(client, ["full"])[0]["more"] == [1.0, 2.0]
        with pytest.raises(MlpdError) as refused:
            client.apply(document(more="vector[float64, 3]"))
        assert refused.value.code == "column_type"
        client.apply(document())
        assert text(read(client, ["full"])) == text([wanted(FULL)])


def test_defaults_and_stale_lists(lists: Any) -> None:
    wanted = document()
    wanted["views"]["latest"] |= {"ttl": "1h", "defaults": {"ids": [7], "point": [0, 0, 0.5]}}
    with Client(lists.url) as client:
        client.apply(wanted)
        client.events.send("seen", rows())
        for users in (["full"], ["never"]):
            (found,) = read(client, users)
            assert (found["ids"], found["point"], found["tags"]) == ([7], [0.0, 0.0, 0.5], None)
        assert join(client)[2]["ids"] == [7]
        for bad in ({"point": [1.0]}, {"ids": [None]}, {"reals": [math.inf]}):
            wanted["views"]["latest"]["defaults"] = bad
            with pytest.raises(MlpdError):
                client.apply(wanted)


def test_lists_survive_restart_compaction_and_both_at_once(tmp_path: Path) -> None:
    with serve(tmp_path / "data") as edge, Client(edge.url) as client:
        client.apply(document())
        client.events.send("seen", rows()[:2])
    with serve(tmp_path / "data") as edge, Client(edge.url) as client:
        compact(edge)
        client.events.send("seen", rows()[2:])
        check(client)
        asked = {"event_time": [START_US + 10] * 2, "user": ["full"] * 2, "sequence": [1, 2]}
        before, after = client.history("all", spine=asked, mode="as_of_sequence")["latest.ids"]
        assert (before, after.to_list()) == (None, FULL["ids"])
        compact(edge)
        check(client)
        assert client.fsck()["problems"] == []


def compact(edge: Edge) -> None:
    assert asyncio.run_coroutine_threadsafe(edge.daemon.compactor.run(), edge.loop).result(50)


def test_request_fields_may_be_lists_in_reads_and_joins(lists: Any) -> None:
    request = {"near": "vector[float32, 2]", "seen": "list[timestamp]", "tags": "list[string]"}
    given = {"near": [[0.1, math.nan], None], "seen": [[START_US], []], "tags": [["\x00"], None]}
    wanted = {**given, "near": [np.array(given["near"][0], np.float32).tolist(), None]}
    asked: dict[str, Any] = {"features": ["latest.ids"], "request": request}
    spine = {"event_time": [START_US + 10] * 2, "user": ["full", "x"], **given}
    with Client(lists.url) as client:
        client.events.send("seen", rows())
        entities = {"user": ["full", "x"], **given}
        columns = client.read_features(entities=entities, **asked)["columns"]
        assert text({name: columns[name] for name in given}) == text(wanted)
        joined = client.history(spine=spine, **asked)
        found = {name: joined[name].to_physical().to_list() for name in given}
        assert text(found) == text(wanted)
        assert joined["latest.ids"].to_list() == [FULL["ids"], None]
        with pytest.raises(MlpdError) as refused:
            client.read_features(entities={**entities, "near": [[1.0], None]}, **asked)
        assert refused.value.code == "wrong_length"


def test_arrow_spines_bring_lists(lists: Any) -> None:
    definitions = document()
    definitions["services"]["all"]["request"] = {"near": "vector[float64, 2]"}
    with Client(lists.url) as client:
        client.apply(definitions)
        times = pl.Series([START_US]).cast(pl.Datetime("us", "UTC"))
        for kind in (pl.List(pl.Float32), pl.Array(pl.Float64, 2)):
            near = pl.Series([[0.5, -0.0]], dtype=kind)
            spine = pl.DataFrame({"event_time": times, "user": ["x"], "near": near})
            assert client.history("all", spine=spine)["near"].dtype == pl.Array(pl.Float64, 2)
            assert text(client.history("all", spine=spine)["near"].to_list()) == "[[0.5, -0.0]]"
        wrong = spine.with_columns(near=pl.Series([[0.5]], dtype=pl.List(pl.Float64)))
        with pytest.raises(MlpdError) as refused:
            client.history("all", spine=wrong)
        assert refused.value.code == "wrong_length"


ODD: dict[str, tuple[str, pl.Series, Any]] = {
    "nothing": ("tags", pl.Series([[]], dtype=pl.List(pl.Null)), []),
    "categories": ("tags", pl.Series([["a"]], dtype=pl.List(pl.Categorical)), ["a"]),
    "unsigned": ("ids", pl.Series([[1]], dtype=pl.List(pl.UInt64)), [1]),
    "ns": ("seen", pl.Series([[1_000]]).cast(pl.List(pl.Datetime("ns", "UTC"))), [1]),
    "numbers": ("tags", pl.Series([[1]]), "wrong_type"),
    "texts": ("ids", pl.Series([["1"]]), "wrong_type"),
    "short": ("point", pl.Series([[1.0]]), "wrong_length"),
    "nested": ("point", pl.Series([[[1.0], [2.0], [3.0]]]), "wrong_type"),
    "structs": ("ids", pl.Series([[{"a": 1}]]), "wrong_type"),
    "plain": ("ids", pl.Series([1]), "wrong_type"),
}


def test_arrow_lists_of_odd_types_are_taken_where_they_mean_the_same(lists: Any) -> None:
    times = {"at": [START_US], "known_at": [START_US]}
    with Client(lists.url) as client:
        for user, (column, series, wanted) in ODD.items():
            frame = pl.DataFrame({**times, "user": [user], column: series})
            refused = [r["code"] for r in client.events.send("seen", frame)["rejected"]]
            found = refused[0] if refused else read(client, [user])[0][column]
            assert found == wanted, user


def test_damage_to_a_list_is_found_by_fsck(tmp_path: Path) -> None:
    with serve(tmp_path / "data") as edge, Client(edge.url) as client:
        client.apply(document())
        client.events.send("seen", rows())
        assert client.fsck()["problems"] == []
        view_id = edge.daemon.state.catalog.views["latest"].view_id

        whole, damaged = (flag + b"\x00" + FULL_IDS for flag in (b"\x01", b"\x02"))

        def damage(txn: Any) -> None:
            for key, value in list(txn.scan(Table.ONLINE)):
                if key[2:6] == view_id.to_bytes(4, "big") and whole in value:
                    txn.put(Table.ONLINE, key, value.replace(whole, damaged))

        asyncio.run_coroutine_threadsafe(edge.daemon.writer.write(damage), edge.loop).result(30)
        (problem,) = client.fsck()["problems"]
        assert "'flags'" in str(problem)


FULL_IDS = BIG.to_bytes(8, "little") + (-(2**63)).to_bytes(8, "little", signed=True)
