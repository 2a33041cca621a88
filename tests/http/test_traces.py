"""Traces through a real daemon: header in and out, ids in logs, exemplars, slow requests."""

import asyncio
import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest

from mlpd.cli.log import JsonFormatter
from mlpd.client import AsyncClient, Client
from mlpd.core.trace import Span
from mlpd.http.slow import SlowLog

TRACE = "0af7651916cd43dd8448eb211c80319c"
SAMPLED = f"00-{TRACE}-b7ad6b7169203331-01"
UNSAMPLED = f"00-{'1' * 32}-b7ad6b7169203331-00"
ROW = {"user": "a", "age": 0.5}


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What the daemon writes to its log, as `mlpd serve` formats it."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("mlpd")
    logger.addHandler(handler)
    yield written
    logger.removeHandler(handler)


def logged(lines: io.StringIO, logger: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in lines.getvalue().splitlines()]
    return [line for line in found if line["logger"] == logger]


def test_an_answer_names_its_span_in_the_callers_trace(edge: Any) -> None:
    _, _, headers = edge.call("GET", "/v1/status", headers={"traceparent": SAMPLED})
    assert re.fullmatch(f"00-{TRACE}-[0-9a-f]{{16}}-01", headers["traceparent"])
    assert headers["traceparent"] != SAMPLED
    _, _, failed = edge.call("GET", "/v1/models/nothing", headers={"traceparent": UNSAMPLED})
    assert failed["traceparent"].startswith(f"00-{'1' * 32}-")
    for without in ({}, {"traceparent": "nonsense"}):
        assert "traceparent" not in edge.call("GET", "/v1/status", headers=without)[2]


def test_the_newest_traced_request_of_a_bucket_is_its_exemplar(edge: Any) -> None:
    parser = pytest.importorskip("prometheus_client.openmetrics.parser")
    body = {"rows": [ROW]}
    assert edge.call("POST", "/v1/predict/risk", body, {"traceparent": SAMPLED})[0] == 200
    assert edge.call("POST", "/v1/predict/risk", body, {"traceparent": UNSAMPLED})[0] == 200
    accept = {"Accept": "application/openmetrics-text"}
    text = edge.call("GET", "/metrics", headers=accept)[1].decode()
    families = {f.name: f for f in parser.text_string_to_metric_families(text)}
    buckets = families["mlpd_http_request_duration_seconds"].samples
    found = [s for s in buckets if s.exemplar and s.labels["route"] == "/v1/predict/{route}"]
    assert {s.exemplar.labels["trace_id"] for s in found} == {TRACE}
    for sample in found:
        assert sample.exemplar.value <= float(sample.labels["le"])
        assert float(sample.exemplar.timestamp) > 1_600_000_000
    assert TRACE not in edge.call("GET", "/metrics")[1].decode()


def test_a_slow_request_is_logged_with_its_steps_and_ids(edge: Any, lines: io.StringIO) -> None:
    slow = edge.slow
    slow.slow_s, before = 0.0, slow.slow_s
    try:
        for rows in ([ROW], [ROW] * 200):
            slow._next_s = 0.0
            edge.call("POST", "/v1/predict/risk", {"rows": rows}, {"traceparent": SAMPLED})
        slow._next_s = 0.0
        edge.call("POST", "/v1/features/read", {"service": "risk", "entities": [ROW]})
        slow._next_s = 0.0
        edge.call("POST", "/v1/events/clicks", {"rows": []})
        edge.call("POST", "/v1/fsck")  # an admin's may take its time
    finally:
        slow.slow_s = before
    one, many, read, sent = logged(lines, "mlpd.slow")
    assert one["route"] == "/v1/predict/{route}"
    assert (one["method"], one["status"], one["trace_id"]) == ("POST", 200, TRACE)
    assert list(one["steps_ms"]) == ["body", "features", "model", "record", "answer"]
    assert sum(one["steps_ms"].values()) <= one["took_ms"] + 0.01
    assert list(many["steps_ms"]) == ["body", "wait", "features", "model", "record", "answer"]
    assert "trace_id" not in read
    assert list(read["steps_ms"]) == ["body", "features", "answer"]
    assert list(sent["steps_ms"]) == ["body", "commit"]


def test_slow_seconds_do_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    slow = SlowLog(0.0)
    for _ in range(1000):
        slow.note("GET", "/", 200, 1.0, Span())
    slow._next_s = 0.0
    slow.note("GET", "/", 200, 1.0, Span())
    fields = [record.__dict__["fields"]["passed_over"] for record in caplog.records]
    assert fields[0] == 0
    assert sum(fields) + len(fields) == 1001


def test_the_ids_reach_threads_and_logs_of_what_a_request_calls(
    edge: Any, lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(edge.daemon, "status", broken)
    status, _, headers = edge.call("GET", "/v1/status", headers={"traceparent": SAMPLED})
    assert status == 500
    (line,) = logged(lines, "mlpd.http")
    assert (line["trace_id"], line["span_id"]) == tuple(headers["traceparent"].split("-")[1:3])
    assert "broken on purpose" in line["error"]


def test_clients_pass_the_callers_trace_on(edge: Any, lines: io.StringIO) -> None:
    traces = iter([SAMPLED, None, SAMPLED])
    slow = edge.slow
    slow.slow_s, before = 0.0, slow.slow_s
    try:
        with Client(edge.url, traceparent=lambda: next(traces)) as client:
            for _ in range(2):
                slow._next_s = 0.0
                client.status()

        async def call() -> None:
            async with AsyncClient(edge.url, traceparent=lambda: next(traces)) as client:
                slow._next_s = 0.0
                await client.status()

        asyncio.run(call())
    finally:
        slow.slow_s = before
    assert [line.get("trace_id") for line in logged(lines, "mlpd.slow")] == [TRACE, None, TRACE]
