"""A gate on what is gained over the champion, on the same rows: passes, fails, and says why."""

import json
from typing import Any

from mlpd.daemon.app import Daemon
from mlpd.registry.records import Cause, VersionState
from mlpd.training.gates import Evidence, gate_report
from mlpd.training.runs import Run
from tests.daemon.quick import prepare, train, with_job


def gated(document: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return with_job(document, **{"gate": {"auc_over_champion": -0.05}, **changes})


async def train_with(daemon: Daemon, document: dict[str, Any]) -> Run:
    await daemon.definitions.apply(document)
    return await train(daemon)


def check_of(run: Run) -> dict[str, Any]:
    assert run.result is not None
    [check] = run.result["gate"]["checks"]
    found: dict[str, Any] = check
    return found


async def test_the_champion_is_met_on_the_same_rows(
    daemon: Daemon, trainable: Any, click_columns: Any
) -> None:
    await prepare(daemon, trainable, click_columns)
    first = check_of(await train_with(daemon, gated(trainable)))
    assert (first["passed"], first["why"]) == (True, "there is no champion yet")
    same = check_of(await train_with(daemon, gated(trainable)))  # the very same model
    assert (same["passed"], same["champion"]) == (True, 1)
    assert (same["gain"], same["value"]) == (0, 0)
    strict = gated(trainable, gate={"auc_over_champion": 0.001}, num_boost_round=6)
    third = await train_with(daemon, strict)
    assert check_of(third)["passed"] is False
    assert third.result is not None
    assert third.result["deployed"] == "none"
    champion = {a.alias: a.version for a in daemon.registry.aliases("quick")}["champion"]
    number = third.result["version"]
    assert champion != number
    report = json.loads(await daemon.registry.load_file("quick", number, "report.json"))
    assert report["champion"]["version"] == champion
    assert report["champion"]["gains"].keys() == {"auc", "log_loss", "brier"}


async def test_a_champion_with_other_features_reads_its_own(
    daemon: Daemon, trainable: Any, click_columns: Any
) -> None:
    await prepare(daemon, trainable, click_columns)
    await train_with(daemon, gated(trainable))
    other = gated(trainable)
    other["views"]["spend"]["windows"] = ["2h"]
    other["services"]["risk"]["features"] = ["spend.amount_mean_2h"]
    check = check_of(await train_with(daemon, other))
    assert check["champion"] == 1
    assert -0.3 < check["gain"] < 0.3
    assert check["value"] < check["gain"]
    relabelled = gated(other, label="bought == 0")  # the champion says the contrary
    assert check_of(await train_with(daemon, relabelled))["gain"] > 0.2


async def test_a_champion_from_elsewhere_cannot_be_met(
    daemon: Daemon, trainable: Any, click_columns: Any
) -> None:
    await prepare(daemon, trainable, click_columns)
    run = await train_with(daemon, gated(trainable))
    assert run.result is not None
    await daemon.registry.set_state("quick", 1, VersionState.QUARANTINED, Cause("test"))
    check = check_of(await train_with(daemon, gated(trainable, num_boost_round=4)))
    assert check["passed"] is False
    assert check["champion"] == 1
    assert check["why"]


def test_a_champion_that_moved_meanwhile_fails_the_check() -> None:
    moved = {"version": 3, "why": "the champion moved from 2 to 3 meanwhile"}
    report = gate_report(
        {"auc_over_champion": -1.0, "auc": 0.5}, Evidence({"auc": 0.6}, True, moved)
    )
    assert [check["passed"] for check in report["checks"]] == [True, False]
    assert not report["passed"]
