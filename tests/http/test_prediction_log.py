"""The prediction log over HTTP: which rows are logged, and how they come out again."""

from typing import Any

import numpy as np
import polars as pl
import pytest

from mlpd.client import Client
from mlpd.core.errors import InternalError
from mlpd.daemon.predictions import lot_of
from mlpd.daemon.served_request import Run
from mlpd.serving.sessions import Scores
from tests.http import edge as edges

ROWS = [{"user": f"u{i}", "age": i / 7} for i in range(200)]


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with edges.serve(tmp_path_factory.mktemp("log") / "data") as running:
        edges.fill(running)
        arms = [{"name": name, "model": "risk@champion"} for name in "ab"]
        with Client(running.url) as client:
            client.experiments.put(
                "sizes",
                {"unit": "user", "arms": {"a": 1, "b": 1}, "metrics": [{"name": "label"}]}
                | {"planned_units": 100},
            )
            sampled = {"service": "risk", "log_share": 0.3, "fallback_models": ["risk@1"]}
            client.routes.put("sampled", {**sampled, "arms": arms[:1]})
            client.routes.put("tried", {**sampled, "arms": arms, "experiment": "sizes"})
        yield running


def test_a_share_is_logged_by_a_rule_that_anybody_can_check(edge: Any) -> None:
    before = edge.daemon.predictions.left_out
    with Client(edge.url) as client:
        answers = client.predict("sampled", ROWS, include=["vector"])["predictions"]
        frame = client.predictions(route="sampled").filter(pl.col("share") < 1)  # no fallback's
        ids = [row["prediction_id"] for row in answers if row["prediction_id"] is not None]
        assert sorted(ids) == sorted(frame["prediction_id"])
        assert 30 < len(ids) < 90
        assert edge.daemon.predictions.left_out == before + 200 - len(ids)
        assert all(lot_of(name) < 0.3 for name in ids)
        assert set(frame["share"]) == {0.3}
        assert [row["score"] is not None for row in answers] == [True] * 200
        by_id = {row["prediction_id"]: row["vector"] for row in answers}
        for name, vector in frame.select("prediction_id", "vector").iter_rows():
            assert np.array_equal(vector, by_id[name], equal_nan=True)
        done = client.feedback([{"prediction_id": name, "label": 1} for name in ids])
        assert done["joined"] == len(ids)
        labelled = client.predictions(route="sampled").filter(pl.col("share") < 1)
        assert set(labelled["label"]) == {1.0}


def test_rows_of_an_experiment_and_of_a_fallback_are_always_logged(
    edge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> Any:
        raise InternalError("out of order")

    with Client(edge.url) as client:
        client.predict("tried", ROWS)
        tried = client.predictions(route="tried")
        assert (len(tried), set(tried["share"])) == (200, {1.0})
    part = next(iter(edge.daemon.routes.served("sampled").live.arms.values()))
    with monkeypatch.context() as patch:
        patch.setattr(part.session, "run", fail)
        patch.setattr(edge.daemon.predict, "_fall_back", _other(edge))
        answers = edge.call("POST", "/v1/predict/sampled", {"rows": ROWS})[1]["predictions"]
    assert all(row["prediction_id"] for row in answers)


def _other(edge: Any) -> Any:
    """Answer for the arm with zeros, as another model would."""
    predict = edge.daemon.predict

    async def answer(live: Any, arm: str, rows: Any, reads: Any, _: Any, why: Any) -> Any:
        model, read = live.live.arms[arm], next(iter(reads.values()))
        zeros = np.zeros((len(rows), 1))
        vectors = predict._vectors(model, read.frame)
        return Run(arm, model, read, rows, vectors, Scores(zeros, zeros), why.message)

    return answer


def test_pages_come_as_columns_too_and_end(edge: Any) -> None:
    with Client(edge.url) as client:  # a route of its own: each page is a child
        client.routes.put("paged", {"service": "risk", "arms": [{"model": "risk@champion"}]})
        answers = client.predict("paged", ROWS[:100])["predictions"]
    found: list[str] = []
    after = ""
    while True:
        status, page, _ = edge.call("GET", f"/v1/predictions?limit=40&route=paged&after={after}")
        assert status == 200
        columns = page["columns"]
        if not columns["prediction_id"]:
            break
        assert len(columns["prediction_id"]) < 72
        found += columns["prediction_id"]
        assert columns["position"][-1] <= page["position"]
        assert all(isinstance(time, int) for time in columns["served_time"])
        after = page["position"]
    assert sorted(found) == sorted(answer["prediction_id"] for answer in answers)


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("limit=0", "invalid_page"),
        ("limit=10001", "invalid_page"),
        ("after=zz", "invalid_page"),
        ("start=yesterday", "invalid_time"),
        ("rout=risk", "unknown_parameter"),
    ],
)
def test_wrong_pages_are_refused(edge: Any, query: str, code: str) -> None:
    status, answer, _ = edge.call("GET", f"/v1/predictions?{query}")
    assert (status, answer["error"]["code"]) == (400, code)
