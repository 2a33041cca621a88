"""Spans as an OpenTelemetry collector takes them: OTLP/HTTP's JSON.

https://opentelemetry.io/docs/specs/otlp/#otlphttp: ids in hex, 64-bit numbers as text.
"""

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mlpd.core.trace import Span, new_span_id

_SERVER, _INTERNAL = 2, 1
_ERROR = 2
_FAULTY = 500


class Served(NamedTuple):
    """A traced request that was answered; `ended_s` by `time.perf_counter`."""

    span: Span
    path: str
    status: int
    ended_s: float


def encode_spans(served: Sequence[Served], resource: dict[str, str], version: str) -> bytes:
    """Return the body of one export: a span a request, one below it for each step.

    Times are those of the wall clock as it is now, less what the steady clock says has passed.
    """
    offset_s = time.time() - time.perf_counter()
    spans = [span for request in served for span in _spans(request, offset_s)]
    scope = {"scope": {"name": "mlpd", "version": version}, "spans": spans}
    found = {"resource": {"attributes": _attributes(resource)}, "scopeSpans": [scope]}
    return json.dumps({"resourceSpans": [found]}).encode()


def _spans(served: Served, offset_s: float) -> Iterator[dict[str, Any]]:
    span, status = served.span, served.status
    yield {
        **_span(span.trace_id, span.span_id, span.parent_id, f"{span.method} {served.path}"),
        "kind": _SERVER,
        **_times(span.started_s, served.ended_s, offset_s),
        "attributes": _attributes(
            {
                "http.request.method": span.method,
                "http.route": served.path,
                "http.response.status_code": status,
            }
        ),
        "status": {"code": _ERROR} if status >= _FAULTY else {},
    }
    began_s = span.started_s
    for name, ended_s in span.steps:
        yield {
            **_span(span.trace_id, new_span_id(), span.span_id, name),
            "kind": _INTERNAL,
            **_times(began_s, ended_s, offset_s),
        }
        began_s = ended_s


def _span(trace_id: str, span_id: str, parent_id: str, name: str) -> dict[str, Any]:
    return {"traceId": trace_id, "spanId": span_id, "parentSpanId": parent_id, "name": name}


def _times(began_s: float, ended_s: float, offset_s: float) -> dict[str, str]:
    return {
        "startTimeUnixNano": str(round((began_s + offset_s) * 1e9)),
        "endTimeUnixNano": str(round((ended_s + offset_s) * 1e9)),
    }


def _attributes(values: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "key": key,
            "value": {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value},
        }
        for key, value in values.items()
    ]
