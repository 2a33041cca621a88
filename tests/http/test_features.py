"""Features over HTTP: online reads, point-in-time joins, their formats and their errors."""

import asyncio
import http.client
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import polars as pl
import pytest

from mlpd.client import AsyncClient, Client
from mlpd.core.errors import ConflictError, StorageFullError, TooLargeError, ValidationError
from mlpd.core.media import ARROW, ARROW_FILE, FRAME_FORMATS, JSON, MSGPACK, PARQUET
from mlpd.daemon import history, spines
from mlpd.daemon.frame_files import write_frames
from mlpd.daemon.history_child import read_spine
from mlpd.daemon.spines import read_spine_file
from mlpd.http import features

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


def test_frames_are_the_same_in_every_format(tmp_path: Path) -> None:
    frame = pl.DataFrame({"a": [1.5, None, 2.5], "b": ["x", "y", None], "c": [b"\x00", b"", None]})
    frame = frame.with_columns(t=pl.Series([1, 2, 3]).cast(pl.Datetime("us", "UTC")))
    path, found = tmp_path / "answer", {}
    for kind in (ARROW, ARROW_FILE, PARQUET, JSON, MSGPACK):
        assert write_frames(iter([frame[:2], frame[2:]]), kind, path) == 3
        found[kind] = path.read_bytes()
        assert [entry.name for entry in tmp_path.iterdir()] == ["answer"]
    assert pl.read_ipc_stream(found[ARROW]).equals(frame)
    assert pl.read_ipc(found[ARROW_FILE]).equals(frame)
    assert pl.read_parquet(found[PARQUET]).equals(frame)
    plain = {"a": [1.5, None, 2.5], "b": ["x", "y", None], "t": [1, 2, 3]}
    assert json.loads(found[JSON]) == {"columns": {**plain, "c": ["0x00", "0x", None]}}
    assert msgpack.unpackb(found[MSGPACK]) == {"columns": {**plain, "c": [b"\x00", b"", None]}}
    for kind in (ARROW, ARROW_FILE, PARQUET, JSON, MSGPACK):
        assert write_frames(iter([frame[:0]]), kind, path) == 0
    assert msgpack.unpackb(path.read_bytes()) == {"columns": {name: [] for name in "abct"}}


@pytest.mark.parametrize("kind", [ARROW, ARROW_FILE, PARQUET, JSON])
def test_an_error_while_frames_are_made_comes_out_as_it_is(kind: str, tmp_path: Path) -> None:
    def frames() -> Iterator[pl.DataFrame]:
        yield pl.DataFrame({"a": [1]})
        raise ConflictError("too old", code="stale_feature")

    with pytest.raises(ConflictError, match="too old"):
        write_frames(frames(), kind, tmp_path / "answer")


@pytest.mark.parametrize("kind", [ARROW, ARROW_FILE, PARQUET, MSGPACK])
def test_a_full_disk_is_told_as_one(kind: str, tmp_path: Path) -> None:
    (tmp_path / "answer").symlink_to("/dev/full")
    (tmp_path / "answer.spooled").symlink_to("/dev/full")
    frame = pl.DataFrame({"a": range(1000)})
    with pytest.raises(StorageFullError):
        write_frames(iter([frame] * 100), kind, tmp_path / "answer")


def file_of(frame: pl.DataFrame, kind: str) -> bytes:
    buffer = io.BytesIO()
    write = {ARROW: frame.write_ipc_stream, ARROW_FILE: frame.write_ipc}
    write.get(kind, frame.write_parquet)(buffer)  # type: ignore[operator]
    return buffer.getvalue()


def timed_spine() -> pl.DataFrame:
    times = pl.col("event_time").cast(pl.Datetime("us", "UTC"))
    return pl.DataFrame(spine()).with_columns(times)


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [
        (ARROW, "arrow"),
        (ARROW_FILE, "arrow_file"),
        (PARQUET, "parquet"),
        (PARQUET, "json"),
        (ARROW, "msgpack"),
    ],
)
def test_a_spine_is_the_same_in_every_form(edge: Any, sent: str, wanted: str) -> None:
    by_rows = join(edge, JSON)[1]["columns"]
    headers = {"Content-Type": sent}
    path = f"/v1/features/history?service=risk&format={wanted}"
    status, body, got = edge.call("POST", path, file_of(timed_spine(), sent), headers)
    assert (status, got["x-mlpd-rows"]) == (200, "3"), body
    assert got["content-type"] == FRAME_FORMATS[wanted]
    if wanted in ("json", "msgpack"):
        value = msgpack.unpackb(body) if wanted == "msgpack" else body
        assert value["columns"] == by_rows
        return
    read = {"arrow": pl.read_ipc_stream, "arrow_file": pl.read_ipc, "parquet": pl.read_parquet}
    frame = read[wanted](body)  # type: ignore[operator]
    assert frame.columns == list(by_rows)
    assert {s.name: s.to_physical().to_list() for s in frame} == by_rows


def test_types_that_mean_the_same_are_taken(edge: Any) -> None:
    frame = timed_spine().with_columns(
        pl.col("event_time").dt.cast_time_unit("ms").dt.convert_time_zone("Europe/Berlin"),
        pl.col("user").cast(pl.Categorical),
        pl.col("age").cast(pl.Float32),
    )
    headers = {"Content-Type": PARQUET}
    path = "/v1/features/history?service=risk&format=json"
    status, body, _ = edge.call("POST", path, file_of(frame, PARQUET), headers)
    assert (status, body) == (200, join(edge, JSON)[1])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda f: f.drop("event_time"), "missing_timestamp"),
        (lambda f: f.drop("user"), "missing_entity_key"),
        (lambda f: f.drop("age"), "missing_request_field"),
        (lambda f: f.with_columns(x=1), "unknown_column"),
        (lambda f: f.with_columns(pl.col("event_time").dt.replace_time_zone(None)), "naive_time"),
        (lambda f: f.with_columns(pl.lit(None).alias("event_time")), "missing_timestamp"),
        (lambda f: f.with_columns(user=5), "wrong_type"),
        (lambda f: f.with_columns(age=pl.lit("old")), "wrong_type"),
        (lambda f: f.with_columns(user=pl.lit([["a"]])), "wrong_type"),
        (lambda f: f.with_columns(sequence=1), "missing_sequence"),
    ],
)
@pytest.mark.parametrize("kind", [ARROW, ARROW_FILE, PARQUET])
def test_bad_files_of_a_spine(edge: Any, tmp_path: Path, kind: str, change: Any, code: str) -> None:
    closure, path = edge.daemon.read.closure("risk"), tmp_path / "spine"
    path.write_bytes(file_of(change(timed_spine()), kind))
    request = {"spine_file": str(path), "spine_format": kind, "mode": "as_known"}
    with pytest.raises(ValidationError) as caught:
        read_spine(request, closure)
    assert caught.value.code == code


@pytest.mark.parametrize("kind", [ARROW, ARROW_FILE, PARQUET])
@pytest.mark.parametrize("body", [b"", b"x", b"PAR1" + bytes(100), b"\xff" * 64])
def test_what_is_no_frame_is_a_malformed_body(
    edge: Any, tmp_path: Path, kind: str, body: bytes
) -> None:
    path = tmp_path / "spine"
    path.write_bytes(body)
    with pytest.raises(ValidationError) as caught:
        read_spine_file(path, kind, edge.daemon.read.closure("risk"))
    assert caught.value.code == "malformed_body"
    assert caught.value.hint


def test_errors_of_the_child_are_answered_as_they_are(edge: Any) -> None:
    path, headers = "/v1/features/history?service=risk", {"Content-Type": PARQUET}
    for body, code in (
        (b"PAR1", "malformed_body"),
        (file_of(timed_spine().with_columns(user=5), PARQUET), "wrong_type"),
    ):
        status, value, _ = edge.call("POST", path, body, headers)
        assert (status, value["error"]["code"]) == (400, code), value
    assert not list(edge.daemon.paths.joins.iterdir())


def test_too_many_rows_are_told_before_they_are_read(
    edge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spines, "ROWS_MAX", 2)
    path = tmp_path / "spine"
    for kind in (ARROW, ARROW_FILE, PARQUET):
        path.write_bytes(file_of(timed_spine(), kind))
        with pytest.raises(TooLargeError) as caught:
            read_spine_file(path, kind, edge.daemon.read.closure("risk"))
        assert caught.value.code == "spine_too_large"
    status, value, _ = join(edge, JSON)
    assert (status, value["error"]["code"]) == (413, "spine_too_large")


def test_more_joins_than_there_is_room_for_are_refused(
    edge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "OPEN_MAX", 0)
    status, value, headers = join(edge, JSON)
    assert (status, value["error"]["code"]) == (503, "too_many_joins")
    assert int(headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("query", "kind", "status", "code"),
    [
        ("service=risk&format=csv", PARQUET, 400, "unknown_choice"),
        ("service=risk&closed=both", PARQUET, 400, "unknown_choice"),
        ("service=nothing", PARQUET, 404, "unknown_service"),
        ("", PARQUET, 400, "invalid_request"),
        ("service=risk&rows=1", PARQUET, 400, "unknown_parameter"),
        ("service=risk", "text/csv", 400, "unsupported_media_type"),
    ],
)
def test_bad_questions_of_a_file(edge: Any, query: str, kind: str, status: int, code: str) -> None:
    body = file_of(timed_spine(), PARQUET)
    path = f"/v1/features/history?{query}"
    found, value, _ = edge.call("POST", path, body, {"Content-Type": kind})
    assert (found, value["error"]["code"]) == (status, code), value


def test_a_spine_over_the_limit_is_refused_by_its_length_and_by_its_bytes(
    edge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "SPINE_BYTES_MAX", 1000)
    path, headers = "/v1/features/history?service=risk", {"Content-Type": PARQUET}
    for body in (bytes(2000), iter([bytes(600), bytes(600)])):
        connection = http.client.HTTPConnection(edge.host, timeout=30)
        try:
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            value = json.loads(response.read())
        finally:
            connection.close()
        assert (response.status, value["error"]["code"]) == (413, "body_too_large")
    assert not list(edge.daemon.paths.joins.iterdir())


def test_clients_join_file_to_file(edge: Any, client: Client, tmp_path: Path) -> None:
    path, out = tmp_path / "spine.parquet", tmp_path / "out.parquet"
    frame = timed_spine()
    frame.write_parquet(path)
    expected = client.history("risk", spine=frame)
    assert expected.select(frame.columns).equals(frame)
    assert client.history("risk", spine=path).equals(expected)
    found = client.save_history(out, "risk", spine=path)
    assert found == {"path": str(out), "rows": 3, "size_bytes": out.stat().st_size}
    assert pl.read_parquet(out).equals(expected)

    async def save() -> Any:
        async with AsyncClient(edge.url) as other:
            return await other.save_history(out.with_suffix(".arrow"), "risk", spine=path)

    assert asyncio.run(save())["rows"] == 3
    assert pl.read_ipc(out.with_suffix(".arrow")).equals(expected)
    assert not list(edge.daemon.paths.joins.iterdir())


def test_who_closes_with_the_last_byte_has_not_gone_away(edge: Any) -> None:
    def counted() -> dict[str, float]:
        text = edge.call("GET", "/metrics")[1].decode()
        lines = [line for line in text.splitlines() if "requests_total{" in line]
        mine = [line for line in lines if 'route="/v1/features/history"' in line]
        return {line.split('code="')[1][:3]: float(line.split()[-1]) for line in mine}

    before = counted()
    for _ in range(3):
        assert join(edge, PARQUET)[0] == 200
    stop_s = time.monotonic() + 20.0
    while (now := counted()).get("200", 0.0) < before.get("200", 0.0) + 3:
        assert time.monotonic() < stop_s, (before, now)
        time.sleep(0.01)
    assert now.get("499") == before.get("499")


def test_an_open_end_hides_events_of_a_rows_own_time(client: Client) -> None:
    fresh = {"event_time": START_US - HOUR_US, "known_at": START_US - HOUR_US, "user": "own"}
    client.events.send("clicks", [{**fresh, "amount": 5.0}])
    one = {"event_time": [fresh["event_time"]], "user": ["own"]}
    for closed, amount in ((None, 5.0), ("right", 5.0), ("left", None)):
        frame = client.history(features=["profile.amount"], spine=one, closed=closed)
        assert frame["profile.amount"].to_list() == [amount]


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
