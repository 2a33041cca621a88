"""Gates of a real daemon: latency, drift, and a shadow that has to run before it is promoted."""

import json
from typing import Any

import pytest

from mlpd.core.errors import ValidationError
from mlpd.daemon.app import Daemon
from mlpd.registry.records import Cause
from mlpd.training.runs import Run, RunState
from tests.conftest import until
from tests.daemon.quick import prepare, train, with_job


async def train_with(daemon: Daemon, document: Any, **changes: Any) -> Run:
    await daemon.definitions.apply(with_job(document, **changes))
    return await train(daemon)


@pytest.fixture(autouse=True)
def promoted_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon itself would look every 5 s, at a moment that no test knows."""
    monkeypatch.setattr("mlpd.daemon.promotions.LOOK_S", 3600.0)


async def predict(daemon: Daemon, count: int, amount: float = 0.0) -> None:
    rows = [{"user": "abc"[i % 3], "amount": amount + (i * 37 % 101) / 100} for i in range(count)]
    await daemon.predict.predict("risk", rows)
    daemon.predictions.flush()
    await daemon.writer.write(lambda _: None)


def checks_of(run: Run) -> dict[str, dict[str, Any]]:
    assert run.result is not None
    return {check["metric"]: check for check in run.result["gate"]["checks"]}


def alias_of(daemon: Daemon, alias: str) -> int | None:
    return {a.alias: a.version for a in daemon.registry.aliases("quick")}.get(alias)


async def test_latency_and_drift_hold_a_version_back(
    daemon: Daemon, trainable: Any, click_columns: Any
) -> None:
    await prepare(daemon, trainable, click_columns)
    gate = {"latency_p99_us": 1e7, "latency_ratio": 1e3, "drifted_features": 0.2}
    first = checks_of(await train_with(daemon, trainable, gate=gate))
    assert all(check["passed"] for check in first.values())
    assert first["latency_ratio"]["why"] == first["drifted_features"]["why"]
    route = {"service": "risk", "arms": [{"model": "quick@champion"}]}
    await daemon.routes.put("risk", route, by="test")
    await predict(daemon, 20, amount=9.0)
    few = await train_with(daemon, trainable, gate=gate)
    assert "served 20 rows" in checks_of(few)["drifted_features"]["why"]
    assert few.result is not None
    assert (few.result["deployed"], alias_of(daemon, "champion")) == ("none", 1)
    await predict(daemon, 300, amount=9.0)  # nothing like it was trained on
    drifted = await train_with(daemon, trainable, gate=gate)
    found = checks_of(drifted)
    assert (found["latency_ratio"]["passed"], found["drifted_features"]["passed"]) == (True, False)
    assert 0 < found["latency_ratio"]["value"] < 1e3
    assert "amount" in found["drifted_features"]["drifted"]
    assert found["drifted_features"]["rows"] == 320
    assert alias_of(daemon, "champion") == 1
    report = json.loads(await daemon.registry.load_file("quick", 3, "report.json"))
    assert report["latency"].keys() == {
        *("p50_us", "p99_us"),
        *("champion_p50_us", "champion_p99_us"),
    }
    slow = await train_with(daemon, trainable, gate={"latency_p99_us": 0.001})
    assert checks_of(slow)["latency_p99_us"]["passed"] is False
    assert alias_of(daemon, "champion") == 1
    wide = await train_with(daemon, trainable, gate={**gate, "drifted_features": 1.0})
    assert wide.result is not None
    assert (wide.result["deployed"], alias_of(daemon, "champion")) == ("champion", 5)


GATE = {"shadow_rows": 50, "shadow_disagreement": 1.0}


async def shadowed(daemon: Daemon, document: Any, columns: Any) -> Run:
    """Return a run whose version waits beside the champion, as a shadow of the route `risk`."""
    await prepare(daemon, document, columns)
    await train_with(daemon, document, gate=GATE)
    run = await train_with(daemon, document, gate=GATE, num_boost_round=6)
    assert run.result is not None
    assert (run.result["deployed"], run.result["gate"]["waiting"]) == ("shadow", True)
    assert (alias_of(daemon, "champion"), alias_of(daemon, "challenger")) == (1, 2)
    route = {
        "service": "risk",
        "arms": [{"model": "quick@champion"}],
        "shadows": ["quick@challenger"],
    }
    await daemon.routes.put("risk", route, by="test")
    return run


async def score(daemon: Daemon, rows: int) -> None:
    before = daemon.shadows.counters()["executed"]
    await predict(daemon, rows)
    await until(lambda: daemon.shadows.counters()["executed"] == before + rows)


async def test_a_shadow_is_promoted_once_it_has_scored_enough(
    open_daemon: Any, trainable: Any, click_columns: Any
) -> None:
    async with open_daemon() as daemon:
        run = await shadowed(daemon, trainable, click_columns)
        await score(daemon, 49)
        await daemon.promotions.look()
        assert daemon.runs.get(run.run_id) == run
    async with open_daemon() as daemon:  # figures are of one daemon's life: it begins anew
        await score(daemon, 20)
        await daemon.promotions.look()
        assert alias_of(daemon, "champion") == 1
        await score(daemon, 30)
        await daemon.promotions.look()
        assert alias_of(daemon, "champion") == 2
        ended = daemon.runs.get(run.run_id)
        assert ended.state is RunState.SUCCEEDED
        assert ended.result is not None
        assert (ended.result["deployed"], ended.result["gate"]["passed"]) == ("champion", True)
        assert checks_of(ended)["shadow_rows"]["value"] == 50
        newest = daemon.registry.history("quick", alias="champion")[0]
        assert newest.cause.report == ended.result["gate"]
        (row,) = (await daemon.predict.predict("risk", [{"user": "a", "amount": 1.0}]))[
            "predictions"
        ]
        assert row["version"] == 2
        await daemon.promotions.look()
        assert daemon.runs.get(run.run_id) == ended


async def test_a_champion_that_came_back_is_compared_anew(
    daemon: Daemon, trainable: Any, click_columns: Any
) -> None:
    await shadowed(daemon, trainable, click_columns)
    await score(daemon, 40)
    await daemon.promotions.look()
    for version in (2, 1):
        cause = Cause("test")
        await daemon.registry.move_alias("quick", "champion", version, cause, expected="any")
    await score(daemon, 40)
    await daemon.promotions.look()  # 80 rows were scored by both, but not beside one champion
    assert alias_of(daemon, "champion") == 1
    await score(daemon, 49)
    await daemon.promotions.look()
    assert alias_of(daemon, "champion") == 1
    await score(daemon, 1)
    await daemon.promotions.look()
    assert alias_of(daemon, "champion") == 2


async def test_a_shadow_that_differs_stays_a_shadow(
    daemon: Daemon, trainable: Any, click_columns: Any
) -> None:
    await shadowed(daemon, trainable, click_columns)
    strict = {"shadow_rows": 10, "shadow_difference": 1e-9}
    run = await train_with(daemon, trainable, gate=strict, params={"learning_rate": 0.5})
    await score(daemon, 10)
    await daemon.promotions.look()
    ended = daemon.runs.get(run.run_id)
    found = checks_of(ended)
    assert (found["shadow_rows"]["passed"], found["shadow_difference"]["passed"]) == (True, False)
    assert found["shadow_difference"]["value"] > 1e-9
    assert (alias_of(daemon, "champion"), alias_of(daemon, "challenger")) == (1, 3)
    # The one before waited for a shadow that runs no more.
    before = next(r for r in daemon.runs.list() if r.result and r.result["version"] == 2)
    assert "another version" in checks_of(before)["shadow_rows"]["why"]
    assert before.result is not None
    assert before.result["deployed"] == "none"


@pytest.mark.parametrize("lost", ["conclusion", "champion"])
async def test_a_promotion_that_was_cut_in_half_ends_once(
    daemon: Daemon,
    trainable: Any,
    click_columns: Any,
    monkeypatch: pytest.MonkeyPatch,
    lost: str,
) -> None:
    run = await shadowed(daemon, trainable, click_columns)
    await score(daemon, 50)
    if lost == "conclusion":  # as if killed after the alias had moved, and rolled back afterwards

        async def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(daemon.runs, "conclude", killed)
            with pytest.raises(KeyboardInterrupt):
                await daemon.promotions.look()
        await daemon.registry.rollback("quick", "champion", Cause("test"))
        await daemon.promotions.look()
        ended = daemon.runs.get(run.run_id)
        assert ended.result is not None
        assert ended.result["deployed"] == "champion"
        assert ended.result["gate"]["passed"]
    else:  # somebody takes the champion away
        await daemon.registry.move_alias("quick", "champion", None, Cause("test"), expected=1)
        await daemon.promotions.look()
        assert (
            "no champion any more" in checks_of(daemon.runs.get(run.run_id))["shadow_rows"]["why"]
        )
    moves = daemon.registry.history("quick", alias="champion")
    mine = [move for move in moves if move.cause.by == f"run {run.run_id}"]
    assert len(mine) == (lost == "conclusion")


async def test_a_job_may_end_at_the_shadow(
    daemon: Daemon, trainable: Any, click_columns: Any
) -> None:
    await prepare(daemon, trainable, click_columns)
    run = await train_with(daemon, trainable, deploy="shadow")
    assert run.result is not None
    assert run.result["deployed"] == "shadow"
    assert (alias_of(daemon, "challenger"), alias_of(daemon, "champion")) == (1, None)
    unmet = await train_with(daemon, trainable, deploy="shadow", gate={"auc": 1.0})
    assert unmet.result is not None
    assert (unmet.result["deployed"], alias_of(daemon, "challenger")) == ("none", 1)


async def test_a_version_gets_its_share_of_the_champions_routes(
    daemon: Daemon,
    trainable: Any,
    click_columns: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await prepare(daemon, trainable, click_columns)
    await train_with(daemon, trainable)
    served = {"service": "risk", "arms": [{"model": "quick@champion"}]}
    await daemon.routes.put("mine", served, by="test")
    fixed = {"service": "risk", "arms": [{"model": "quick@1"}]}
    await daemon.routes.put("fixed", fixed, by="test")
    run = await train_with(daemon, trainable, deploy="canary 5%", num_boost_round=6)
    assert run.result is not None
    assert (run.result["deployed"], alias_of(daemon, "challenger")) == ("shadow", 2)

    async def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # after the route is stored, before the run is concluded
        patch.setattr(daemon.runs, "conclude", killed)
        with pytest.raises(KeyboardInterrupt):
            await daemon.promotions.look()
    for _ in range(2):
        await daemon.promotions.look()
    ended = daemon.runs.get(run.run_id)
    assert ended.result is not None
    assert (ended.result["deployed"], ended.result["routes"]) == ("canary 5%", ["mine"])
    route = daemon.routes.get("mine")
    assert route["version"] == 2  # once
    assert route["serving"] == {"quick": "quick@1", "challenger": "quick@2"}
    weights = {arm["name"]: arm["weight"] for arm in route["arms"]}
    assert weights["challenger"] / sum(weights.values()) == pytest.approx(0.05)
    assert route["trial"]["state"] == "running"
    assert daemon.routes.history("mine")[0]["by"] == f"run {run.run_id}"
    assert daemon.routes.get("fixed")["version"] == 1
    assert alias_of(daemon, "champion") == 1
    # The next one takes its place; a route whose weights something else moves is left alone.
    following = await train_with(
        daemon, trainable, deploy="canary 5%", params={"learning_rate": 0.3}
    )
    await daemon.promotions.look()
    assert daemon.routes.get("mine")["serving"]["challenger"] == "quick@3"
    found = daemon.runs.get(following.run_id).result
    assert found is not None
    assert found["routes"] == ["mine"]


async def test_a_canary_without_a_route_stays_a_challenger(
    daemon: Daemon, trainable: Any, click_columns: Any
) -> None:
    await prepare(daemon, trainable, click_columns)
    run = await train_with(daemon, trainable, deploy="canary 10%")
    await daemon.promotions.look()
    found = daemon.runs.get(run.run_id).result
    assert found is not None
    assert (found["deployed"], found["routes"]) == ("shadow", [])
    with pytest.raises(ValidationError) as caught:
        await daemon.runs.enqueue("quick", trigger="test", deploy="canary 5")
    assert caught.value.code == "invalid_deploy"
