"""Contributions over HTTP: they sum to the raw score, whose link is the score that was served."""

import math
import threading
from typing import Any

import pytest

from mlpd.client import Client
from mlpd.core.errors import InternalError, NotFoundError
from mlpd.daemon.explain import EXPLAIN_ROWS_MAX, WAITING_MAX

ROWS = [{"user": "abc"[i % 3] if i else None, "age": i / 7 if i % 2 else None} for i in range(6)]


def sigmoid(raw: float) -> float:
    return 1.0 / (1.0 + math.exp(-raw))


def test_contributions_sum_to_the_raw_score(edge: Any, client: Client) -> None:
    names = edge.daemon.read.closure("risk").service.vector
    logged = edge.daemon.predictions.logged
    rows = client.predict("risk", ROWS, explain=True)["predictions"]
    assert edge.daemon.predictions.logged == logged + len(ROWS)
    for row in rows:
        assert list(row["contributions"]) == list(names)
        total = row["base"] + math.fsum(row["contributions"].values())
        assert total == pytest.approx(row["raw_score"], rel=1e-9, abs=1e-12)
        assert row["score"] == pytest.approx(sigmoid(row["raw_score"]), rel=1e-12)
        assert "vector" not in row
    assert len({row["base"] for row in rows}) == 1
    assert any(value for row in rows for value in row["contributions"].values())
    assert {limit.in_flight for limit in edge.daemon.limits.values()} == {0}


def test_what_is_included_stays(client: Client) -> None:
    (row,) = client.predict("risk", ROWS[:1], include=["vector"], explain=True)["predictions"]
    assert len(row["vector"]) == len(row["contributions"])
    assert client.predict("risk", [], explain=True)["predictions"] == []


def test_a_default_score_has_no_contributions(
    edge: Any, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> Any:
        raise InternalError("out of order")

    arms = [{"model": "risk@champion"}]
    client.routes.put("defaulted", {"service": "risk", "arms": arms, "fallback": 0.5})
    with monkeypatch.context() as patched:
        patched.setattr(edge.daemon.models.find("risk").session, "run", fail)
        (row,) = client.predict("defaulted", ROWS[:1], explain=True)["predictions"]
    client.routes.delete("defaulted")
    assert (row["score"], row["fallback"]) == (0.5, "out of order")
    assert row["contributions"] is row["base"] is row["raw_score"] is None


def test_who_waits_for_an_explanation_is_no_part_of_the_crowd(
    edge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_to, inside = edge.daemon.explain.add_to, []

    async def add_and_look(*args: Any) -> None:
        inside.append(edge.daemon.limits["predict"].in_flight)
        await add_to(*args)

    monkeypatch.setattr(edge.daemon.explain, "add_to", add_and_look)
    status, _, _ = edge.call("POST", "/v1/predict/risk", {"rows": ROWS, "explain": True})
    assert (status, inside) == (200, [0])


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        ({"rows": ROWS, "explain": "yes"}, {}, 400, "wrong_type"),
        ({"rows": [ROWS[1]] * (EXPLAIN_ROWS_MAX + 1), "explain": True}, {}, 413, "too_many_rows"),
        ({"rows": ROWS, "explain": True}, {"x-deadline-ms": "0.001"}, 504, "deadline_exceeded"),
    ],
    ids=str,
)
def test_wrong_wishes_serve_nothing(
    edge: Any, body: Any, headers: dict[str, str], status: int, code: str
) -> None:
    logged = edge.daemon.predictions.logged
    found, value, _ = edge.call("POST", "/v1/predict/risk", body, headers)
    assert (found, value["error"]["code"]) == (status, code)
    assert edge.daemon.predictions.logged == logged


def test_a_full_queue_is_told_before_anything_is_served(
    edge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge.daemon.explain, "_waiting", WAITING_MAX)
    logged = edge.daemon.predictions.logged
    status, value, headers = edge.call("POST", "/v1/predict/risk", {"rows": ROWS, "explain": True})
    assert (status, value["error"]["code"]) == (503, "explain_queue_full")
    assert int(headers["retry-after"]) == 2
    assert edge.daemon.predictions.logged == logged


def test_a_version_without_lightgbms_model_cant_be_explained(
    edge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def load_file(*_: Any) -> bytes:
        raise NotFoundError("risk@1 has no file 'model.txt'", code="unknown_file")

    monkeypatch.setattr(edge.daemon.registry, "load_file", load_file)
    status, value, _ = edge.call("POST", "/v1/predict/risk", {"rows": ROWS, "explain": True})
    assert (status, value["error"]["code"]) == (409, "not_explainable")


def test_explanations_take_turns(edge: Any) -> None:
    found: list[int] = []

    def ask() -> None:
        found.append(edge.call("POST", "/v1/predict/risk", {"rows": ROWS, "explain": True})[0])

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert found == [200, 200]
    assert edge.daemon.explain._waiting == 0
