"""Alerts over HTTP: what is listed, silences and their end, a message to try the sinks."""

from typing import Any

import pytest

from mlpd.client import Client
from mlpd.core.errors import MlpdError


def test_a_silence_is_made_listed_and_ended(fresh: Any) -> None:
    with Client(fresh.url, by="alice") as client:
        made = client.alerts.silence({"model": "risk", "feature": "a*"}, lasts="2h", why="moved")
        assert (made["by"], made["why"]) == ("alice", "moved")
        assert made["matchers"] == {"model": "risk", "feature": "a*"}
        assert made["starts"] < made["ends"]
        listed = client.alerts.list()
        assert listed["silences"] == [made]
        assert listed["alerts"] == []
        assert [(sink["name"], sink["state"]) for sink in listed["sinks"]] == [("log", "ok")]
        assert client.alerts.unsilence(made["id"]) == made
        assert client.alerts.list()["silences"] == []


def test_the_sinks_are_tried(fresh: Any) -> None:
    with Client(fresh.url) as client:
        assert client.alerts.test() == {"sinks": [{"sink": "log", "sent": True, "error": None}]}
        assert len(client.alerts.test(sink="log")["sinks"]) == 1


def test_alerts_are_in_the_metrics(fresh: Any) -> None:
    with Client(fresh.url) as client:
        metrics = client.metrics()
    assert "# TYPE mlpd_alerts gauge" in metrics
    assert 'mlpd_alert_messages_total{sink="log",result="sent"}' in metrics
    assert "mlpd_alert_look_failures_total 0.0" in metrics


@pytest.mark.parametrize(
    ("method", "path", "body", "code"),
    [
        ("POST", "/v1/alerts/silences", {}, "missing_field"),
        ("POST", "/v1/alerts/silences", {"matchers": [], "lasts": "1h"}, "wrong_type"),
        ("POST", "/v1/alerts/silences", {"matchers": {}, "lasts": "1h"}, "invalid_matcher"),
        ("POST", "/v1/alerts/silences", {"matchers": {"A": "b"}, "lasts": "1h"}, "invalid_matcher"),
        ("POST", "/v1/alerts/silences", {"matchers": {"a": "b"}, "lasts": "1"}, "invalid_duration"),
        ("POST", "/v1/alerts/silences", {"matchers": {"a": "b"}, "lasts": "91d"},
         "silence_too_long"),
        ("DELETE", "/v1/alerts/silences/..%2f", None, "unknown_silence"),
        ("DELETE", "/v1/alerts/silences/00", None, "unknown_silence"),
        ("POST", "/v1/alerts/test", {"sink": "pager"}, "unknown_sink"),
        ("POST", "/v1/alerts/test", {"url": "http://169.254.169.254/"}, "unknown_field"),
    ],
)  # fmt: skip
def test_nonsense_is_refused(edge: Any, method: str, path: str, body: Any, code: str) -> None:
    status, answer, _ = edge.call(method, path, body)
    assert 400 <= status < 500
    assert answer["error"]["code"] == code
    assert answer["error"]["hint"]


def test_the_client_turns_codes_back_into_errors(client: Client) -> None:
    with pytest.raises(MlpdError) as refused:
        client.alerts.unsilence("nothing")
    assert refused.value.code == "unknown_silence"
