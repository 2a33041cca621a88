"""Prediction and feedback over HTTP."""

from typing import Any

import pytest

from mlpd.client import Client

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


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
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
        {"prediction_id": "0" * 32, "label": 1},
    ]
    status, value, _ = edge.call("POST", "/v1/feedback", {"labels": labels})
    assert (status, value["accepted"], value["orphans"]) == (200, 2, 1)
    assert [(row["index"], row["code"]) for row in value["rejected"]] == [
        *((1, "invalid_prediction_id"), (2, "invalid_label"), (3, "future_label"))
    ]
