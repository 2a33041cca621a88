"""A run that searches parameters: shown, killed, taken up, reproduced."""

import json
import os
import signal
from typing import Any

import pytest

from mlpd.daemon.app import Daemon
from mlpd.registry.lineage import Lineage
from tests.conftest import children_with, until
from tests.daemon.quick import prepare, run_job, send_clicks, train, until_ended, with_job

pytest.importorskip("optuna", reason="pip install 'mlpd[search]'")

SPACE = {
    "num_leaves": {"low": 3, "high": 24},
    "eta": {"low": 0.02, "high": 0.5, "log": True},
    "bagging_fraction": {"choices": [0.6, 1.0]},
}


def searching(document: dict[str, Any], **search: Any) -> dict[str, Any]:
    return with_job(document, num_boost_round=40, search={"trials": 4, "space": SPACE, **search})


async def lineage_of(daemon: Daemon, number: int) -> Lineage:
    lineage = await daemon.registry.load_lineage("quick", number)
    assert isinstance(lineage, Lineage)
    return lineage


async def report_of(daemon: Daemon, number: int) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(
        await daemon.registry.load_file("quick", number, "report.json")
    )
    return report


@pytest.mark.timeout(150)  # three children that import Optuna and train nine models
async def test_a_killed_search_goes_on_and_finds_what_one_in_one_go_finds(
    daemon: Daemon, trainable: Any, click_columns: Any
) -> None:
    await prepare(daemon, searching(trainable), click_columns)
    await train(daemon)
    second = await daemon.runs.enqueue("quick", trigger="test")
    seen: list[dict[str, Any]] = []

    def trying_the_third() -> bool:
        progress = dict(daemon.runs.get(second.run_id).progress)
        seen.append(progress)
        return progress.get("step") == "search" and progress["trial"] >= 3

    await until(trying_the_third)
    os.kill(training_child(), signal.SIGKILL)
    await send_clicks(daemon, click_columns)  # what comes meanwhile is none of this run's business
    found = await until_ended(daemon, second)
    assert found.attempt == 2
    told = [progress for progress in seen if "best" in progress]
    assert told[-1]["trials"] == 4
    assert 0.5 < told[-1]["best"] <= 1
    reports = [await report_of(daemon, number) for number in (1, 2)]
    assert [report["search"]["taken_up"] >= 2 for report in reports] == [False, True]
    tried = [[(t["params"], t["merit"]) for t in report["search"]["trials"]] for report in reports]
    assert len(tried[0]) == 4
    assert tried[0] == tried[1]
    once, twice = [await lineage_of(daemon, number) for number in (1, 2)]
    assert once.tree_digest == twice.tree_digest
    assert once.as_of_sequence == twice.as_of_sequence


async def test_the_best_parameters_train_the_model_and_it_comes_out_again(
    daemon: Daemon, trainable: Any, click_columns: Any
) -> None:
    await prepare(daemon, searching(trainable), click_columns)
    await train(daemon)
    search = (await report_of(daemon, 1))["search"]
    best = max(search["trials"], key=lambda trial: trial["merit"] or 0.0)
    assert search["best"] == best["number"]
    assert search["params"] == best["params"]
    params = (await lineage_of(daemon, 1)).params
    assert params["num_leaves"] == best["params"]["num_leaves"]
    assert params["learning_rate"] == best["params"]["eta"]
    assert params["bagging_fraction"] == best["params"]["bagging_fraction"]
    found = await daemon.reproduce.run(daemon.registry.get("quick", 1))
    assert found["verdict"] == "reproduced", found


async def test_a_parameter_that_is_none_ends_the_run_before_the_first_trial(
    daemon: Daemon, trainable: Any, click_columns: Any
) -> None:
    space = {"leafs": {"low": 2, "high": 9}}
    await prepare(daemon, searching(trainable, space=space), click_columns)
    found = await run_job(daemon)
    assert found.error is not None
    assert found.error["code"] == "unknown_parameter"
    assert "leafs" in found.error["message"]


def training_child() -> int:
    [found] = children_with("train")
    return found
