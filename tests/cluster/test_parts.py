"""What members know of the same thing adds up to what one daemon knows that served it all."""

import random
from typing import Any

import numpy as np
import pytest

from mlpd.client import Client
from mlpd.core.errors import MlpdError
from mlpd.serving.shadow import ShadowPair

pytestmark = pytest.mark.timeout(200)  # the first test starts the trio and trains

ROUTE = {"service": "person", "arms": [{"model": "person@champion"}]}
EXPERIMENT = {
    "unit": "user",
    "arms": {"a": 1.0, "b": 1.0},
    "metrics": [
        {"name": "label", "kind": "mean", "covariate": "age"},
        {"name": "squared_error", "kind": "mean", "better": "lower"},
    ],
    "planned_units": 1000,
}
ARMS = [{"name": "a", "model": "person@1"}, {"name": "b", "model": "person@1"}]


def people(n: int) -> list[dict[str, Any]]:
    """Rows of some users, each always of the same age, as units are."""
    rng = random.Random(5)
    users = [f"p{i}" for i in range(n)]
    rows = [{"user": user, "age": rng.gauss(0, 1)} for user in users]
    return [*rows, *rng.sample(rows, n // 3)]


@pytest.fixture(scope="module")
def told(trio: Any, routed: Any, cluster_module: Any) -> dict[str, Any]:
    """The trio through its router, and the single daemon, have served and heard the same."""
    m, rng = cluster_module, random.Random(6)
    rows = people(700)
    labels = [rng.choice((0.0, 1.0)) for _ in rows]
    for url in (trio.single.url, routed.url):
        with Client(url) as client:
            client.experiments.put("ages", EXPERIMENT)
            client.routes.put("tried", {"service": "person", "arms": ARMS, "experiment": "ages"})
            m.catch_up(trio.shards)
            ids = []
            for start in range(0, len(rows), 100):
                found = client.predict("tried", rows[start : start + 100], at=m.AT_US)
                assert [p["error"] for p in found["predictions"] if "error" in p] == []
                ids += [p["prediction_id"] for p in found["predictions"]]
            given = [*zip(ids, labels, strict=True)]
            rng.shuffle(given)
            for start in range(0, len(given), 200):
                part = given[start : start + 200]
                sent = [{"prediction_id": i, "label": label} for i, label in part]
                answer = client.feedback(sent)
                assert answer["accepted"] == len(part), answer
            # some are corrected
            wrong = zip(ids[:50], labels, strict=False)
            client.feedback([{"prediction_id": i, "label": 1 - y} for i, y in wrong])
    return {"rows": len(rows)}


def ask_all(trio: Any, routed: Any, act: Any) -> tuple[Any, list[Any]]:
    """Ask the single daemon, the router, and each shard."""
    found = []
    for edge in (trio.single, routed, *trio.shards):
        with Client(edge.url) as client:
            found.append(act(client))
    return found[0], found[1:]


@pytest.mark.usefixtures("told")
def test_experiments_are_those_of_one_daemon_bit_for_bit(trio: Any, routed: Any) -> None:
    want, found = ask_all(trio, routed, lambda c: c.experiments.get("ages")["result"])
    assert want["units"] == 700
    assert want["comparisons"][0]["difference"] is not None
    assert want["comparisons"][0]["theta"] is not None
    for phase in (phase for result in (want, *found) for phase in result["phases"]):
        del phase["started_us"]
    assert found == [want] * 4
    own = trio.shards[0].call("POST", "/v1/cluster/parts", asked("experiment", name="ages"))[1]
    units = sum(n for _, _, n in own["part"]["state"]["exposed"])
    assert 0 < units < 700


def test_performance_is_that_of_one_daemon_bit_for_bit(
    trio: Any, routed: Any, told: dict[str, Any]
) -> None:
    def tried(client: Client) -> Any:
        cohorts = client.performance("person")["cohorts"]
        return sorted(
            (c for c in cohorts if c["route"] == "tried"), key=lambda c: (c["arm"], c["period"])
        )

    want, found = ask_all(trio, routed, tried)
    assert sum(c["predictions"] for c in want if c["period"] == "all") == told["rows"]
    assert all(c["performance"]["auc"] is not None for c in want)
    assert sum(c["revisions"] for c in want if c["period"] == "all") == 50
    for cohort in (cohort for cohorts in (want, *found) for cohort in cohorts):
        for name in ("delay_p50_s", "delay_p95_s", "mature"):  # labels came when they came
            del cohort[name]
    assert found == [want] * 4


def test_drift_is_that_of_one_daemon(trio: Any, routed: Any, told: dict[str, Any]) -> None:
    def window(client: Client) -> Any:
        (found,) = client.drift("person", route="tried")["windows"]
        return found

    want, found = ask_all(trio, routed, window)
    assert want["rows"] == told["rows"]
    for other in found:
        assert rounded(other) == rounded(want)
    with Client(routed.url) as client:
        drawn = client.drift_picture("person", "profile.amount", route="tried")
        assert drawn.startswith("<svg")
        with pytest.raises(MlpdError) as refused:
            client.drift("person", route="tried", reference="previous")
    assert refused.value.code in ("several_shards", "no_previous_version")


def rounded(value: Any, name: str = "") -> Any:
    """Everything is the same to the bit but moments of values, which shards round on their own."""
    if isinstance(value, dict):
        return {key: rounded(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item, name) for item in value]
    moments = ("mean", "deviation")
    return float(f"{value:.9g}") if isinstance(value, float) and name in moments else value


def test_shadows_are_those_of_one_daemon_bit_for_bit(trio: Any, routed: Any) -> None:
    rng = np.random.default_rng(7)
    scores = rng.random((2, 900, 1))
    scores[1, ::97] = np.nan
    pairs = [ShadowPair("tried", "person@1", "person@2"), ShadowPair("other", "x@1", "x@2")]
    for number, edge in enumerate((trio.single, *trio.shards)):
        rows = slice(None) if number == 0 else slice(number - 1, None, 3)
        runner = edge.daemon.shadows
        with runner._lock:
            runner._pair(pairs[0]).add(*scores[:, rows])
            if number in (0, 3):  # one that a single shard has served
                runner._pair(pairs[1]).add(*scores[:, 2::3])
    want, found = ask_all(trio, routed, lambda c: c.shadows()["shadows"])
    assert {pair["route"]: (pair["n"], pair["not_finite"]) for pair in want} == {
        "tried": (890, 10),
        "other": (297, 3),
    }
    for other in found:
        by_route = {pair["route"]: pair for pair in other}
        for pair in want:
            theirs = by_route.pop(pair["route"])
            assert theirs == pair
        assert not by_route


def test_audits_add_up(trio: Any, routed: Any, told: dict[str, Any]) -> None:
    with Client(routed.url) as client:
        found = client.run_consistency()
        assert found["mismatches"] == 0
        assert found["rows_compared"] >= told["rows"]
        last = client.consistency()["last"]
    shards = [edge.daemon.audit.last() for edge in trio.shards]
    for name in ("rows_compared", "values_compared", "unavailable"):
        assert found[name] == last[name] == sum(shard[name] for shard in shards)
    assert all(shard["rows_compared"] for shard in shards)


def test_what_lacks_a_member_is_refused(
    tmp_path: Any, transform_cache: Any, cluster_module: Any
) -> None:
    m = cluster_module
    with m.serve_all(tmp_path / "up", 2, transform_cache) as up:
        with m.serve_all(tmp_path / "down", 1, transform_cache) as down:
            m.give_map([*up, *down])
            with Client(up[0].url) as client:
                client.apply(m.DOCUMENT)
                client.experiments.put("ages", EXPERIMENT)
                assert client.experiments.get("ages")["result"]["units"] == 0
        with Client(up[1].url) as client:
            with pytest.raises(MlpdError) as missing:
                client.experiments.get("ages")
            assert (missing.value.code, missing.value.details["shard"]) == ("part_missing", "c")
            assert client.experiments.history("ages")["events"]
            arms = {"a": 3.0, "b": 1.0}
            changed = client.experiments.put("ages", {**EXPERIMENT, "arms": arms})
            assert (len(changed["phases"]), changed["result"]) == (2, None)


def asked(what: str, **fields: Any) -> dict[str, Any]:
    return {"what": what, "fields": fields}
