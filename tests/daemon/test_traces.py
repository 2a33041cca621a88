"""Spans to a real receiver: OTLP's JSON, a collector that is down or hangs, bounds, settings."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from mlpd.core.config import MonitoringConfig
from mlpd.core.errors import ConfigurationError, MlpdError
from mlpd.core.trace import Span
from mlpd.daemon import traces as module
from mlpd.daemon.traces import Traces
from tests.alerts.receiver import Receiver, receiving

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as running:
        yield running


def traced(**settings: Any) -> Traces:
    return Traces(MonitoringConfig(**settings))


def request(flags: str = "01") -> Span:
    span = Span.begin(f"00-{TRACE}-{PARENT}-{flags}")
    span.method = "POST"
    span.end_step("features")
    span.end_step("model")
    return span


async def test_a_request_is_a_span_with_its_steps_below(receiver: Receiver) -> None:
    traces, span = traced(otlp_url=f"http://127.0.0.1:{receiver.port}/v1/traces"), request()
    before_ns = time.time_ns()
    traces.note(span, "/v1/predict/{route}", 503)
    await traces.export()
    (sent,) = receiver.received
    assert (sent.path, sent.headers["content-type"]) == ("/v1/traces", "application/json")
    (resource,) = sent.value["resourceSpans"]
    names = {a["key"]: a["value"]["stringValue"] for a in resource["resource"]["attributes"]}
    assert names["service.name"] == "mlpd"
    root, *steps = resource["scopeSpans"][0]["spans"]
    assert (root["traceId"], root["spanId"], root["parentSpanId"]) == (TRACE, span.span_id, PARENT)
    assert (root["name"], root["kind"], root["status"]) == (
        *("POST /v1/predict/{route}", 2),
        {"code": 2},
    )
    assert {"key": "http.response.status_code", "value": {"intValue": "503"}} in root["attributes"]
    assert [step["name"] for step in steps] == ["features", "model"]
    assert {step["parentSpanId"] for step in steps} == {root["spanId"]}
    assert len({step["spanId"] for step in [root, *steps]}) == 3
    times = [int(root["startTimeUnixNano"]), *(int(s["endTimeUnixNano"]) for s in steps)]
    assert times == sorted(times)
    assert abs(times[0] - before_ns) < 5e9
    assert traces.counts == {"exported": 1, "dropped": 0, "failed": 0}


async def test_requests_over_http_are_exported_if_sampled(served: Any, receiver: Receiver) -> None:
    import aiohttp  # noqa: PLC0415

    served.daemon.traces._target = module.parse_otlp(
        MonitoringConfig(otlp_url=f"http://127.0.0.1:{receiver.port}/v1/traces")
    )
    async with aiohttp.ClientSession(served.url) as session:
        for flags in ("00", "01"):
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-{flags}"}
            await (await session.get("/v1/status", headers=headers)).read()
        await (await session.get("/v1/status")).read()
    await served.daemon.traces.export()
    (sent,) = receiver.received
    (span,) = sent.value["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert (span["name"], span["traceId"]) == ("GET /v1/status", TRACE)


async def test_a_collector_that_is_down_or_hangs_costs_nothing_but_the_oldest(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUEUE_MAX", 3)
    traces = traced(otlp_url=f"http://127.0.0.1:{receiver.port}/v1/traces")
    traces._outbound._send_s = 0.2
    receiver.answer = None
    for _ in range(5):
        traces.note(request(), "/x", 200)
    assert traces.counts["dropped"] == 2
    with pytest.raises(MlpdError, match="did not answer"):
        await traces.export()
    receiver.answer = b"HTTP/1.1 503 Service Unavailable\r\n\r\n"
    with pytest.raises(MlpdError, match="answered 503"):
        await traces.export()
    receiver.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    await traces.export()
    assert traces.counts == {"exported": 3, "dropped": 2, "failed": 0}
    spans = receiver.received[-1].value["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert len(spans) == 9


async def test_spans_go_by_themselves_and_the_last_with_the_daemon(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.01)
    traces = traced(otlp_url=f"http://127.0.0.1:{receiver.port}/v1/traces")
    traces.start()
    traces.note(request(), "/x", 200)
    async with asyncio.timeout(20):
        while traces.counts["exported"] < 1:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.01)
    traces.note(request(), "/x", 200)
    await traces.stop()
    assert traces.counts["exported"] == 2


async def test_without_a_collector_nothing_is_kept() -> None:
    traces = traced()
    traces.start()
    traces.note(request(), "/x", 200)
    assert not traces._waiting
    await traces.stop()


@pytest.mark.parametrize(
    "settings",
    [
        {"otlp_url": "ftp://127.0.0.1/v1/traces"},
        {"otlp_url": "http://user:secret@127.0.0.1/v1/traces"},
        {"otlp_url": "http://"},
        {"otlp_url": "http://127.0.0.1:4318", "otlp_networks": ("everything",)},
    ],
)
def test_settings_that_can_not_be_meant_are_refused(settings: Any) -> None:
    with pytest.raises(ConfigurationError):
        traced(**settings)


async def test_a_private_address_that_is_not_allowed_is_not_reached(receiver: Receiver) -> None:
    traces = traced(otlp_url=f"http://127.0.0.1:{receiver.port}/v1/traces", otlp_networks=())
    traces.note(request(), "/x", 200)
    with pytest.raises(MlpdError, match="127.0.0.1"):
        await traces.export()
    assert receiver.connections == 0
