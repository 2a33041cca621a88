"""Features over HTTP: online reads, point-in-time joins, their formats and their errors."""

import io
import json
from typing import Any

import msgpack
import polars as pl
import pytest

from mlpd.client import Client
from mlpd.core.errors import ConflictError
from mlpd.http.frames import encode_frame, read_arrow_spine, read_spine
from mlpd.http.shapes import rows_of_columns
from mlpd.http.wire import ARROW, JSON, MSGPACK, PARQUET

START_US = 1_356_998_400_000_000
HOUR_US = 3_600_000_000


def test_a_read_brings_values_statuses_and_times(edge: Any) -> None:
    entities = [{"user": "a", "age": 1.5}, {"user": "nobody", "age": None}]
    body = {"service": "risk", "entities": entities}
    status, value, _ = edge.call("POST", "/v1/features/read", body)
    assert status == 200
    assert list(value["columns"]) == list(edge.daemon.read.closure("risk").service.vector)
    assert value["columns"]["user"] == ["a", "nobody"]
    assert value["columns"]["age"] == [1.5, None]
    assert value["statuses"]["profile.amount"] == [3, 2]  # stale, missing
    assert value["event_times"]["profile"][1] is None
    assert value["sequence"] == edge.daemon.status()["sequence"]


def test_rows_and_columns_many_and_few_read_alike(client: Client) -> None:
    users = ["a", "b", "c", "d"] * 25
    rows = [{"user": user, "age": 1.0} for user in users]
    by_rows = client.read_features("risk", entities=rows)
    by_columns = client.read_features("risk", entities={"user": users, "age": [1.0] * 100})
    few = client.read_features("risk", entities=rows[:4])
    assert by_rows["columns"] == by_columns["columns"]
    assert {name: values[:4] for name, values in by_rows["columns"].items()} == few["columns"]


def test_single_features_need_no_service(client: Client) -> None:
    found = client.read_features(
        features=["spend.count_1d", "request.age", "user"],
        request={"age": "int64"},
        entities=[{"user": "a", "age": 3}],
    )
    assert found["columns"] == {
        "spend.count_1d": [0],
        "request.age": [3],
        "user": ["a"],
        "age": [3],
    }


@pytest.mark.parametrize("frame", [False, True])
def test_stale_values_become_what_the_reader_says_online_and_offline(
    client: Client, frame: bool
) -> None:
    entities = [{"user": "a", "age": 1.0}]

    def both(on_stale: str | None) -> list[tuple[Any, int]]:
        read = client.read_features("risk", entities=entities, on_stale=on_stale)
        spine: Any = {"event_time": [read["t_us"]], "user": ["a"], "age": [1.0]}
        if frame:
            times = pl.col("event_time").cast(pl.Datetime("us", "UTC"))
            spine = pl.DataFrame(spine).with_columns(times)
        joined = client.history("risk", spine=spine, statuses=True, on_stale=on_stale)
        return [
            (read["columns"]["profile.amount"][0], read["statuses"]["profile.amount"][0]),
            (joined["profile.amount"][0], joined["profile.amount__status"][0]),
        ]

    assert both(None) == both("null") == [(None, 3)] * 2
    online, offline = both("value")
    assert online == offline
    assert isinstance(online[0], float)
    assert online[1] == 3
    read = client.read_features("risk", entities=entities)
    spine = {"event_time": [read["t_us"]], "user": ["a"], "age": [1.0]}
    for refused in (
        lambda: client.read_features("risk", entities=entities, on_stale="error"),
        lambda: client.history("risk", spine=spine, on_stale="error"),
    ):
        with pytest.raises(ConflictError, match="'profile.amount' of row 0") as caught:
            refused()
        assert caught.value.code == "stale_feature"


def test_a_transform_of_a_stale_value_is_an_error_too(fresh: Any) -> None:
    with Client(fresh.url) as client:
        document = client.definitions()["document"]
        half = {"source": "def half(x):\n    return x / 2", "inputs": [["x", "profile.amount"]]}
        client.apply({**document, "transforms": {"half": {**half, "output": "float64"}}})
        event = {"event_time": START_US, "known_at": START_US, "user": "a", "amount": 3.0}
        client.events.send("clicks", [event])
        asked: dict[str, Any] = {"features": ["half"], "entities": [{"user": "a"}]}
        assert client.read_features(**asked)["columns"] == {"half": [None]}
        kept = client.read_features(**asked, on_stale="value")
        assert kept["columns"] == {"half": [1.5]}
        with pytest.raises(ConflictError, match="profile.amount"):
            client.read_features(**asked, on_stale="error")


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"entities": [{"age": 1.0}]}, 400, "missing_entity_key"),
        ({"entities": [{"user": "a"}]}, 400, "missing_request_field"),
        ({"entities": [{"user": "a", "age": 1.0, "x": 1}]}, 400, "unknown_field"),
        ({"entities": [{"user": 5, "age": 1.0}]}, 400, "wrong_type"),
        ({"entities": {"user": ["a"], "age": []}}, 400, "unequal_columns"),
        ({"features": ["user"]}, 400, "invalid_request"),
        ({"at": "2013-01-01T00:00:00"}, 400, "naive_time"),
        ({"at": "2013-01-01T00:00:00Z"}, 409, "at_in_the_past"),
        ({"min_sequence": 10**9}, 503, "sequence_not_reached"),
        ({"on_stale": "maybe"}, 400, "unknown_choice"),
        ({"on_stale": "error"}, 409, "stale_feature"),
        ({"entities": [{"user": "a", "age": 1.0}] * 20_000}, 413, "body_too_large"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_reads(edge: Any, change: Any, status: int, code: str) -> None:
    body = {"service": "risk", "entities": [{"user": "a", "age": 1.0}], **change}
    found, value, headers = edge.call("POST", "/v1/features/read", body)
    assert (found, value["error"]["code"]) == (status, code)
    assert ("retry-after" in headers) == (status == 503)


def spine(n: int = 3) -> dict[str, list[Any]]:
    return {
        "event_time": [START_US + HOUR_US * (i + 1) for i in range(n)],
        "user": ["a", "b", "nobody"][:n],
        "age": [1.0, None, 2.0][:n],
    }


def join(edge: Any, accept: str, **options: Any) -> tuple[int, Any, dict[str, str]]:
    body = {"service": "risk", "entities": spine(), **options}
    return edge.call("POST", "/v1/features/history", body, {"Accept": accept})  # type: ignore[no-any-return]


def test_a_join_comes_as_asked(edge: Any) -> None:
    frame = pl.read_ipc_stream(join(edge, "*/*")[1])
    assert frame["user"].to_list() == ["a", "b", "nobody"]
    assert frame["spend.count_1d"].to_list()[2] == 0
    expected = {s.name: s.to_physical().to_list() for s in frame}
    assert join(edge, "application/json")[1] == {"columns": expected}
    status, value, _ = join(edge, "text/csv")
    assert (status, value["error"]["code"]) == (400, "not_acceptable")


def test_frames_are_the_same_in_every_format() -> None:
    frame = pl.DataFrame({"a": [1.5, None], "b": ["x", "y"]})
    frame = frame.with_columns(t=pl.Series([1, 2]).cast(pl.Datetime("us", "UTC")))
    buffer = io.BytesIO()
    frame.write_ipc_stream(buffer)
    stream = buffer.getvalue()
    assert pl.read_ipc_stream(encode_frame(stream, ARROW)).equals(frame)
    assert pl.read_parquet(io.BytesIO(encode_frame(stream, PARQUET))).equals(frame)
    columns = {"columns": {"a": [1.5, None], "b": ["x", "y"], "t": [1, 2]}}
    assert json.loads(encode_frame(stream, JSON)) == columns
    assert msgpack.unpackb(encode_frame(stream, MSGPACK)) == columns


def test_a_spine_is_the_same_in_every_form(edge: Any, client: Client) -> None:
    closure = edge.daemon.read.closure("risk")
    columns = spine()
    frame = pl.DataFrame(columns).with_columns(pl.col("event_time").cast(pl.Datetime("us", "UTC")))
    buffer = io.BytesIO()
    frame.write_ipc_stream(buffer)
    by_rows = read_spine(closure, rows_of_columns("spine", columns))
    by_arrow = read_arrow_spine(closure, buffer.getvalue())
    assert by_rows.keys() == by_arrow.keys()
    for name, column in by_rows.items():
        assert (column.dtype, column.to_list()) == (by_arrow[name].dtype, by_arrow[name].to_list())
    joined = client.history("risk", spine=frame)
    assert joined.select(frame.columns).equals(frame)


def test_a_join_of_now_is_what_a_read_says(client: Client) -> None:
    read = client.read_features("risk", entities=[{"user": "a", "age": 1.0}])
    one = {"event_time": [read["t_us"]], "user": ["a"], "age": [1.0]}
    joined = client.history("risk", spine=one, statuses=True)
    for name, values in read["columns"].items():
        assert joined[name].to_list() == values
        assert joined[f"{name}__status"].to_list() == read["statuses"][name]


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"entities": {"user": ["a"], "age": [1.0]}}, 400, "missing_timestamp"),
        ({"entities": {**spine(), "x": [1, 2, 3]}}, 400, "unknown_column"),
        ({"entities": {"event_time": [1], "age": [1.0]}}, 400, "missing_entity_key"),
        ({"entities": {**spine(), "event_time": [None] * 3}}, 400, "missing_timestamp"),
        ({"mode": "as_guessed"}, 400, "unknown_choice"),
        ({"on_stale": "as_is"}, 400, "unknown_choice"),
        ({"mode": "as_of_sequence"}, 400, "missing_sequence"),
        ({"service": "nothing"}, 404, "unknown_service"),
    ],
    ids=str,
)
def test_bad_joins(edge: Any, change: Any, status: int, code: str) -> None:
    body = {"service": "risk", "entities": spine(), **change}
    found, value, _ = edge.call("POST", "/v1/features/history", body)
    assert (found, value["error"]["code"]) == (status, code), value


def test_json_has_bare_nan_and_msgpack_keeps_it(fresh: Any) -> None:
    event = {"event_time": START_US, "user": "a", "amount": float("nan")}
    body = json.dumps({"rows": [event]}).encode()
    fresh.call("POST", "/v1/events/clicks", body)
    with Client(fresh.url) as client:
        found = client.read_features(
            features=["profile.amount"], entities=[{"user": "a"}], on_stale="null"
        )
    assert found["statuses"]["profile.amount"] == [3]
