"""Diffs of two versions: what differs is named, and nothing else."""

import json
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pytest

from mlpd.registry.diff import diff_versions
from mlpd.registry.models import Registry
from mlpd.registry.origin import Origin
from mlpd.registry.records import Cause

BY = Cause("tester")
Files = dict[str, bytes | Path]


async def diff(registry: Registry, old: int, new: int) -> dict[str, Any]:
    versions = [await registry.load("clf", number) for number in (old, new)]
    return diff_versions(*versions)


@pytest.fixture(scope="module")
def texts() -> dict[int, bytes]:
    """LightGBM's text of the same training after 5 and 8 rounds, and of another one."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(500, 3))
    y = (x[:, 0] + x[:, 1] > 0).astype(float)

    def train(rounds: int, rate: float) -> bytes:
        params = {"objective": "binary", "num_leaves": 7, "learning_rate": rate, "verbose": -1,
                  "num_threads": 1, "deterministic": True}  # fmt: skip
        data = lightgbm.Dataset(x, y)
        return bytes(lightgbm.train(params, data, rounds).model_to_string().encode())

    return {5: train(5, 0.1), 8: train(8, 0.1), 6: train(6, 0.2)}


async def test_equal_versions_differ_in_nothing(
    registry: Registry, files: Files, lineage: dict[str, Any]
) -> None:
    await registry.register("clf", files, lineage, BY)
    found = await diff(registry, 1, 1)
    assert found["same"]
    for part in ("lineage", "parameters", "packages", "files"):
        assert found[part] == []
    assert found["metrics"] == [{"name": "auc", "from": 0.7431, "to": 0.7431, "difference": 0.0}]


async def test_every_part_names_what_differs(
    registry: Registry, files: Files, lineage: dict[str, Any], texts: dict[int, bytes]
) -> None:
    gains = {"carrier": 3.0, "distance": 1.0}
    files |= {"model.txt": texts[5], "report.json": json.dumps({"importance": gains}).encode()}
    await registry.register("clf", files, lineage, BY)
    other = {
        **lineage,
        "seed": 8,
        "rows": 4,
        "params": {"num_threads": 2, "learning_rate": 0.1, "max_bin": 63},
        "metrics": {"auc": 0.75, "brier": 0.1},
        "columns": ["age", "carrier"],
        "dtypes": {"age": "float64", "carrier": "int64"},
        "categorical": [],
        "packages": {"lightgbm": "4.8.0"},
    }
    gains = {"carrier": 1.0, "age": 1.0}
    files |= {"model.txt": texts[8], "report.json": json.dumps({"importance": gains}).encode()}
    await registry.register("clf", files, other, BY)
    found = await diff(registry, 1, 2)
    assert (found["from"], found["to"], found["same"]) == ("clf@1", "clf@2", False)
    assert {c["name"]: (c["from"], c["to"]) for c in found["lineage"]} == {
        "seed": (7, 8),
        "rows": (3, 4),
        "categorical": (("carrier",), ()),
    }
    assert found["parameters"] == [{"name": "max_bin", "from": None, "to": 63}]
    assert [m["name"] for m in found["metrics"]] == ["auc", "brier"]
    assert found["metrics"][0]["difference"] == pytest.approx(0.75 - 0.7431)
    assert found["metrics"][1] == {"name": "brier", "from": None, "to": 0.1, "difference": None}
    assert found["features"] == {
        "added": ["age"],
        "removed": ["distance"],
        "retyped": [{"name": "carrier", "from": "string", "to": "int64"}],
        "reordered": False,
        "gain": [
            {"name": "age", "from": 0.0, "to": 0.5},
            {"name": "carrier", "from": 0.75, "to": 0.5},
            {"name": "distance", "from": 0.25, "to": 0.0},
        ],
    }
    assert found["packages"] == [{"name": "lightgbm", "from": "4.7.0", "to": "4.8.0"}]
    assert {c["name"] for c in found["files"]} == {"lineage.json", "model.txt", "report.json"}


async def test_trees_are_compared_one_by_one(
    registry: Registry, files: Files, lineage: dict[str, Any], texts: dict[int, bytes]
) -> None:
    for rounds in (5, 8, 6):
        trained = files | {"model.txt": texts[rounds]}
        await registry.register("clf", trained, lineage | {"seed": rounds}, BY)
    longer = (await diff(registry, 1, 2))["trees"]
    assert (longer["from"], longer["to"], longer["equal"], longer["same"]) == (5, 8, 5, False)
    assert longer["leaves_from"] == texts[5].count(b"\nleaf_value=") * 7
    assert (await diff(registry, 2, 2))["trees"]["same"]
    assert (await diff(registry, 1, 3))["trees"]["equal"] == 0


async def test_the_order_of_features_is_a_difference(
    registry: Registry, files: Files, lineage: dict[str, Any]
) -> None:
    await registry.register("clf", files, lineage, BY)
    turned = lineage | {"columns": ["distance", "carrier"]}
    await registry.register("clf", files, turned, BY)
    found = (await diff(registry, 1, 2))["features"]
    assert (found["reordered"], found["added"], found["removed"]) == (True, [], [])


async def test_an_uploaded_version_is_compared_by_its_inputs(
    registry: Registry, files: Files, lineage: dict[str, Any]
) -> None:
    await registry.register("clf", files, lineage, BY)
    inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    upload: Files = {
        "model.onnx": b"x",
        "signature.json": json.dumps({"inputs": inputs, "outputs": []}).encode(),
    }
    origin = Origin(
        producer="skl2onnx", producer_version="1", opsets={"ai.onnx": 17}, nodes=1, parameters=2,
        packages={"onnx": "1.23"},
    )  # fmt: skip
    await registry.register("clf", upload, origin, BY)
    found = await diff(registry, 1, 2)
    assert found["features"]["added"] == ["x"]
    assert found["trees"] is None
    assert {"name": "producer", "from": None, "to": "skl2onnx"} in found["lineage"]
