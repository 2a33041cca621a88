"""Answers are what mlpd.client.results says: every key of it known, none missing."""

from typing import Any, get_type_hints

from mlpd.client import Client
from mlpd.client.results import PredictedRow, Predictions, Recorded

ALWAYS = {"prediction_id", "score"}


def test_predictions_and_labels_have_the_fields_of_their_types(client: Client, edge: Any) -> None:
    include = ["vector", "features", "statuses", "ages"]
    rows = [{"user": "a", "age": 0.5}]
    answer = client.predict("risk", rows, include=include, explain=True)
    assert answer.keys() == get_type_hints(Predictions).keys()
    (row,) = answer["predictions"]
    assert row.keys() == get_type_hints(PredictedRow).keys() - {"fallback", "rank", "scores"}
    assert PredictedRow.__required_keys__ == ALWAYS
    done = client.feedback([{"prediction_id": edge.prediction_id, "label": 1}])
    assert done.keys() == get_type_hints(Recorded).keys()
