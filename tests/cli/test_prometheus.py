"""Debian's Prometheus and promtool on a daemon's metrics, the shipped rules, the dashboard."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from mlpd.client import Client

CONF = Path(__file__).parents[2] / "conf"
RULES = CONF / "prometheus-rules.yml"
DASHBOARD = json.loads((CONF / "grafana-dashboard.json").read_text())
PANELS = DASHBOARD["panels"]
PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
DEADLINE_S = 40.0

with_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is not installed (Debian: prometheus): not tried"
)
with_prometheus = pytest.mark.skipif(
    PROMETHEUS is None, reason="prometheus is not installed (Debian has it): not tried"
)


def fetch(url: str, accept: str = "*/*") -> bytes:
    request = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        body: bytes = answer.read()
        return body


@with_promtool
def test_promtool_accepts_the_rules() -> None:
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, "check", "rules", str(RULES)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "SUCCESS" in done.stdout


@with_promtool
def test_promtool_has_nothing_to_say_about_the_metrics(url: str) -> None:
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, "check", "metrics"],
        input=fetch(f"{url}/metrics"),
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


class Prometheus:
    """A running server; `query` asks it."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/api/v1"

    def ask(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        return json.loads(fetch(f"{self.url}/{path}?{query}"))["data"]

    def query(self, expression: str) -> Any:
        return self.ask("query", query=expression)["result"]

    def until(self, expression: str) -> Any:
        """Return what the expression gives once that is something."""
        deadline_s = time.monotonic() + DEADLINE_S
        while True:
            try:
                if found := self.query(expression):
                    return found
            except (OSError, urllib.error.URLError):
                pass  # it is starting
            assert time.monotonic() < deadline_s, expression
            time.sleep(0.05)


@pytest.fixture(scope="module")
def prometheus(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus with the shipped rules, on the filled daemon."""
    directory = tmp_path_factory.mktemp("prometheus")
    (directory / "prometheus.yml").write_text(
        "global: {scrape_interval: 200ms, scrape_timeout: 200ms, evaluation_interval: 200ms}\n"
        f"rule_files: [{RULES}]\n"
        "scrape_configs:\n"
        "  - job_name: mlpd\n"
        f"    static_configs: [{{targets: ['{urllib.parse.urlsplit(url).netloc}']}}]\n"
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    assert PROMETHEUS is not None
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                PROMETHEUS,
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        yield Prometheus(port)
    finally:
        process.terminate()
        process.wait(20)


@with_prometheus
def test_prometheus_scrapes_every_series(prometheus: Prometheus, url: str) -> None:
    (up,) = prometheus.until('up{job="mlpd"} == 1')
    assert up["value"][1] == "1"
    (target,) = prometheus.ask("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    text = fetch(f"{url}/metrics").decode()
    exposed = {line.split("{")[0].split()[0] for line in text.splitlines() if line[:1] != "#"}
    stored = prometheus.ask("label/__name__/values")
    assert exposed <= set(stored)
    rows = sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith("mlpd_predictions_total{")
    )
    assert float(prometheus.query("sum(mlpd_predictions_total)")[0]["value"][1]) == rows > 0


@with_prometheus
def test_prometheus_evaluates_every_rule_and_panel(prometheus: Prometheus) -> None:
    prometheus.until('up{job="mlpd"} == 1')
    prometheus.until("count(mlpd_log_sequence)")
    groups = prometheus.ask("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == RULES.read_text().count("- alert: ")
    deadline_s = time.monotonic() + DEADLINE_S
    while any(rule["health"] == "unknown" for rule in rules):
        assert time.monotonic() < deadline_s
        rules = [r for group in prometheus.ask("rules")["groups"] for r in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}, rules
    for expression in expressions():
        asked = expression.replace("$instance", ".*").replace("$__rate_interval", "1m")
        prometheus.query(asked)  # a malformed one answers 400, which raises


def expressions() -> list[str]:
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_the_dashboard_shows_what_a_daemon_exposes(url: str) -> None:
    with Client(url) as client:
        exposed = set(re.findall(r"(?m)^# TYPE (\w+) ", client.metrics()))
    names = {name for e in expressions() for name in re.findall(r"mlpd_\w+", e)}
    assert len(names) > 10
    assert {name.removesuffix("_bucket") for name in names} <= exposed


def test_the_dashboard_is_laid_out_without_overlap() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        at = panel["gridPos"]
        assert 0 <= at["x"] <= 24 - at["w"]
    for one, two in combinations((panel["gridPos"] for panel in PANELS), 2):
        apart_x = one["x"] + one["w"] <= two["x"] or two["x"] + two["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= two["y"] or two["y"] + two["h"] <= one["y"]
        assert apart_x or apart_y


def test_the_dashboard_asks_for_its_source_and_the_daemon() -> None:
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    text = json.dumps(PANELS)
    for used in re.findall(r"\$\{?(\w+)", text):
        assert used in {*variables, "__rate_interval"}, used
