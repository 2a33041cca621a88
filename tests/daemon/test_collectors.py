"""Metrics that are read at a scrape: names, values, both formats, after real work."""

from dataclasses import replace
from typing import Any

import pytest

from mlpd.core.config import AlertsConfig, MonitoringConfig
from mlpd.core.time import MINUTE_US
from mlpd.daemon import alerts as verb
from mlpd.daemon.app import Daemon
from mlpd.monitoring.metrics_lint import lint
from tests.conftest import SMALL, ShiftedClock
from tests.daemon.quick import serve_model
from tests.daemon.test_alerts import WINDOW_US, predict

TRITON = {
    "nv_inference_request_success": 3.0,
    "nv_inference_request_failure": 0.0,
    "nv_inference_count": 420.0,
}
WATCHED = replace(
    SMALL,
    monitoring=MonitoringConfig(triton_names=True),
    alerts=AlertsConfig(drift_window_us=5 * MINUTE_US),
)


async def scrape(daemon: Daemon, accept: str = "") -> str:
    body, _ = await daemon.monitor.expose_metrics(accept)
    return body.decode()


def parse(text: str, parser: str) -> dict[str, Any]:
    module = pytest.importorskip(parser)
    return {family.name: family for family in module.text_string_to_metric_families(text)}


async def test_inferences_drift_and_all_else_in_both_formats(
    open_daemon: Any,
    trainable: Any,
    click_columns: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verb, "LOOK_S", 3600.0)
    clock = ShiftedClock()
    async with open_daemon(config=WATCHED, clock=clock) as daemon:
        await serve_model(daemon, trainable, click_columns)
        clock.to_next(WINDOW_US)
        await daemon.alerts.look()
        for rows in (200, 120, 100):
            await predict(daemon, rows, 9.0)
        clock.to_next(WINDOW_US)
        await daemon.alerts.look()
        text = parse(await scrape(daemon), "prometheus_client.parser")
        om = "application/openmetrics-text"
        openmetrics = parse(await scrape(daemon, om), "prometheus_client.openmetrics.parser")
        complaints = lint(daemon.monitor.metrics)
    for name, expected in TRITON.items():
        (sample,) = text[name].samples
        assert (sample.labels, sample.value) == ({"model": "quick", "version": "1"}, expected)
        # The parser of text gives every counter `_total`; Prometheus leaves names as they are.
        assert openmetrics[name].samples == [sample._replace(name=name)]
        assert (text[name].type, openmetrics[name].type) == ("counter", "unknown")
    assert text["nv_inference_exec_count"].samples[0].value >= 3
    spent_us = text["nv_inference_request_duration_us"].samples[0].value
    assert 0 < text["nv_inference_compute_infer_duration_us"].samples[0].value <= spent_us
    drift = {s.labels["feature"]: s.value for s in text["mlpd_feature_drift_psi"].samples}
    assert drift["amount"] > 1.0
    assert {s.labels["version"] for s in text["mlpd_feature_drift_psi"].samples} == {"1"}
    assert complaints == []


async def test_triton_names_are_shown_when_asked_for_alone(daemon: Daemon) -> None:
    assert "nv_inference" not in await scrape(daemon)
