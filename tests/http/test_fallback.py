"""What answers when an arm's model can't: the version before, then the default, and why."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mlpd.client import Client
from mlpd.core.errors import InternalError
from tests.http import edge as edges

ROUTE = {
    "service": "risk",
    "arms": [{"name": "a", "model": "risk@champion"}],
    "fallback_models": ["risk@champion~1"],
    "fallback": 0.25,
}
BODY = {
    "rows": [{"user": "abc"[i % 3], "age": i / 7} for i in range(4)],
    "at": "2999-01-01T00:00:00Z",
    "include": ["vector", "statuses"],
}


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A daemon whose champion moved from version 1 to version 2."""
    with edges.serve(tmp_path_factory.mktemp("fallback") / "data") as running:
        edges.fill(running)
        edges.train_another(running)
        with Client(running.url) as client:
            client.models.move_alias("risk", "champion", 2)
            client.routes.put("safe", ROUTE)
            client.routes.put("bare", {"service": "risk", "arms": ROUTE["arms"]})
            client.routes.put("first", {"service": "risk", "arms": [{"model": "risk@1"}]})
        yield running


def break_version(edge: Any, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    def fail(_: Any) -> Any:
        raise InternalError(f"version {version} is out of order")

    session = edge.daemon.models.find("risk", version).session
    monkeypatch.setattr(session, "run", fail)


def predict(edge: Any, route: str, body: Any = BODY) -> list[dict[str, Any]]:
    status, answer, _ = edge.call("POST", f"/v1/predict/{route}", body)
    assert status == 200, answer
    rows: list[dict[str, Any]] = answer["predictions"]
    return rows


def test_a_route_says_what_would_answer(edge: Any) -> None:
    _, shown, _ = edge.call("GET", "/v1/routes/safe")
    assert shown["fallback_models"] == ["risk@champion~1"]
    assert (shown["serving"], shown["serving_fallbacks"]) == ({"a": "risk@2"}, ["risk@1"])


def test_nothing_falls_back_while_the_arm_answers(edge: Any) -> None:
    counters = edge.daemon.predict.fell_back, edge.daemon.predict.defaulted
    before = [counter["safe"] for counter in counters]
    rows = predict(edge, "safe")
    assert [row["version"] for row in rows] == [2] * 4
    assert not any("fallback" in row for row in rows)
    assert [counter["safe"] for counter in counters] == before


@pytest.mark.parametrize("times", [1, 50])
def test_the_version_before_answers_and_is_logged(
    edge: Any, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    body = {**BODY, "rows": BODY["rows"] * times}
    expected = predict(edge, "first", body)
    break_version(edge, monkeypatch, 2)
    logged, before = edge.daemon.predictions.logged, edge.daemon.predict.fell_back["safe"]
    rows = predict(edge, "safe", body)
    assert edge.daemon.predictions.logged == logged + 4 * times
    assert edge.daemon.predict.fell_back["safe"] == before + 4 * times
    for row, alone in zip(rows, expected, strict=True):
        assert (row["arm"], row["version"]) == ("a", 1)
        assert row["fallback"] == "version 2 is out of order"
        assert (row["score"], row["statuses"]) == (alone["score"], alone["statuses"])
        assert np.array_equal(row["vector"], alone["vector"], equal_nan=True)
    labels = [{"prediction_id": row["prediction_id"], "label": 1} for row in rows]
    with Client(edge.url) as client:
        assert client.feedback(labels)["joined"] == 4 * times


def test_the_default_answers_when_no_version_can(
    edge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in (1, 2):
        break_version(edge, monkeypatch, version)
    logged = edge.daemon.predictions.logged
    for row in predict(edge, "safe"):
        assert row["prediction_id"] is row["vector"] is None
        assert (row["score"], row["fallback"]) == (0.25, "version 2 is out of order")
        assert row["statuses"]
    assert edge.daemon.predictions.logged == logged
    text = edge.call("GET", "/metrics")[1].decode()
    assert 'mlpd_fallback_rows_total{route="safe",result="default"} 4' in text


def test_without_a_fallback_it_is_an_error(edge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    break_version(edge, monkeypatch, 2)
    status, value, _ = edge.call("POST", "/v1/predict/bare", BODY)
    assert (status, value["error"]["code"]) == (500, "internal")


def test_only_the_rows_of_the_failed_arm_fall_back(
    edge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = [{"name": "a", "model": "risk@2"}, {"name": "b", "model": "risk@1"}]
    with Client(edge.url) as client:
        client.routes.put("two", {"service": "risk", "arms": arms, "fallback": 0.5})
    rows = [{"user": f"u{i}", "age": 0.5} for i in range(60)]
    break_version(edge, monkeypatch, 2)
    found = predict(edge, "two", {"rows": rows})
    served = [row["version"] for row in found if "fallback" not in row]
    assert 0 < len(served) < 60
    assert set(served) == {1}
    assert {row["score"] for row in found if "fallback" in row} == {0.5}


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"fallback_models": "risk@1"}, 400, "wrong_type"),
        ({"fallback_models": ["risk"]}, 400, "invalid_model_ref"),
        ({"fallback_models": ["risk@1~1"]}, 400, "invalid_model_ref"),
        ({"fallback_models": ["risk@champion~2"]}, 400, "invalid_name"),
        ({"fallback_models": ["risk@1", "risk@1"]}, 400, "invalid_route"),
        ({"fallback_models": ["risk@challenger"]}, 404, "unknown_alias"),
        ({"fallback_models": ["risk@challenger~1"]}, 404, "unknown_alias"),
        ({"fallback_models": ["risk@9"]}, 404, "unknown_version"),
        ({"fallback_models": ["nothing@champion~1"]}, 404, "unknown_model"),
        ({"arms": [{"model": "risk@challenger~1"}]}, 404, "unknown_alias"),
    ],
    ids=str,
)
def test_a_wrong_fallback_is_refused(
    edge: Any, changes: dict[str, Any], status: int, code: str
) -> None:
    found, value, _ = edge.call("PUT", "/v1/routes/wrong", {**ROUTE, **changes})
    assert (found, value["error"]["code"]) == (status, code)
    assert edge.call("GET", "/v1/routes/wrong")[0] == 404
