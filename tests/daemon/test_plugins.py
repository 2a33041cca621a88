"""Runs with other trainers than LightGBM: the one in the documentation, scikit-learn, a program."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

import mlpd
from mlpd.core.config import Config, PluginsConfig, TrainingConfig
from mlpd.core.errors import DefinitionError
from mlpd.daemon.app import Daemon
from mlpd.daemon.packages import read_package
from mlpd.serving.sessions import Session
from mlpd.training.runs import RunState
from tests.daemon.quick import prepare, run_job

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "tests" / "plugins" / "ridge_script.py"
PAGE = Path(mlpd.__file__).parent / "docs" / "paths" / "plugins.md"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The repository's plugins, the documented one, and a program."""
    majority = tmp_path / "majority.py"
    majority.write_text(
        re.findall(r"```python\n(# /opt/mlpd/.*?)```", PAGE.read_text(), re.DOTALL)[0]
    )
    packages = (REPOSITORY / "plugins" / name for name in ("mlpd_sklearn", "mlpd_command"))
    paths = tuple(map(str, (*packages, majority)))
    return Config(
        training=TrainingConfig(threads=1, idle=False, nice=0),
        plugins=PluginsConfig(paths, (f"ridge = {sys.executable} {SCRIPT}",)),
    )


def trained_by(document: dict[str, Any], trainer: str, **params: Any) -> dict[str, Any]:
    job = {**document["jobs"]["quick"], "trainer": trainer, "params": params}
    return {**document, "jobs": {"quick": job}}


@pytest.mark.parametrize(
    ("trainer", "params"),
    [
        ("majority", {}),
        ("command", {"command": "ridge", "alpha": 2.0}),
        ("sklearn", {"estimator": "LogisticRegression"}),
    ],
)
async def test_a_run_publishes_what_another_trainer_made(
    open_daemon: Any,
    config: Config,
    trainable: Any,
    click_columns: Any,
    trainer: str,
    params: dict[str, Any],
) -> None:
    if trainer == "sklearn":
        pytest.importorskip("skl2onnx", reason="extra `sklearn`: pip install mlpd[sklearn]")
    async with open_daemon(config=config) as daemon:
        document = trained_by(trainable, trainer, **params)
        await prepare(daemon, document, click_columns)
        ended = await run_job(daemon)
        assert ended.state is RunState.SUCCEEDED, ended.error
        assert ended.result is not None
        assert ended.result["deployed"] == "champion"
        assert ended.result["parity"]["verdict"] in ("bit_equal", "within")
        (version,) = daemon.registry.versions("quick")
        loaded = await daemon.registry.load("quick", version.number)
        Session(read_package(loaded)).verify()
        assert loaded.lineage.params["num_threads"] == 1
        assert "model.txt" not in loaded.files
        again = await daemon.reproduce.run(version)
        assert again["verdict"] == "reproduced", again["checks"]
        left = [path.name for path in daemon.paths.runs.rglob("work-*")]
        assert not [*left, *daemon.paths.cache.glob("work-*")]


async def test_a_program_that_fails_fails_its_run_once(
    open_daemon: Any, config: Config, trainable: Any, click_columns: Any
) -> None:
    async with open_daemon(config=config) as daemon:
        document = trained_by(trainable, "command", command="none")
        await prepare(daemon, document, click_columns)
        ended = await run_job(daemon)
        assert (ended.state, ended.attempt) == (RunState.FAILED, 1)
        assert (ended.error or {})["code"] == "unknown_command"
        assert not daemon.registry.models()


async def test_an_objective_that_a_trainer_cannot_do_fails_its_run(
    open_daemon: Any, config: Config, trainable: Any, click_columns: Any
) -> None:
    async with open_daemon(config=config) as daemon:
        document = trained_by(trainable, "majority")
        document["jobs"]["quick"]["objective"] = "regression"
        await prepare(daemon, document, click_columns)
        ended = await run_job(daemon)
        assert (ended.error or {})["code"] == "unsupported_objective"


async def test_a_job_of_an_unknown_trainer_is_not_applied(daemon: Daemon, trainable: Any) -> None:
    with pytest.raises(DefinitionError, match="job 'quick': unknown trainer 'magic'") as refused:
        await daemon.definitions.apply(trained_by(trainable, "magic"))
    assert refused.value.code == "unknown_trainer"
    assert not daemon.state.catalog.definitions.jobs
