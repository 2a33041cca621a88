"""The alerts of conf/prometheus-rules.yml against the metrics of a daemon that has served."""

import re
from pathlib import Path

import pytest

from mlpd.client import Client
from mlpd.monitoring.metrics import Registry

RULES = (Path(__file__).parents[2] / "conf" / "prometheus-rules.yml").read_text()
SELECTORS = sorted(set(re.findall(r"(mlpd_\w+)(\{[^\[]*?\})?(?=[\[\s])", RULES)))
OWN = Registry()._families
"""The registry's metrics about itself."""


@pytest.fixture(scope="module")
def exposed(url: str) -> str:
    with Client(url) as client:
        return client.metrics()


def test_there_are_alerts_on_metrics() -> None:
    assert len(SELECTORS) >= 10


@pytest.mark.parametrize(("name", "labels"), SELECTORS)
def test_an_alert_selects_what_the_daemon_exposes(exposed: str, name: str, labels: str) -> None:
    if name in OWN:  # they show up with their first trouble
        return
    assert re.search(rf"(?m)^# TYPE {name.removesuffix('_bucket')} ", exposed)
    if '="' in labels and '=~"' not in labels:
        label = labels.strip("{}") if "{route}" not in labels else 'route="/v1/predict/{route}"'
        assert re.search(rf"(?m)^{name}{{[^}}]*{re.escape(label)}", exposed), label


def test_every_alert_says_what_it_means_and_how_urgent_it_is() -> None:
    alerts = RULES.split("- alert: ")[1:]
    assert len(alerts) == len({alert.split()[0] for alert in alerts})
    for alert in alerts:
        assert re.search(r"severity: (page|ticket)", alert)
        assert "summary: " in alert
