"""Calibrated models: fitted on the validation rows alone, served from the graph, made again."""

import json
from typing import Any

import lightgbm
import msgpack
import numpy as np
import onnxruntime
import pytest

from mlpd.daemon.app import Daemon
from mlpd.registry.lineage import Lineage
from mlpd.training.runs import Run, RunState
from tests.daemon.quick import run_job, send_clicks


async def files_of(daemon: Daemon, run: Run) -> tuple[Any, dict[str, bytes], Lineage]:
    assert run.state is RunState.SUCCEEDED, run.error
    assert run.result is not None
    loaded = await daemon.registry.load(run.result["model"], run.result["version"])
    assert isinstance(loaded.lineage, Lineage)
    return loaded.version, dict(loaded.files), loaded.lineage


def calibrated(document: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the definitions with a plain, an isotonic and a sigmoid job on the same rows."""
    quick = {**document["jobs"]["quick"], "valid_share": 0.3, **changes}
    jobs = {"plain": quick}
    for method in ("isotonic", "sigmoid"):
        jobs[method] = {**quick, "calibration": method}
    return {**document, "jobs": jobs}


def golden_of(files: dict[str, bytes]) -> dict[str, np.ndarray]:
    packed = msgpack.unpackb(files["golden.msgpack"])
    return {name: np.frombuffer(data).reshape(shape) for name, (shape, data) in packed.items()}


@pytest.mark.parametrize("method", ["isotonic", "sigmoid"])
async def test_a_calibrated_model_is_exact_reported_and_made_again(
    daemon: Daemon, trainable: Any, click_columns: Any, method: str
) -> None:
    await daemon.definitions.apply(calibrated(trainable))
    await send_clicks(daemon, click_columns)
    version, files, lineage = await files_of(daemon, await run_job(daemon, method))
    parity, report = json.loads(files["parity.json"]), json.loads(files["report.json"])
    assert (parity["verdict"], parity["bit_equal"]) == ("bit_equal", parity["rows"])
    found = report["calibration"]
    before, after = found["before"], found["after"]
    # Five rounds at a rate of 0.1 promise far too little: calibration has to gain.
    assert after["metrics"]["log_loss"]["value"] < before["metrics"]["log_loss"]["value"]
    assert after["metrics"]["brier"]["value"] < before["metrics"]["brier"]["value"]
    assert after["ece"] < before["ece"]
    assert after["metrics"]["log_loss"]["value"] == lineage.metrics["log_loss"]
    assert lineage.calibration == {
        key: value for key, value in found.items() if key not in ("before", "after")
    }
    assert b"before calibration" in files["calibration.svg"]
    golden = golden_of(files)
    foreign = onnxruntime.InferenceSession(files["model.onnx"])  # whoever serves it elsewhere
    (alone,) = foreign.run(["raw_score"], {"features": golden["features"]})
    assert (alone == golden["raw_score"]).all()
    booster = lightgbm.Booster(model_str=files["model.txt"].decode())
    raw = booster.predict(golden["features"], raw_score=True, num_threads=1)
    if method == "sigmoid":
        margin = raw * lineage.calibration["slope"] + lineage.calibration["offset"]
        assert (golden["raw_score"][:, 0] == margin).all()
        expected = 1 / (1 + np.exp(-margin))
        assert golden["score"][:, 0] == pytest.approx(expected, rel=1e-15)
    else:
        assert (golden["score"] == golden["raw_score"]).all()
        assert (np.diff(golden["score"][np.argsort(raw), 0]) >= 0).all()
    made = await daemon.reproduce.run(version)
    assert made["verdict"] == "reproduced", made
    assert "calibration" in {check["what"] for check in made["checks"]}


async def test_the_test_rows_have_no_say_in_it(
    daemon: Daemon, trainable: Any, click_columns: Any
) -> None:
    await daemon.definitions.apply(calibrated(trainable))
    last = len(click_columns["at"]) - len(click_columns["at"]) * 15 // 100
    bought = [*click_columns["bought"][:last], *(1 - b for b in click_columns["bought"][last:])]
    await send_clicks(daemon, {**click_columns, "bought": bought})
    _, _, turned = await files_of(daemon, await run_job(daemon, "isotonic"))
    await daemon.erase.run("user", [{"user": user} for user in "abc"])
    await send_clicks(daemon, click_columns)
    _, _, usual = await files_of(daemon, await run_job(daemon, "isotonic"))
    assert turned.rows == usual.rows == 1_000
    assert turned.metrics["auc"] != usual.metrics["auc"]
    assert turned.tree_digest == usual.tree_digest
    assert turned.calibration == usual.calibration


async def test_a_validation_part_that_tells_nothing_stops_the_run(
    daemon: Daemon, trainable: Any, click_columns: Any
) -> None:
    await daemon.definitions.apply(calibrated(trainable, valid_share=0.02))
    await send_clicks(daemon, click_columns)
    run = await run_job(daemon, "isotonic")
    assert run.state is RunState.FAILED
    assert run.error is not None
    assert run.error["code"] == "training_data"
    assert "validation rows are of class" in run.error["message"]
    assert not daemon.registry.models()
