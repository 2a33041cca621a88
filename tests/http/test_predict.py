"""Prediction and feedback over HTTP."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mlpd.client import Client
from mlpd.daemon.predictions import PredictionIds

ROW = {"user": "a", "age": 0.5}


def test_a_prediction_names_its_model_and_can_be_labelled(edge: Any, client: Client) -> None:
    answer = client.predict("risk", [ROW, {"user": "nobody", "age": None}], include=["vector"])
    assert (answer["route"], answer["route_version"]) == ("risk", 1)
    first, second = answer["predictions"]
    assert (first["model"], first["version"], first["arm"]) == ("risk", 1, "risk")
    assert 0 < first["score"] < 1
    assert first["label"] == (first["score"] >= 0.5)
    assert first["prediction_id"] != second["prediction_id"]
    assert len(first["vector"]) == len(edge.daemon.read.closure("risk").service.vector)
    labels = [{"prediction_id": first["prediction_id"], "label": True}]
    assert client.feedback(labels)["joined"] == 1
    assert client.feedback(labels)["stale"] == 1


def test_rows_may_come_as_columns(client: Client) -> None:
    by_rows = client.predict("risk", [ROW] * 20)["predictions"]
    by_columns = client.predict("risk", {name: [v] * 20 for name, v in ROW.items()})["predictions"]
    assert [p["score"] for p in by_rows] == [p["score"] for p in by_columns]
    assert client.predict("risk", [])["predictions"] == []


def test_many_rows_are_served_and_logged_as_few_are(edge: Any, client: Client) -> None:
    rows = [{"user": "abc"[i % 3] if i % 4 else None, "age": i / 7} for i in range(500)]
    include = ["vector", "features", "statuses", "ages"]
    logged = edge.daemon.predictions.logged
    many = client.predict("risk", rows, include=include)["predictions"]
    assert edge.daemon.predictions.logged == logged + 500
    assert len({row["prediction_id"] for row in many}) == 500
    few = [
        row
        for start in range(0, 500, 20)
        for row in client.predict("risk", rows[start : start + 20], include=include)["predictions"]
    ]
    for row, alone in zip(many, few, strict=True):
        ages, ages_alone = row.pop("ages_s"), alone.pop("ages_s")
        assert ages.keys() == ages_alone.keys()
        for name in ("score", "label", "arm", "model", "version", "features", "statuses"):
            assert row[name] == alone[name]
        assert repr(row["vector"]) == repr(alone["vector"])  # NaN too
    labels = [{"prediction_id": row["prediction_id"], "label": i % 2} for i, row in enumerate(many)]
    assert client.feedback(labels)["joined"] == 500


@pytest.mark.parametrize("path", ["/v1/predict/risk", "/v1/features/read"])
def test_a_read_of_many_rows_leaves_the_loop_to_others(
    edge: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, go = edge.daemon.read.read_each, threading.Event()
    begun, threads = threading.Event(), []

    def read_slowly(closures: Any, given: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        if len(given["user"]) > 1:
            begun.set()
            assert go.wait(20), "nobody else was served meanwhile"
        return read(closures, given, **options)

    monkeypatch.setattr(edge.daemon.read, "read_each", read_slowly)
    name = "rows" if "predict" in path else "entities"
    asked = {} if "predict" in path else {"service": "risk"}
    with ThreadPoolExecutor(1) as pool:
        many = pool.submit(edge.call, "POST", path, {**asked, name: [ROW] * 300})
        assert begun.wait(20)
        try:
            few = edge.call("POST", path, {**asked, name: [ROW]})
        finally:
            go.set()
        assert (few[0], many.result()[0]) == (200, 200)
    assert threads[0].startswith("mlpd-read")
    assert not threads[1].startswith("mlpd-read")


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        ({"rows": [{"age": 1.0}] * 300}, {}, 400, "missing_entity_key"),
        ({"rows": [ROW] * 300, "min_sequence": 10**9}, {}, 503, "sequence_not_reached"),
        ({"rows": [ROW] * 300}, {"x-deadline-ms": "0"}, 504, "deadline_exceeded"),
        ({"rows": [{"age": 1.0}]}, {}, 400, "missing_entity_key"),
        ({"rows": [{"user": "a"}]}, {}, 400, "missing_request_field"),
        ({"rows": [{**ROW, "x": 1}]}, {}, 400, "unknown_field"),
        ({"rows": [{**ROW, "age": "old"}]}, {}, 400, "wrong_type"),
        ({"rows": ["a"]}, {}, 400, "wrong_type"),
        ({"rows": [ROW], "include": ["secrets"]}, {}, 400, "unknown_include"),
        ({"rows": [ROW], "arm": "b"}, {}, 400, "unknown_arm"),
        ({"rows": [ROW], "at": "2013-01-01T00:00:00Z"}, {}, 409, "at_in_the_past"),
        ({"rows": [ROW], "min_sequence": 10**9}, {}, 503, "sequence_not_reached"),
        ({"rows": [ROW]}, {"x-deadline-ms": "soon"}, 400, "invalid_deadline"),
        ({"rows": [ROW]}, {"x-deadline-ms": "-1"}, 400, "invalid_deadline"),
        ({"rows": [ROW]}, {"x-deadline-ms": "nan"}, 400, "invalid_deadline"),
        ({"rows": [ROW]}, {"x-deadline-ms": "0"}, 504, "deadline_exceeded"),
    ],
    ids=str,
)
def test_bad_predictions(
    edge: Any, body: Any, headers: dict[str, str], status: int, code: str
) -> None:
    logged = edge.daemon.predictions.logged
    found, value, _ = edge.call("POST", "/v1/predict/risk", body, headers)
    assert (found, value["error"]["code"]) == (status, code)
    assert edge.daemon.predictions.logged == logged


def test_wrong_labels_are_named_and_the_others_stored(edge: Any) -> None:
    labels = [
        {"prediction_id": edge.prediction_id, "label": 1},
        {"prediction_id": "nonsense", "label": 1},
        {"prediction_id": edge.prediction_id, "label": "yes"},
        {"prediction_id": edge.prediction_id, "label": 1, "label_time": "2999-01-01T00:00:00Z"},
        {"prediction_id": PredictionIds().make(0, None), "label": 1},
    ]
    status, value, _ = edge.call("POST", "/v1/feedback", {"labels": labels})
    assert (status, value["accepted"], value["orphans"]) == (200, 2, 1)
    assert [(row["index"], row["code"]) for row in value["rejected"]] == [
        *((1, "invalid_prediction_id"), (2, "invalid_label"), (3, "future_label"))
    ]
