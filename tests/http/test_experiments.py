"""Experiments on a real daemon: exposures, covariates, outcomes, over a restart."""

import asyncio
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from mlpd.client import Client
from mlpd.core.errors import (
    ConflictError,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
)
from mlpd.core.time import system_clock
from mlpd.daemon.experiments import Experiments
from mlpd.daemon.feature_places import FeaturePlaces
from mlpd.daemon.outcomes import Outcomes
from mlpd.daemon.predictions import scan_predictions
from mlpd.daemon.unit_outcomes import UnitOutcomes, split_key
from mlpd.experiments.guardrails import Breach
from mlpd.monitoring.performance import PerformanceTable
from mlpd.storage.tables import Table
from tests.http import edge as edges

T = TypeVar("T")
ARMS = [{"name": "control", "model": "risk@1"}, {"name": "treatment", "model": "risk@2"}]
SPEC: dict[str, Any] = {
    "unit": "user",
    "arms": {"control": 1, "treatment": 1},
    "metrics": [{"name": "label"}],
    "planned_units": 400,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experiments") / "data"


@pytest.fixture(scope="module")
def edge(directory: Path) -> Iterator[Any]:
    """A daemon of this module's own, whose experiments come and go with it."""
    with edges.serve(directory) as running:
        edges.fill(running)
        edges.train_another(running)
        yield running


def begin(client: Client, name: str, **changes: Any) -> None:
    client.experiments.put(name, {**SPEC, **changes})
    route = {"service": "risk", "arms": ARMS, "experiment": name, "fallback": 0.5}
    client.routes.put(name, route)


def serve_units(client: Client, name: str, units: range) -> list[dict[str, Any]]:
    rows = [{"user": f"u{i}", "age": i / 10} for i in units]
    found: list[dict[str, Any]] = client.predict(name, rows)["predictions"]
    return found


def label(client: Client, predictions: list[dict[str, Any]]) -> None:
    labels = [
        {"prediction_id": p["prediction_id"], "label": i % 7 == 0 or i > 250}
        for i, p in enumerate(predictions)
    ]
    assert client.feedback(labels)["joined"] == len(predictions)


def test_covariates_are_of_the_first_exposure_and_survive_a_restart(edge: Any) -> None:
    metrics = [
        {"name": "label", "covariate": "age"},
        {"name": "correct", "covariate": "spend.count_1h"},
    ]
    with Client(edge.url) as client:
        begin(client, "adjusted", metrics=metrics)
        served = serve_units(client, "adjusted", range(400))
        older = [{"user": f"u{i}", "age": 99.0} for i in range(400)]
        client.predict("adjusted", older)
        label(client, served)
        found = client.experiments.get("adjusted")
    by_age, by_feature = found["result"]["comparisons"]
    assert by_age["units"] == 400
    assert by_age["theta"] > 0
    assert 0.2 < by_age["variance_kept"] < 0.8
    assert (by_feature["theta"], by_feature["variance_kept"]) == (0.0, 1.0)  # nobody has clicked
    assert by_age["fixed"]["df"] > 300
    assert 0 < by_age["bayesian"]["chance"] < 1
    live = edge.daemon.experiments._live["adjusted"]
    assert live.records["u7"].covariates == (0.7, 0.0)
    again = rebuilt(edge)
    assert again._live["adjusted"].records == live.records
    after = on_loop(edge, again.get("adjusted"))["result"]["comparisons"]
    assert [c["theta"] for c in after] == pytest.approx([by_age["theta"], 0.0])


def test_rows_whose_vectors_moved_into_files_have_no_covariates(edge: Any) -> None:
    metrics = [{"name": "label", "covariate": "spend.count_1h"}]
    with Client(edge.url) as client:
        begin(client, "moved", metrics=metrics)
        serve_units(client, "moved", range(3))
    daemon = edge.daemon
    flush_predictions(edge)
    rows = [p for part in scan_predictions(daemon.environment) for p, _ in part]
    (row,) = [p for p in rows if (p.experiment, p.unit) == ("moved", "u1")]
    assert row.unit is not None
    gone = replace(row, moved=True, vector=np.empty(0), given={}, unit="later")
    edge.loop.call_soon_threadsafe(daemon.experiments.exposed, [gone])
    on_loop(edge, asyncio.sleep(0))
    records = daemon.experiments.find("moved").records
    assert (records["later"].covariates, records["u1"].covariates) == ((None,), (0.0,))


def flush_predictions(edge: Any) -> None:
    """Return when all that was served is in LMDB."""
    edge.loop.call_soon_threadsafe(edge.daemon.predictions.flush)
    on_loop(edge, edge.daemon.writer.write(lambda _: None))


def on_loop(edge: Any, work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run_coroutine_threadsafe(work, edge.loop).result(30)


def rebuilt(edge: Any) -> Experiments:
    """The experiments as a start would find them, with no version loaded yet."""
    flush_predictions(edge)
    daemon, loop = edge.daemon, edge.loop
    places = FeaturePlaces(daemon.registry, {}.__getitem__)
    found = Experiments(
        *(daemon.environment, daemon.writer, places, daemon.parts, daemon.shared.fence),
        daemon.clock,
    )
    outcomes = Outcomes(PerformanceTable(), found)
    asyncio.run_coroutine_threadsafe(outcomes.rebuild(daemon.environment), loop).result(30)
    by_unit = UnitOutcomes(found, daemon.environment, daemon.writer)
    asyncio.run_coroutine_threadsafe(by_unit.rebuild(), loop).result(30)
    return found


def spoil(edge: Any, monkeypatch: pytest.MonkeyPatch, how: Callable[[Any, int], Any]) -> None:
    """Let every second answer of the treatment's model be what `how` makes of it."""
    session = edge.daemon.models.find("risk", 2).session
    run, calls = session.run, iter(range(10**6))

    def spoilt(vectors: Any) -> Any:
        number = next(calls)
        return how(run(vectors), number) if number % 2 else run(vectors)

    monkeypatch.setattr(session, "run", spoilt)


def fail(_: Any, number: int) -> Any:
    raise InternalError(f"run {number} failed")


def sleep_past_the_deadline(_: Any, __: int) -> Any:
    time.sleep(0.03)
    raise DeadlineExceededError("too late")


def dawdle(scores: Any, _: int) -> Any:
    time.sleep(0.03)
    return scores


def forget(scores: Any, _: int) -> Any:
    return np.full_like(scores, np.nan)


def serve_until_stopped(edge: Any, client: Client, name: str) -> int:
    """Return how many units the treatment served until its weight was 0."""
    live, own = edge.daemon.experiments.find(name), 0
    for i in range(400):
        if not live.spec.weights["treatment"]:
            break
        row = {"user": f"x{i}", "age": 0.5}
        try:
            own += client.predict(name, [row])["predictions"][0].get("arm") != "control"
        except DeadlineExceededError:
            own += 1
    return own


@pytest.mark.parametrize(
    ("rail", "how"),
    [
        ({"on": "errors"}, fail),
        ({"on": "latency", "limit_ms": 25}, dawdle),
        ({"on": "latency", "limit_ms": 25}, sleep_past_the_deadline),
        ({"on": "nulls"}, forget),
    ],
)
def test_an_arm_that_turns_bad_is_stopped_within_200_of_its_requests(
    edge: Any, monkeypatch: pytest.MonkeyPatch, rail: dict[str, Any], how: Any
) -> None:
    name = f"guarded-{rail['on']}-{how.__name__[:5]}"
    with Client(edge.url) as client:
        begin(client, name, guardrails=[rail], cool_down_s=3600)
        serve_units(client, name, range(60))
        assert client.experiments.get(name)["cooling"] == {}
        spoil(edge, monkeypatch, how)
        own = serve_until_stopped(edge, client, name)
        assert 5 < own <= 200
        found, events = client.experiments.get(name), client.experiments.history(name)["events"]
        after = [
            client.predict(name, [{"user": f"y{i}", "age": 0.5}])["predictions"][0]["arm"]
            for i in range(20)
        ]
        assert set(after) == {"control"}
        assert found["spec"]["arms"] == {"control": 1.0, "treatment": 0.0}
        assert len(found["phases"]) == 2
        assert [event["action"] for event in events] == ["stopped", "created"]
        assert (events[0]["by"], events[0]["arm"]) == ("mlpd", "treatment")
        assert rail["on"] in events[0]["why"]
        with pytest.raises(ConflictError, match="cools down until") as caught:
            client.experiments.put(name, {**SPEC, "guardrails": [rail], "cool_down_s": 3600})
        assert caught.value.code == "arm_cooling_down"
        kept = rebuilt(edge).find(name).kept
        assert kept == edge.daemon.experiments.find(name).kept
        on_loop(edge, edge.daemon.alerts.look())
        firing = {
            a["labels"]["alertname"]: a
            for a in client.alerts.list()["alerts"]
            if a["labels"].get("experiment") == name
        }
        assert firing["ArmStopped"]["state"] == "firing"
        monkeypatch.undo()
        forced = {**SPEC, "guardrails": [rail], "cool_down_s": 3600}
        client.experiments.put(name, forced, force=True)
        assert client.experiments.history(name)["events"][0]["action"] == "weights"


def test_metrics_stop_and_promote_at_a_look_and_leave_a_timeline(edge: Any) -> None:
    with Client(edge.url) as client:
        for name, worse, more in (
            ("stopped", "treatment", {"guardrails": [{"on": "metric", "metric": "label"}]}),
            ("promoted", "control", {"promotion": {"margin": 0.0}}),
        ):
            begin(client, name, **more)
            served = serve_units(client, name, range(800))
            labels = [
                {
                    "prediction_id": p["prediction_id"],
                    "label": i % (8 if p["arm"] == worse else 2) == 0,
                }
                for i, p in enumerate(served)
            ]
            client.feedback(labels[:500])
            on_loop(edge, edge.daemon.watch.look_at_all())
            client.feedback(labels[500:])
            on_loop(edge, edge.daemon.watch.look_at_all())
            events = client.experiments.history(name)["events"]
            assert (events[0]["action"], events[0]["arm"]) == (name, "treatment")
            weights = client.experiments.get(name)["spec"]["arms"]
            assert weights["treatment"] == (0 if name == "stopped" else 2)
            on_loop(edge, edge.daemon.writer.write(lambda _: None))
            points = client.experiments.timeline(name)["points"]
            assert [p["comparisons"][0]["units"] for p in points] == [500, 800]
            drawn = ET.fromstring(client.experiments.picture(name))
            assert drawn[0].text == f"{name}: lift of label, treatment over control"
            for wrong in ({"metric": "correct"}, {"arm": "control"}):
                with pytest.raises(NotFoundError, match="has no points of") as caught:
                    client.experiments.picture(name, **wrong)
                assert caught.value.code == "unknown_comparison"
            serve_units(client, name, range(800))  # half of them see another arm now
            on_loop(edge, edge.daemon.watch.look_at_all())
            assert len(client.experiments.timeline(name)["points"]) == 2
            result = client.experiments.get(name)["result"]
            assert result["units_moved"] == result["units_switched"] == 0
            assert result["comparisons"][0]["units"] == 800
            again = rebuilt(edge).find(name)
            assert again.state.exposed == edge.daemon.experiments.find(name).state.exposed
            assert again.records == edge.daemon.experiments.find(name).records


def test_namespaces_that_overlap_are_refused(edge: Any) -> None:
    with Client(edge.url) as client:
        client.experiments.put("left", {**SPEC, "namespace": {"name": "n", "start": 0, "end": 60}})
        with pytest.raises(InvalidRequestError, match="overlap in namespace 'n'") as caught:
            client.experiments.put(
                "right", {**SPEC, "namespace": {"name": "n", "start": 59, "end": 90}}
            )
        assert caught.value.code == "namespace_overlap"
        assert "right" not in client.experiments.list()["experiments"]


def labelled(result: dict[str, Any]) -> int:
    """Return how many units of all arms and phases have an outcome."""
    arms = [arm for phase in result["phases"] for arm in phase["arms"].values()]
    return sum(arm["metrics"].get("label", {"units": 0})["units"] for arm in arms)


def test_an_ended_experiment_leaves_its_arm_its_results_and_its_buckets(edge: Any) -> None:
    space = {"name": "ending", "start": 0, "end": 5_000}
    changes: dict[str, Any] = {
        "namespace": space,
        "holdout": 0.2,
        "guardrails": [{"on": "nulls"}, {"on": "metric", "metric": "label"}],
        "promotion": {"margin": 0.0},
    }
    with Client(edge.url, by="dora") as client:
        begin(client, "ending", **changes)
        served = serve_units(client, "ending", range(400))
        label(client, served[:300])
        before = client.experiments.get("ending")
        assert (before["state"], before["chosen"]) == ("running", None)
        with pytest.raises(InvalidRequestError, match="no arm 'third'"):
            client.experiments.end("ending", "third")
        ended = client.experiments.end("ending", "treatment", why="good enough")
        assert (ended["state"], ended["chosen"]) == ("ended", "treatment")
        assert ended["result"] == before["result"]
        assert ended["phases"] == before["phases"]
        after = serve_units(client, "ending", range(400, 460))
        assert {p["arm"] for p in after} == {"treatment"}  # those of the hold-out, too
        label(client, served[300:])  # late ones still count
        late = client.experiments.get("ending")["result"]
        assert late["units"] == before["result"]["units"]
        assert labelled(late) > labelled(before["result"])
        on_loop(edge, edge.daemon.watch.look_at_all())
        last, *others = client.experiments.history("ending")["events"]
        found = (last["by"], last["action"], last["why"], last["arm"])
        assert found == ("dora", "ended", "good enough", "treatment")
        assert [event["action"] for event in others] == ["created"]
        assert client.experiments.end("ending", "treatment") == client.experiments.get("ending")
        with pytest.raises(InvalidRequestError, match="'why' has 1001 characters") as refused:
            client.experiments.end("ending", "treatment", why="x" * 1_001)
        assert refused.value.code == "why_too_long"
        for change in (
            lambda: client.experiments.end("ending", "control"),
            lambda: client.experiments.put("ending", {**SPEC, **changes}),
        ):
            with pytest.raises(ConflictError, match="has ended") as caught:
                change()
            assert caught.value.code == "experiment_ended"
        client.experiments.put("heir", {**SPEC, "namespace": space})
        alone = {"service": "risk", "arms": ARMS[1:], "experiment": "ending"}
        client.routes.put("ending", alone)
        assert {p["arm"] for p in serve_units(client, "ending", range(5))} == {"treatment"}
    again, live = rebuilt(edge).find("ending"), edge.daemon.experiments.find("ending")
    assert (again.kept, again.records) == (live.kept, live.records)


def test_an_arm_that_cools_down_wins_by_force_alone(edge: Any) -> None:
    with Client(edge.url) as client:
        begin(client, "cooling-end", cool_down_s=3600)
        breach = Breach("treatment", "errors", "it broke")
        on_loop(edge, edge.daemon.experiments.stop_arm("cooling-end", breach))
        with pytest.raises(ConflictError, match="cools down until"):
            client.experiments.end("cooling-end", "treatment")
        ended = client.experiments.end("cooling-end", "treatment", force=True)
        assert ended["chosen"] == "treatment"
        phases = ended["phases"]
        on_loop(edge, edge.daemon.experiments.stop_arm("cooling-end", breach))
        on_loop(edge, edge.daemon.experiments.promote("cooling-end", "control", "late"))
        assert client.experiments.get("cooling-end")["phases"] == phases
        alerts = on_loop(edge, edge.daemon.watch.look(1)).measured
        assert not [m for m in alerts if m.labels.get("experiment") == "cooling-end"]


def look_after(edge: Any, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the bandits look, so many seconds from now."""
    at_us = system_clock() + round(1e6 * seconds)
    monkeypatch.setattr(edge.daemon.bandits, "_clock", lambda: at_us)
    on_loop(edge, edge.daemon.bandits.look())


def test_a_bandit_moves_by_old_units_and_leaves_them_where_they_are(
    edge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bandit = {"every_s": 60, "delay_s": 600, "units_min": 30, "floor": 0.1, "seed": 3}
    with Client(edge.url) as client:
        begin(client, "bandit", bandit=bandit)
        served = serve_units(client, "bandit", range(300))
        arms = {p["prediction_id"]: p["arm"] for p in served}
        labels = [
            {"prediction_id": name, "label": (i % 10 > 2) == (arm == "treatment")}
            for i, (name, arm) in enumerate(arms.items())
        ]
        client.feedback(labels)
        look_after(edge, monkeypatch, 50)
        assert client.experiments.get("bandit")["bandit"] is None  # weights stay for a minute
        look_after(edge, monkeypatch, 61)
        found = client.experiments.get("bandit")
        assert found["bandit"]["why"] == "arm control has 0 of 30 units that count"
        assert len(found["phases"]) == 1
        look_after(edge, monkeypatch, 700)
        found = client.experiments.get("bandit")
        assert found["bandit"]["chances"]["treatment"] > 0.99
        assert sum(found["bandit"]["units"].values()) == 300
        values = found["bandit"]["values"]
        ips = values["treatment"]["ips"]  # the same with one phase
        assert values["treatment"]["dr"] == pytest.approx(ips)
        assert values["control"]["dr"] + 0.2 < values["treatment"]["dr"]
        assert found["spec"]["arms"] == {
            "control": pytest.approx(0.1, abs=0.01),
            "treatment": pytest.approx(0.9, abs=0.01),
        }
        event = client.experiments.history("bandit")["events"][0]
        assert (event["action"], event["by"], event["arm"]) == ("bandit", "mlpd", None)
        assert event["why"].startswith("treatment is the best with probability")
        again = serve_units(client, "bandit", range(300))
        assert [p["arm"] for p in again] == [p["arm"] for p in served]
        fresh = serve_units(client, "bandit", range(1_000, 1_200))
        assert sum(p["arm"] == "treatment" for p in fresh) > 160
        result = client.experiments.get("bandit")["result"]
        assert (result["units"], result["units_moved"], result["units_switched"]) == (500, 0, 0)
        assert not result["sample_ratio"]["alarm"]
        flush_predictions(edge)
        rows = [p for part in scan_predictions(edge.daemon.environment) for p, _ in part]
        mine = [p for p in rows if p.experiment == "bandit"]
        old = {(p.phase, p.propensity) for p in mine if int((p.unit or "u0")[1:]) < 300}
        assert old == {(0, 0.5)}
        kept = rebuilt(edge).find("bandit")
        live = edge.daemon.experiments.find("bandit")
        assert (kept.kept, kept.records) == (live.kept, live.records)


def test_what_lasts_for_ever_has_a_date_all_the_same(
    edge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(edge.url) as client:
        bandit = {"every_s": 1e303, "delay_s": 1e303}
        begin(client, "for-ever", bandit=bandit, cool_down_s=1e303)
        look_after(edge, monkeypatch, 100)
        breach = Breach("treatment", "errors", "it broke")
        on_loop(edge, edge.daemon.experiments.stop_arm("for-ever", breach))
        assert client.experiments.get("for-ever")["cooling"]["treatment"] > "5000"
    again, live = rebuilt(edge).find("for-ever"), edge.daemon.experiments.find("for-ever")
    assert again.kept == live.kept


def test_a_bandit_leaves_stopped_arms_and_ended_experiments_alone(
    edge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(edge.url) as client:
        begin(client, "alone", bandit={"every_s": 60, "units_min": 10})
        label(client, serve_units(client, "alone", range(100)))
        breach = Breach("treatment", "errors", "it broke")
        on_loop(edge, edge.daemon.experiments.stop_arm("alone", breach))
        look_after(edge, monkeypatch, 61)
        found = client.experiments.get("alone")
        assert found["bandit"]["why"] == "arm control is alone"
        assert found["spec"]["arms"]["treatment"] == 0.0
        late = {"control": 0.5, "treatment": 0.5}  # chosen before the arm was stopped
        on_loop(edge, edge.daemon.experiments.move("alone", late, "too late", phases=1))
        assert client.experiments.get("alone")["phases"] == found["phases"]
        client.experiments.end("alone", "control")
        late = {"control": 1.0, "treatment": 0.0}
        on_loop(edge, edge.daemon.experiments.move("alone", late, "too late", phases=2))
        assert client.experiments.history("alone")["events"][0]["action"] == "ended"


def test_a_bandit_trusts_no_split_that_does_not_match(
    edge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(edge.url) as client:
        begin(client, "lost", bandit={"every_s": 60, "units_min": 10})
        label(client, serve_units(client, "lost", range(400)))
        live = edge.daemon.experiments.find("lost")
        live.state.exposed[0, "control"] = 0  # as if those units had never been seen
        look_after(edge, monkeypatch, 61)
        assert "don't match the weights" in client.experiments.get("lost")["bandit"]["why"]


def test_a_bandit_waits_for_no_time_that_the_clock_was_put_back_from(
    edge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def units_told() -> int | None:
        bandit = client.experiments.get("clocks")["bandit"]
        return bandit and sum(bandit["units"].values())

    with Client(edge.url) as client:
        with monkeypatch.context() as ahead:
            ahead.setattr(edge.daemon.experiments, "_clock", lambda: system_clock() + 10**15)
            begin(client, "clocks", bandit={"every_s": 60, "units_min": 500})
        label(client, serve_units(client, "clocks", range(100)))
        look_after(edge, monkeypatch, 2e9)
        assert units_told() == 100
        label(client, serve_units(client, "clocks", range(100, 150)))
        look_after(edge, monkeypatch, 10)  # looks and phases lie in the future now
        assert units_told() == 150
        label(client, serve_units(client, "clocks", range(150, 200)))
        look_after(edge, monkeypatch, 20)
        assert units_told() == 150
        look_after(edge, monkeypatch, 71)
        assert units_told() == 200


def lists_of(client: Client, name: str, units: range) -> list[list[dict[str, Any]]]:
    """Ask for a list of nine rows per unit, two lists in a request; each in the order to show."""
    found = []
    for i in units:
        users = [f"{name}{i}", f"{name}{i}b"]
        rows = [{"user": users[j % 2], "age": (j // 2 * 37 % 9) / 3 - 1.5} for j in range(18)]
        answer = client.predict(name, rows)["predictions"]
        for user in range(2):
            mine = answer[user::2]
            found.append(sorted(mine, key=lambda row: row["rank"]))
    return found


def test_an_interleaved_list_is_of_both_arms_and_clicks_tell_whose_picks_are_better(
    edge: Any,
) -> None:
    with Client(edge.url) as client:
        begin(client, "lists", interleaving=True)
        shown = lists_of(client, "lists", range(40))
        for rows in shown:
            assert [row["rank"] for row in rows] == list(range(1, 10))
            arms = [row["arm"] for row in rows]
            assert abs(arms.count("control") - arms.count("treatment")) == 1
            assert {(r["arm"], r["version"]) for r in rows} == {("control", 1), ("treatment", 2)}
            for arm in ("control", "treatment"):  # a team picks by its own scores
                scores = [row["score"] for row in rows if row["arm"] == arm]
                assert scores == sorted(scores, reverse=True)
        again = lists_of(client, "lists", range(1))
        order = [[(row["arm"], row["score"]) for row in rows] for rows in (again[0], shown[0])]
        assert order[0] == order[1]
        before = client.experiments.get("lists")
        assert (before["result"], before["preference"]["lists"]) == (None, 80)
        clicks = [
            {"prediction_id": row["prediction_id"], "label": int(row["arm"] == "treatment")}
            for rows in shown[:60]
            for row in rows
        ]
        client.feedback(clicks)
        found = client.experiments.get("lists")["preference"]
        assert (found["clicked"], found["first"], found["second"]) == (60, 0, 60)
        assert (found["verdict"], found["share"], found["high"]) == ("better", 1.0, 1.0)
        client.feedback([{**click, "label": 0} for click in clicks[:9]])  # corrected
        corrected = client.experiments.get("lists")["preference"]
        assert (corrected["clicked"], corrected["second"]) == (59, 59)
        with pytest.raises(InvalidRequestError, match="is interleaved") as caught:
            client.experiments.send_outcomes(
                "lists", [{"unit": "lists0", "id": "1", "values": {"label": 1}}]
            )
        assert caught.value.code == "interleaved"
        forced = client.predict("lists", [{"user": "lists0", "age": 0.5}], arm="treatment")
        assert "rank" not in forced["predictions"][0]
        flush_predictions(edge)
        assert on_loop(edge, rebuilt(edge).get("lists"))["preference"] == corrected
        ended = client.experiments.end("lists", "treatment")
        assert ended["preference"] == corrected
        last = client.predict("lists", [{"user": "lists0", "age": 0.5}])["predictions"][0]
        assert (last["arm"], "rank" in last) == ("treatment", False)


def test_a_list_that_one_arm_can_rank_is_its_own_and_takes_no_part(
    edge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> Any:
        raise InternalError("out of order")

    rows = [{"user": "half", "age": i / 5} for i in range(5)]
    with Client(edge.url) as client:
        begin(client, "half", interleaving=True)
        monkeypatch.setattr(edge.daemon.models.find("risk", 1).session, "run", fail)
        answer = client.predict("half", rows)["predictions"]
        assert {(row["arm"], row["version"]) for row in answer} == {("treatment", 2)}
        assert not any("rank" in row or "fallback" in row for row in answer)
        monkeypatch.setattr(edge.daemon.models.find("risk", 2).session, "run", fail)
        defaults = client.predict("half", rows)["predictions"]
        assert {row["score"] for row in defaults} == {0.5}
        assert client.experiments.get("half")["preference"]["lists"] == 0


def test_a_list_that_an_end_meets_is_no_list_of_one_arm(
    edge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    live_assign = edge.daemon.experiments.assign

    def assign(name: str, given: Any) -> Any:
        found = live_assign(name, given)
        if given["age"] == 0.6:  # the last row: the end comes right after it
            live = edge.daemon.experiments.find(name)
            live.kept = replace(live.kept, chosen="control")
        return found

    with Client(edge.url) as client:
        begin(client, "met", interleaving=True)
        monkeypatch.setattr(edge.daemon.experiments, "assign", assign)
        rows = [{"user": "met", "age": i / 5} for i in range(4)]
        answer = client.predict("met", rows)["predictions"]
    assert sorted(row["rank"] for row in answer) == [1, 2, 3, 4]
    assert [row["arm"] for row in answer].count("control") == 2


def test_weights_change_under_load_and_every_unit_is_counted_once(edge: Any) -> None:
    with Client(edge.url) as client:
        begin(client, "shifting")
        for number in range(4):
            serve_units(client, "shifting", range(number * 200, number * 200 + 200))
            client.experiments.put(
                "shifting", {**SPEC, "arms": {"control": 4 + number, "treatment": 1}}
            )
        live = edge.daemon.experiments.find("shifting")
        assert len(live.records) == 800
        fresh = rebuilt(edge).find("shifting")
        assert fresh.state.exposed == live.state.exposed
        assert fresh.state.standing == live.state.standing


def outcome(unit: str, outcome_id: str, **values: Any) -> dict[str, Any]:
    return {"unit": unit, "id": outcome_id, "values": values}


def test_outcomes_of_units_count_once_can_be_corrected_and_survive_a_restart(edge: Any) -> None:
    metrics = [{"name": "revenue", "kind": "mean"}, {"name": "clicks", "kind": "ratio"}]
    with Client(edge.url) as client:
        begin(client, "shop", metrics=metrics)
        serve_units(client, "shop", range(250))
        sent = [
            outcome(f"u{i}", f"order-{k}", revenue=10.0 * k + i % 7, clicks=[k, k + 2])
            for i in range(250)
            for k in range(2)
        ]
        done = client.experiments.send_outcomes("shop", sent)
        assert done == {"accepted": 500, "replaced": 0, "rejected": []}
        first = client.experiments.get("shop")["result"]["comparisons"]
        assert [c["units"] for c in first] == [250, 250]
        again = client.experiments.send_outcomes("shop", sent[:100])
        assert (again["accepted"], again["replaced"]) == (100, 100)
        second = client.experiments.get("shop")["result"]["comparisons"]
        assert [c["value"] for c in second] == pytest.approx([c["value"] for c in first])
        wrong = outcome("u0", "order-1", revenue=1e6, clicks=[1, 2])
        client.experiments.send_outcomes("shop", [wrong])
        client.experiments.send_outcomes("shop", [outcome("u0", "order-1", revenue=4.0)])
    live = edge.daemon.experiments.find("shop")
    assert live.records["u0"].sums == ((4.0, 2.0), (0.0, 2.0))
    assert rebuilt(edge).find("shop").records == live.records


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (outcome("nobody", "1", label=1), "unknown_unit"),
        (outcome("u1", "1", revenue=1), "unknown_metric"),
        (outcome("u1", "1"), "unknown_metric"),
        (outcome("u1", "1", label=0.5), "invalid_outcome"),
        (outcome("u1", "1", label=None), "invalid_outcome"),
        (outcome("u1", "1", label=[1, 2]), "invalid_outcome"),
        (outcome("u1", "", label=1), "invalid_outcome"),
        (outcome("u1", "x" * 101, label=1), "invalid_outcome"),
        (outcome("u1", "a\x00b", label=1), "invalid_outcome"),
        (outcome("", "1", label=1), "invalid_outcome"),
        ({"unit": "u1", "id": 5, "values": {"label": 1}}, "invalid_outcome"),
        ({"unit": "u1", "values": {"label": 1}}, "invalid_outcome"),
        ({"unit": "u1", "id": "1", "values": 1}, "invalid_outcome"),
    ],
    ids=str,
)
def test_a_wrong_outcome_is_refused_alone_and_the_route_goes_on(
    edge: Any, row: dict[str, Any], code: str
) -> None:
    with Client(edge.url) as client:
        if "orders" not in client.experiments.list()["experiments"]:
            begin(client, "orders")
            serve_units(client, "orders", range(4))
        done = client.experiments.send_outcomes("orders", [row, outcome("u2", "1", label=1)])
        assert done["accepted"] == 1
        (refused,) = done["rejected"]
        assert (refused["index"], refused["code"]) == (0, code)
        assert refused["message"]
        assert len(serve_units(client, "orders", range(2))) == 2
    assert edge.daemon.experiments.find("orders").records["u2"].sums == ((1.0, 1.0),)


def test_outcomes_wait_until_units_are_known_again_and_go_with_an_erased_unit(edge: Any) -> None:
    daemon = edge.daemon
    with Client(edge.url) as client:
        begin(client, "private")
        serve_units(client, "private", range(6))
        client.experiments.send_outcomes("private", [outcome("u5", "1", label=1)])
        starting = UnitOutcomes(daemon.experiments, daemon.environment, daemon.writer)
        with pytest.raises(UnavailableError, match="read again after the start"):
            on_loop(edge, starting.record("private", []))
        receipt = client.erase("user", [{"user": "u5"}])
        assert receipt["outcomes"] >= 1
        with daemon.environment.snapshot() as snapshot:
            left = {split_key(key)[1] for key, _ in snapshot.scan(Table.UNITS)}
        assert "u5" not in left
