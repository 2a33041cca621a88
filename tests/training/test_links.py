import math
from typing import Any

import lightgbm
import numpy as np
import pytest

from mlpd.core.errors import ValidationError
from mlpd.training.links import parse_link
from mlpd.training.trees import parse_model


def apply(link: dict[str, Any], scores: list[float]) -> list[float]:
    """The formulas of parse_link's docstring, one Python float at a time."""
    match link["kind"]:
        case "identity":
            return scores
        case "reg_sqrt":
            return [((x > 0) - (x < 0)) * x * x for x in scores]
        case "exp":
            return [math.exp(x) for x in scores]
        case "sigmoid":
            return [1 / (1 + math.exp(-link["scale"] * x)) for x in scores]
        case _:
            powers = [math.exp(x - max(scores)) for x in scores]
            total = 0.0
            for power in powers:
                total += power
            return [power / total for power in powers]


@pytest.mark.parametrize(
    ("params", "kind"),
    [
        ({"objective": "binary"}, "sigmoid"),
        ({"objective": "binary", "sigmoid": 0.123456789}, "sigmoid"),
        ({"objective": "cross_entropy"}, "sigmoid"),
        ({"objective": "multiclass", "num_class": 3}, "softmax"),
        ({"objective": "multiclassova", "num_class": 3, "sigmoid": 2}, "sigmoid"),
        ({"objective": "regression"}, "identity"),
        ({"objective": "regression", "reg_sqrt": True}, "reg_sqrt"),
        ({"objective": "l1", "reg_sqrt": True}, "reg_sqrt"),
        ({"objective": "huber"}, "identity"),
        ({"objective": "fair"}, "identity"),
        ({"objective": "quantile"}, "identity"),
        ({"objective": "mape"}, "identity"),
        ({"objective": "poisson"}, "exp"),
        ({"objective": "gamma"}, "exp"),
        ({"objective": "tweedie"}, "exp"),
    ],
)
def test_the_link_gives_what_predict_gives_to_the_bit(params: dict[str, Any], kind: str) -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(2_000, 4))
    classes = params.get("num_class", 2)
    label = np.clip(np.round(rows[:, 0] + rng.normal(size=2_000) + 1), 0, classes - 1)
    label += params["objective"] == "gamma"
    data = lightgbm.Dataset(rows, label)
    quiet = {"verbose": -1, "num_threads": 1}
    text = lightgbm.train(quiet | params, data, 8).model_to_string()
    model = parse_model(text)
    link = parse_link(model.objective, outputs=model.outputs)
    assert link["kind"] == kind
    booster = lightgbm.Booster(model_str=text)
    raw, expected = (booster.predict(rows, raw_score=flag).reshape(2_000, -1) for flag in (1, 0))
    found = np.array([apply(link, scores.tolist()) for scores in raw])
    assert np.array_equal(found.view(np.int64), expected.view(np.int64))


@pytest.mark.parametrize("objective", ["lambdarank", "rank_xendcg"])
def test_a_ranking_score_is_the_raw_score(objective: str) -> None:
    assert parse_link(objective, outputs=1) == {"kind": "identity"}


@pytest.mark.parametrize(
    ("objective", "outputs"),
    [
        (None, 1),
        ("custom", 1),
        ("cross_entropy_lambda", 1),
        ("binary sigmoid:1 surprise:2", 1),
        ("regression surprise", 1),
        ("poisson sqrt", 1),
        ("binary", 1),
        ("multiclass num_class:3", 4),
        ("multiclass num_class:3 surprise:1", 3),
        ("regression", 3),
    ],
)
def test_an_unknown_or_odd_objective_is_refused_not_guessed(
    objective: str | None, outputs: int
) -> None:
    with pytest.raises(ValidationError, match="no exact export") as refusal:
        parse_link(objective, outputs=outputs)
    assert refusal.value.code == "export_unsupported"
