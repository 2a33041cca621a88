"""Several classes and rankings, from the definitions to served scores: LightGBM's, bit for bit."""

import json
from collections.abc import Iterator
from typing import Any

import lightgbm
import numpy as np
import pytest

from mlpd import Aggregate, Entity, FeatureService, Job, Source, Spine, WindowView
from mlpd.client import Client
from mlpd.core.definitions import build_document
from tests.http import edge as edges

START_US = 1_356_998_400_000_000
GROUP = 10

user = Entity("user")
shown = Source(
    "shown",
    timestamp="at",
    schema={
        "user": "string",
        "search": "string",
        "x": "float64",
        "y": "float64",
        "kind": "int64",
        "grade": "int64",
        "shown_at": "timestamp",
    },
)
load = WindowView("load", user, shown, ["1h"], [Aggregate.count(), Aggregate.mean("x")])
items = FeatureService("items", [user, load], request={"x": "float64", "y": "float64"})
spine = Spine(shown, time="shown_at")
common: dict[str, Any] = {"categorical": ["user"], "num_boost_round": 12, "deploy": "champion"}
params = {"min_data_in_leaf": 5}
folds = {"folds": 3, "window": "rolling"}
kind = Job(
    *("kind", items, spine), label="kind", objective="multiclass", params=params,
    gap="5m", cross_validation=folds, gate={"accuracy": 0.5, "auc": 0.6}, **common,
)  # fmt: skip
ova = Job(
    *("ova", items, spine), label="kind", objective="multiclass",
    params={**params, "objective": "multiclassova"}, **common,
)  # fmt: skip
order = Job(
    *("order", items, spine), label="grade", objective="ranking", group="search",
    params=params, cross_validation={"folds": 2}, gate={"ndcg@10": 0.5}, **common,
)  # fmt: skip
DOCUMENT = build_document([user, shown, load, items, kind, ova, order])


def columns(rows: int = 1_500) -> dict[str, Any]:
    """Rows a minute apart, ten to a search; x and y speak for kind and grade."""
    rng = np.random.default_rng(3)
    times = (START_US + np.arange(rows) * 60_000_000).tolist()
    x, y = rng.normal(size=(2, rows))
    noise = rng.normal(size=(2, rows)) / 2
    return {
        **dict.fromkeys(("at", "known_at", "shown_at"), times),
        "user": rng.choice(["a", "b", "c"], rows).tolist(),
        "search": [f"s{i // GROUP}" for i in range(rows)],
        "x": x.tolist(),
        "y": y.tolist(),
        "kind": np.digitize(x + noise[0], [-0.6, 0.6]).tolist(),
        "grade": np.digitize(y + noise[1], [0.0, 1.0, 2.0]).tolist(),
    }


ROWS = [{"user": u, "x": float(x), "y": 0.3} for u in "abz" for x in np.linspace(-2, 2, 9)]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A daemon with the three models behind routes of their names."""
    directory = tmp_path_factory.mktemp("shop")
    with edges.serve(directory) as running, Client(running.url) as client:
        client.apply(DOCUMENT)
        client.events.send("shown", columns())
        for name in ("kind", "ova", "order"):
            ended = client.runs.wait(client.runs.start(name)["run_id"], timeout_s=50)
            assert ended["state"] == "succeeded", ended["error"]
            parity = ended["result"]["parity"]
            assert parity["rows"] == parity["bit_equal"] > 1_000
            assert ended["result"]["deployed"] == "champion"
            arms = [{"name": "champion", "model": f"{name}@champion", "weight": 1}]
            client.routes.put(name, {"service": "items", "arms": arms})
        yield client


def lightgbms(client: Client, model: str, answer: Any) -> Any:
    """Return what LightGBM's own predict gives for the served vectors."""
    archive = client.models.archive(model)
    text = archive[archive.index(b"tree\nversion=v4") :]
    text = text[: text.index(b"end of parameters")] + b"end of parameters\n"
    booster = lightgbm.Booster(model_str=text.decode())
    vectors = np.array([row["vector"] for row in answer["predictions"]], np.float64)
    return np.asarray(booster.predict(vectors, num_threads=1))


@pytest.mark.parametrize("model", ["kind", "ova"])
def test_served_classes_are_lightgbms_to_the_bit(shop: Client, model: str) -> None:
    answer = shop.predict(model, ROWS, include=["vector"])
    expected = lightgbms(shop, model, answer)
    assert expected.shape == (len(ROWS), 3)
    for row, scores in zip(answer["predictions"], expected, strict=True):
        assert row["scores"] == scores.tolist()
        assert row["label"] == scores.argmax()
        assert row["score"] == scores.max()
    assert {row["label"] for row in answer["predictions"]} == {0, 1, 2}


def test_a_served_order_is_lightgbms_to_the_bit(shop: Client) -> None:
    answer = shop.predict("order", ROWS, include=["vector"])
    expected = lightgbms(shop, "order", answer)
    assert [row["score"] for row in answer["predictions"]] == expected.tolist()
    assert "scores" not in answer["predictions"][0]


def test_labels_of_classes_count_as_right_or_wrong(shop: Client) -> None:
    served = shop.predict("kind", ROWS)["predictions"]
    labels = [
        {"prediction_id": row["prediction_id"], "label": i % 3} for i, row in enumerate(served)
    ]
    assert shop.feedback(labels)["joined"] == len(ROWS)
    right = sum(row["label"] == i % 3 for i, row in enumerate(served))
    found = [row for row in shop.performance("kind")["cohorts"] if row["period"] == "all"]
    assert found[0]["labelled"] == len(ROWS)
    assert found[0]["performance"]["positives"] == right


def test_the_analysis_counts_the_chosen_class_too(shop: Client) -> None:
    served = shop.predict("ova", ROWS)["predictions"]
    labels = [
        {"prediction_id": row["prediction_id"], "label": i % 3} for i, row in enumerate(served)
    ]
    assert shop.feedback(labels)["joined"] == len(ROWS)
    right = sum(row["label"] == i % 3 for i, row in enumerate(served))
    (version,) = shop.analysis("ova")["versions"]
    realized = version["days"][0]["realized"]
    assert (realized["rows"], realized["positives"]) == (len(ROWS), right)


def test_a_label_that_is_no_class_is_refused_by_name(shop: Client) -> None:
    (row,) = shop.predict("kind", ROWS[:1])["predictions"]
    wrong = [0.5, -1, 100, "setosa"]
    labels = [{"prediction_id": row["prediction_id"], "label": label} for label in wrong]
    labels.insert(1, {"prediction_id": "0" * 32, "label": 0.5})  # of who knows what: it waits
    answer = shop.feedback(labels)
    assert (answer["accepted"], answer["joined"], answer["orphans"]) == (1, 0, 1)
    assert [r["index"] for r in answer["rejected"]] == [0, 2, 3, 4]
    assert {r["code"] for r in answer["rejected"]} == {"invalid_label"}
    for refused, label in zip(answer["rejected"], wrong, strict=True):
        assert f"label {label!r}" in refused["message"]
    assert "no class of kind@1" in answer["rejected"][0]["message"]
    assert "numbered from 0" in answer["rejected"][3]["hint"]


def test_the_chosen_class_is_explained(shop: Client) -> None:
    for row in shop.predict("kind", ROWS[:4], explain=True)["predictions"]:
        total = row["base"] + sum(row["contributions"].values())
        assert total == pytest.approx(row["raw_score"])


def test_the_report_has_classes_folds_and_bounds(shop: Client) -> None:
    report = shop.models.version("kind")["report"]
    test = report["evaluation"]["test"]
    assert test["slices"]["(class)"].keys() == {"0", "1", "2"}
    assert test["metrics"]["auc"]["low"] < test["metrics"]["auc"]["value"]
    validated = report["cross_validation"]
    assert [len(validated["folds"]), validated["window"]] == [3, "rolling"]
    for fold in validated["folds"]:
        assert fold["trained"]["to"] < fold["judged"]["from"]
        assert fold["metrics"].keys() == test["metrics"].keys()
    spread = validated["metrics"]["accuracy"]
    values = [fold["metrics"]["accuracy"] for fold in validated["folds"]]
    assert spread["mean"] == pytest.approx(np.mean(values))
    assert spread["deviation"] == pytest.approx(np.std(values, ddof=1))
    ranked = shop.models.version("order")["report"]
    assert ranked["evaluation"]["test"]["metrics"].keys() == {"ndcg@10", "map@10", "mrr"}
    assert ranked["rows"]["test"] % GROUP == 0
    assert json.dumps(ranked)


def test_each_objective_has_its_pictures(shop: Client) -> None:
    def pictures(model: str) -> set[str]:
        files = shop.models.version(model)["files"]
        return {name.removesuffix(".svg") for name in files if name.endswith(".svg")}

    common = {"importance", "contributions", "learning"}
    assert pictures("kind") == {*common, "calibration"}
    assert pictures("order") == common
    assert "chosen class" in shop.models.picture("kind", 1, "calibration")


@pytest.mark.parametrize("model", ["kind", "order"])
def test_they_come_out_again(shop: Client, model: str) -> None:
    found = shop.models.reproduce(model)
    assert found["verdict"] == "reproduced", found


def test_served_vectors_are_the_logs(shop: Client) -> None:
    assert shop.run_consistency()["mismatches"] == 0
