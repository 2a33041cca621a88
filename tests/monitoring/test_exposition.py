"""Both text formats, read back by prometheus_client's parsers where it is installed."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.monitoring.exposition import CONTENT_TYPE, choose_format, encode, format_number
from mlpd.monitoring.instruments import Descriptor
from mlpd.monitoring.metrics import Collected, Registry

NASTY = 'back\\slash "quoted"\nnew line'


def build() -> Registry:
    registry = Registry()
    registry.info("mlpd_build_info", "Build.", version="0.1.0")
    events = registry.counter("mlpd_events_total", 'Say "hi"\\\n.', labels=("source",))
    events.labels(NASTY).inc(3)
    latency = registry.histogram(
        "mlpd_latency_seconds", "Time.", labels=("route",), unit="seconds", bounds=(0.1, 1)
    ).labels("r")
    for value in (0.05, 0.1, 0.5, 7.0):
        latency.observe(value)
    registry.histogram("mlpd_size_bytes", "Size.", unit="bytes", bounds=(8,)).labels().observe(3)
    registry.gauge("mlpd_silent", "Declared, without a child.", labels=("route",))
    drift = Descriptor("mlpd_drift_psi", "gauge", "Drift.", ("feature",))
    registry.add_collector("drift", lambda: [Collected(drift, [(("a",), math.inf)])])
    up = Descriptor("mlpd_up", "gauge", "Up.")
    registry.add_collector("up", lambda: [Collected(up, [((), 1.0)])])
    return registry


def test_text_format_line_by_line() -> None:
    assert encode(build(), "text").decode().splitlines() == [
        "# HELP mlpd_build_info Build.",
        "# TYPE mlpd_build_info gauge",
        'mlpd_build_info{version="0.1.0"} 1.0',
        '# HELP mlpd_events_total Say "hi"\\\\\\n.',
        "# TYPE mlpd_events_total counter",
        'mlpd_events_total{source="back\\\\slash \\"quoted\\"\\nnew line"} 3.0',
        "# HELP mlpd_latency_seconds Time.",
        "# TYPE mlpd_latency_seconds histogram",
        'mlpd_latency_seconds_bucket{route="r",le="0.1"} 2',
        'mlpd_latency_seconds_bucket{route="r",le="1.0"} 3',
        'mlpd_latency_seconds_bucket{route="r",le="+Inf"} 4',
        'mlpd_latency_seconds_sum{route="r"} 7.65',
        'mlpd_latency_seconds_count{route="r"} 4',
        "# HELP mlpd_size_bytes Size.",
        "# TYPE mlpd_size_bytes histogram",
        'mlpd_size_bytes_bucket{le="8.0"} 1',
        'mlpd_size_bytes_bucket{le="+Inf"} 1',
        "mlpd_size_bytes_sum 3.0",
        "mlpd_size_bytes_count 1",
        "# HELP mlpd_drift_psi Drift.",
        "# TYPE mlpd_drift_psi gauge",
        'mlpd_drift_psi{feature="a"} +Inf',
        "# HELP mlpd_up Up.",
        "# TYPE mlpd_up gauge",
        "mlpd_up 1.0",
    ]


def test_openmetrics_names_families_without_suffix_and_ends_with_eof() -> None:
    lines = encode(build(), "openmetrics").decode().splitlines()
    assert "# TYPE mlpd_events counter" in lines
    assert '# HELP mlpd_events Say \\"hi\\"\\\\\\n.' in lines
    assert "# TYPE mlpd_build info" in lines
    assert "# UNIT mlpd_latency_seconds seconds" in lines
    assert lines[-1] == "# EOF"
    assert lines.count("# EOF") == 1


@given(st.text(), st.text(), st.floats(0, 1e300))
def test_prometheus_parsers_read_back_every_label_help_and_value(
    label: str, help_text: str, value: float
) -> None:
    openmetrics = pytest.importorskip("prometheus_client.openmetrics.parser")
    text = pytest.importorskip("prometheus_client.parser")
    clean = label.encode("utf-8", "replace").decode()
    registry = Registry()
    registry.counter("mlpd_hits_total", help_text.encode("utf-8", "replace").decode(),
                     labels=("a", "b")).labels(clean, "x").inc(value)  # fmt: skip
    for fmt, parse in (
        ("openmetrics", openmetrics.text_string_to_metric_families),
        ("text", text.text_string_to_metric_families),
    ):
        families = list(parse(encode(registry, fmt).decode()))
        samples = [sample for family in families for sample in family.samples]
        assert [(s.name, s.labels, s.value) for s in samples] == [
            ("mlpd_hits_total", {"a": clean, "b": "x"}, value)
        ]


def test_prometheus_parsers_read_types_units_and_buckets() -> None:
    openmetrics = pytest.importorskip("prometheus_client.openmetrics.parser")
    text = pytest.importorskip("prometheus_client.parser")
    registry = build()
    parsed = {
        family.name: family
        for family in openmetrics.text_string_to_metric_families(
            encode(registry, "openmetrics").decode()
        )
    }
    assert {name: family.type for name, family in parsed.items()} == {
        "mlpd_build": "info",
        "mlpd_events": "counter",
        "mlpd_latency_seconds": "histogram",
        "mlpd_size_bytes": "histogram",
        "mlpd_drift_psi": "gauge",
        "mlpd_up": "gauge",
    }
    assert parsed["mlpd_latency_seconds"].unit == "seconds"
    assert parsed["mlpd_events"].samples[0].labels == {"source": NASTY}
    families = list(text.text_string_to_metric_families(encode(registry, "text").decode()))
    assert len(families) == 6


@given(st.floats())
def test_numbers_read_back_as_the_same_double(value: float) -> None:
    back = float(format_number(value))
    assert back == value or (math.isnan(back) and math.isnan(value))


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, "text"),
        ("", "text"),
        ("*/*", "text"),
        ("text/html", "text"),
        ("application/openmetrics-text", "openmetrics"),
        ("application/openmetrics-text; version=1.0.0; charset=utf-8", "openmetrics"),
        ("application/openmetrics-text; version=2.0.0", "text"),
        ("application/openmetrics-text;q=0", "text"),
        ("application/openmetrics-text;q=abc", "text"),
        ("application/openmetrics-text;q=0.3,text/plain;q=0.5", "text"),
        ("text/plain;version=0.0.4;q=0.5,*/*;q=0.1", "text"),
        # What Prometheus 2.5x sends.
        (
            (
                "application/openmetrics-text;version=1.0.0;q=0.5,"
                "application/openmetrics-text;version=0.0.1;q=0.4,"
                "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
            ),
            "openmetrics",
        ),
        # What Prometheus 3 sends when protobuf is on.
        (
            (
                "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;"
                "encoding=delimited;q=0.6,application/openmetrics-text;version=1.0.0;"
                "escaping=allow-utf-8;q=0.5,text/plain;version=1.0.0;q=0.3,*/*;q=0.1"
            ),
            "openmetrics",
        ),
    ],
)
def test_format_follows_the_accept_header(accept: str | None, expected: str) -> None:
    chosen = choose_format(accept)
    assert chosen == expected
    assert CONTENT_TYPE[chosen].endswith("charset=utf-8")
