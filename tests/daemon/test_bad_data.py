"""Data that can't be trained on: a run fails with reason and hint, and nothing is published."""

import copy
import errno
from pathlib import Path
from typing import Any

import pytest

from mlpd.core.config import Config, PluginsConfig, TrainingConfig
from mlpd.daemon.app import Daemon
from mlpd.training.runs import Run, RunState
from tests.conftest import until
from tests.daemon.quick import prepare, run_job, with_job


def failure(run: Run) -> tuple[str, list[str]]:
    assert run.state is RunState.FAILED, run.result
    assert run.error is not None
    assert run.error["hint"]
    findings = run.error.get("details", {}).get("findings", [])
    return run.error["code"], [finding["code"] for finding in findings]


@pytest.mark.parametrize(
    ("change", "code", "findings"),
    [
        ({"label": "bought > 5"}, "training_data", ["too_few_of_class"]),
        ({"label": "bought / 0", "objective": "regression"}, "training_data", None),
        ({"label": "bought * 0", "objective": "regression"}, "training_data", ["label_constant"]),
        ({"label": "amount > 0"}, "training_data", ["label_leak"]),
        ({"objective": "ranking", "group": "user"}, "training_data", ["too_few_groups"]),
        ({"gap": "30d"}, "empty_part", []),
        ({"cross_validation": {"folds": 20}, "gap": "1h"}, "empty_part", []),
        ({"params": {"max_deep": 3}}, "unknown_parameter", []),
    ],
)
async def test_a_run_says_what_is_wrong_with_its_data(
    daemon: Daemon,
    trainable: Any,
    click_columns: Any,
    change: dict[str, Any],
    code: str,
    findings: list[str] | None,
) -> None:
    await prepare(daemon, with_job(trainable, **change), click_columns)
    run = await run_job(daemon)
    found = failure(run)
    assert found[0] == code, run.error
    assert findings is None or found[1] == findings
    assert not daemon.registry.models()


async def test_an_empty_spine(daemon: Daemon, trainable: Any, click_columns: Any) -> None:
    await daemon.definitions.apply(trainable)
    assert failure(await run_job(daemon))[0] == "no_rows"  # nothing has come yet
    spine = {**trainable["jobs"]["quick"]["spine"], "start": "2030-01-01T00:00:00Z"}
    await prepare(daemon, with_job(trainable, spine=spine), click_columns)
    run = await run_job(daemon)
    assert failure(run)[0] == "no_rows"


async def test_a_feature_that_nothing_fills(
    daemon: Daemon, trainable: Any, click_columns: Any
) -> None:
    """Its source gets no events any more, or never had any."""
    document = copy.deepcopy(trainable)
    document["sources"]["other"]["schema"]["size"] = "float64"
    document["views"]["shape"] = {
        "kind": "latest", "entity": "user", "source": "other", "features": ["size"],
    }  # fmt: skip
    document["services"]["risk"]["features"].append("shape.size")
    await prepare(daemon, document, click_columns)
    run = await run_job(daemon)
    assert failure(run) == ("training_data", ["always_null"])
    assert run.error is not None
    assert "shape.size" in run.error["message"]


async def test_a_job_that_is_gone_when_its_turn_comes(daemon: Daemon, trainable: Any) -> None:
    await daemon.definitions.apply(trainable)
    first = await daemon.runs.enqueue("endless", trigger="test")
    waiting = await daemon.runs.enqueue("quick", trigger="test")
    without = copy.deepcopy(trainable)
    del without["jobs"]["quick"]
    await daemon.definitions.apply(without)
    await until(lambda: daemon.runs.get(waiting.run_id).state.finished and not daemon.runs.busy)
    assert failure(daemon.runs.get(first.run_id))[0] == "no_rows"
    assert failure(daemon.runs.get(waiting.run_id))[0] == "unknown_job"


WITHOUT_MEMORY = """
import os

class Trainer:
    objectives = ("binary",)

    def fit(self, order, tell):
        try:
            return bytearray(1 << 34)
        except MemoryError:
            %s

TRAINER = Trainer()
"""


@pytest.mark.parametrize(
    ("then", "code", "attempts"),
    [("raise", "out_of_memory", 1), ("os.abort()  # as native code does", "run_lost", 3)],
)
async def test_a_child_that_lacks_memory(
    open_daemon: Any,
    trainable: Any,
    click_columns: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    then: str,
    code: str,
    attempts: int,
) -> None:
    """Where it can say so it isn't tried again; where it dies without a word it is, twice."""
    monkeypatch.setattr("mlpd.training.runs.RETRY_WAIT_US", 1_000)
    plugin = tmp_path / "hog.py"
    plugin.write_text(WITHOUT_MEMORY % then)
    training = TrainingConfig(threads=1, idle=False, nice=0, memory_bytes_max=2 << 30)
    config = Config(training=training, plugins=PluginsConfig((str(plugin),)))
    async with open_daemon(config=config) as daemon:
        await prepare(daemon, with_job(trainable, trainer="hog", params={}), click_columns)
        run = await run_job(daemon)
        assert failure(run) == (code, [])
        assert run.attempt == attempts
        assert run.error is not None
        assert "memory" in run.error["hint"]
        assert not daemon.registry.models()


async def test_a_disk_that_is_full_when_the_version_is_published(
    daemon: Daemon,
    trainable: Any,
    click_columns: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mlpd.storage.blobs._write", full)
        await prepare(daemon, trainable, click_columns)
        run = await run_job(daemon)
        assert failure(run) == ("storage_full", [])
        assert not daemon.registry.models()
    again = await daemon.runs.retry(run.run_id, trigger="test")
    await until(lambda: daemon.runs.get(again.run_id).state.finished and not daemon.runs.busy)
    assert daemon.runs.get(again.run_id).state is RunState.SUCCEEDED
    assert [model.version_count for model in daemon.registry.models()] == [1]
