"""Events over HTTP: every form stores the same, wrong rows are named, retries store once."""

import gzip
import io
import json
from datetime import UTC, datetime
from typing import Any

import msgpack
import polars as pl
import pytest

from mlpd.client import Client
from mlpd.storage.log import RecordKind, read_records

START_US = 1_356_998_400_000_000
EVENT = {"event_time": "2013-01-01T00:00:00Z", "known_at": START_US, "user": "a", "amount": 2.5}
JSON, MSGPACK = "application/json", "application/msgpack"
ARROW = "application/vnd.apache.arrow.stream"


def send(
    edge: Any, body: Any, kind: str = JSON, path: str = "/v1/events/clicks", **headers: str
) -> Any:
    data = body
    if not isinstance(body, bytes):
        data = msgpack.packb(body) if kind == MSGPACK else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return edge.call("POST", path, data, {"Content-Type": kind, **named})[:2]


def arrow(frame: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.write_ipc_stream(buffer)
    return buffer.getvalue()


def stored(edge: Any) -> list[dict[str, Any]]:
    """What the log holds of clicks, without arrival times."""
    rows: list[dict[str, Any]] = []
    with edge.daemon.environment.snapshot() as snapshot:
        for record in read_records(snapshot, 1, kinds=frozenset({RecordKind.EVENTS})):
            lists = {name: column.to_list() for name, column in record.columns().items()}
            lists["event_us"] = record.event_us.tolist()
            rows += [
                dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)
            ]
    return rows


def test_rows_columns_msgpack_and_arrow_store_the_same(fresh: Any) -> None:
    frame = pl.DataFrame(
        {
            "event_time": [datetime(2013, 1, 1, tzinfo=UTC)],
            "known_at": [START_US],
            "user": pl.Series(["a"], dtype=pl.Categorical),
            "amount": pl.Series([2.5], dtype=pl.Float32),
        }
    )
    for body, kind in (
        ({"rows": [EVENT]}, JSON),
        ({"rows": [EVENT]}, MSGPACK),
        ({"columns": {name: [value] for name, value in EVENT.items()}}, JSON),
        (arrow(frame), ARROW),
    ):
        status, value = send(fresh, body, kind)
        assert (status, value["accepted"], value["rejected"]) == (200, 1, [])
    first, *others = stored(fresh)
    assert others == [first] * 3
    assert (first["user"], first["amount"], first["event_us"]) == ("a", 2.5, START_US)


def test_wrong_rows_are_named_and_the_others_stored(fresh: Any) -> None:
    rows = [
        EVENT,
        {**EVENT, "amount": "much"},
        {**EVENT, "event_time": "2013-01-01T00:00:00"},
        {**EVENT, "event_time": "2999-01-01T00:00:00Z"},
        {"user": "a"},
        EVENT,
    ]
    status, value = send(fresh, {"rows": rows})
    assert (status, value["accepted"]) == (200, 2)
    codes = [(row["index"], row["code"]) for row in value["rejected"]]
    assert codes == [
        *((1, "wrong_type"), (2, "naive_time")),
        *((3, "future_event"), (4, "missing_timestamp")),
    ]
    assert all(row["hint"] and row["source"] == "clicks" for row in value["rejected"])


def test_rows_ahead_of_their_known_at_are_clamped_and_counted(fresh: Any) -> None:
    ahead = {**EVENT, "event_time": START_US + 60_000_000}
    status, value = send(fresh, {"rows": [EVENT, ahead, ahead, {**ahead, "amount": "much"}]})
    assert (status, value["accepted"], value["clamped"]) == (200, 3, 2)
    assert [row["event_us"] for row in stored(fresh)] == [START_US] * 3
    originals = [row["__original_event_time"] for row in stored(fresh)]
    assert originals == [START_US, *[START_US + 60_000_000] * 2]
    metrics = fresh.call("GET", "/metrics")[1].decode()
    assert 'mlpd_ingest_rows_total{source="clicks",result="clamped"} 2' in metrics


def test_clamped_rows_count_for_their_own_source(fresh: Any) -> None:
    with Client(fresh.url) as client:
        document = client.definitions()["document"]
        other = {"timestamp": "at", "schema": {"user": "string"}}
        client.apply({**document, "sources": {**document["sources"], "visits": other}})
        now = fresh.daemon.clock()
    ahead = [{"at": now + 120_000_000, "user": "a"}]
    body = {"sources": {"clicks": {"rows": [EVENT]}, "visits": {"rows": ahead}}}
    value = send(fresh, body, path="/v1/events", Idempotency_Key="one")[1]
    assert (value["accepted"], value["clamped"]) == (2, 1)
    again = send(fresh, body, path="/v1/events", Idempotency_Key="one")[1]
    assert again == {**value, "replayed": True}
    assert fresh.daemon.ingest.clamped_by_source == {"clicks": 0, "visits": 1}


def test_all_or_nothing_stores_nothing(fresh: Any) -> None:
    rows = [EVENT, {**EVENT, "amount": "much"}]
    for body, path in (
        ({"rows": rows, "all_or_nothing": True}, "/v1/events/clicks"),
        ({"rows": rows}, "/v1/events/clicks?all_or_nothing=true"),
        ({"sources": {"clicks": {"rows": rows}}, "all_or_nothing": True}, "/v1/events"),
    ):
        status, value = send(fresh, body, path=path)
        assert (status, value["error"]["code"]) == (400, "wrong_type")
        assert value["error"]["details"]["index"] == 1
    assert stored(fresh) == []


def test_a_repeated_idempotency_key_stores_once(fresh: Any) -> None:
    first = send(fresh, {"rows": [EVENT]}, Idempotency_Key="batch-1")[1]
    again = send(fresh, {"rows": [EVENT]}, Idempotency_Key="batch-1")[1]
    assert not first["replayed"]
    assert again == {**first, "replayed": True}
    assert len(stored(fresh)) == 1
    status, value = send(fresh, {"rows": [EVENT]}, Idempotency_Key="x" * 256)
    assert (status, value["error"]["code"]) == (400, "invalid_idempotency_key")


def test_several_sources_are_stored_together_or_not_at_all(fresh: Any) -> None:
    good = {"clicks": {"columns": {"event_time": [START_US, START_US], "user": ["a", "b"]}}}
    assert send(fresh, {"sources": good}, path="/v1/events")[1]["accepted"] == 2
    status, value = send(fresh, {"sources": {**good, "nothing": {"rows": []}}}, path="/v1/events")
    assert (status, value["error"]["code"]) == (404, "unknown_source")
    assert len(stored(fresh)) == 2


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"rows": [{**EVENT, "colour": "red"}]}, "unknown_column"),
        ({"columns": {"event_time": [1], "colour": ["red"]}}, "unknown_column"),
        ({"columns": {"event_time": [1, 2], "user": ["a"]}}, "unequal_columns"),
        ({"columns": {"event_time": 5}}, "wrong_type"),
        ({"columns": {"user": ["a"]}}, "missing_timestamp"),
        ({"rows": [EVENT], "columns": {}}, "invalid_request"),
        ({}, "invalid_request"),
        ({"rows": {"event_time": 1}}, "wrong_type"),
        ({"rows": [[1]]}, "wrong_type"),
    ],
    ids=str,
)
def test_a_body_that_makes_no_sense_is_refused_whole(edge: Any, body: Any, code: str) -> None:
    status, value = send(edge, body)
    assert (status, value["error"]["code"]) == (400, code)


def test_rows_with_ever_new_names_are_refused_before_they_become_columns(edge: Any) -> None:
    # 10,000 rows with 10,000 names would make a hundred million values.
    rows = [{f"c{i}": i} for i in range(10_000)]
    status, value = send(edge, {"rows": rows})
    assert (status, value["error"]["code"]) == (400, "unknown_column")


def test_arrow_is_checked_as_json_is(fresh: Any) -> None:
    frame = pl.DataFrame(
        {
            "event_time": [datetime(2013, 1, 1), None],
            "known_at": [START_US, START_US],
            "amount": ["1.5", None],
        }
    )
    value = send(fresh, arrow(frame), ARROW)[1]
    assert value["accepted"] == 0
    assert [row["code"] for row in value["rejected"]] == ["naive_time", "missing_timestamp"]
    status, value = send(fresh, arrow(pl.DataFrame({"event_time": [1], "x": [1]})), ARROW)
    assert (status, value["error"]["code"]) == (400, "unknown_column")


@pytest.mark.parametrize("cut", [0, 7, 60, 200])
def test_a_damaged_arrow_stream_is_a_malformed_body(edge: Any, cut: int) -> None:
    body = arrow(pl.DataFrame({"event_time": [START_US], "user": ["a"]}))
    damaged = body[:cut] + b"\xff" * 40 + body[cut + 40 :]
    status, value = send(edge, damaged, ARROW)
    assert status == 400, value


def test_every_type_of_column_comes_over_arrow(fresh: Any) -> None:
    frame = pl.DataFrame(
        {
            "event_time": pl.Series([START_US]).cast(pl.Datetime("ms", "Europe/Berlin")),
            "known_at": pl.Series([START_US]).cast(pl.Datetime("ns", "UTC")),
            "user": ["ä"],
            "amount": pl.Series([1.25], dtype=pl.Float32),
            "bought": pl.Series([7], dtype=pl.Int8),
            "age": pl.Series([None], dtype=pl.Float64),
            "shown_at": ["2013-01-01T01:00:00+01:00"],
        }
    )
    frame = frame.with_columns(
        event_time=pl.from_epoch(pl.lit(START_US), "us")
        .dt.replace_time_zone("UTC")
        .dt.cast_time_unit("ms"),
        known_at=pl.from_epoch(pl.lit(START_US), "us")
        .dt.replace_time_zone("UTC")
        .dt.cast_time_unit("ns"),
    )
    assert send(fresh, arrow(frame), ARROW)[1]["rejected"] == []
    (row,) = stored(fresh)
    assert row == {
        "user": "ä",
        "amount": 1.25,
        "bought": 7,
        "age": None,
        "shown_at": START_US,
        "event_us": START_US,
    }


def test_a_large_batch_is_stored_whole(fresh: Any) -> None:
    with Client(fresh.url) as client:
        n = 50_000
        done = client.events.send("clicks", {"event_time": [START_US] * n, "user": ["a"] * n})
    assert (done["accepted"], done["rejected"]) == (n, [])


def test_a_gzipped_body_is_inflated_up_to_the_limit(edge: Any, fresh: Any) -> None:
    body = gzip.compress(json.dumps({"rows": [EVENT]}).encode())
    assert send(fresh, body, Content_Encoding="gzip")[1]["accepted"] == 1
    bomb = gzip.compress(b" " * 4_000_000)
    status, value = send(edge, bomb, Content_Encoding="gzip")
    assert (status, value["error"]["code"]) == (413, "body_too_large")
