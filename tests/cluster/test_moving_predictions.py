"""What was served moves with its slots: predictions, labels, orphans, outcomes, and their sums."""

import asyncio
from collections.abc import Iterable
from typing import Any

import polars as pl
import pytest

from mlpd.client import Client
from mlpd.cluster.members import connections
from mlpd.cluster.moving import cancel, newest_map, pending
from mlpd.core.errors import ConflictError
from mlpd.core.shards import ShardMap
from mlpd.daemon.predictions import PredictionIds
from mlpd.daemon.served_check import check_served
from mlpd.daemon.served_pages import ServedSelection, read_page
from mlpd.storage.moved_keys import CHANGED, OUTCOMES, SEQUENCES, UNITS, read_keys
from mlpd.storage.tables import Table
from tests.cluster import moving as t

pytestmark = pytest.mark.timeout(300)

USER_AT = [{"user": f"u{i}", "age": i / 7} for i in range(40)]
SPEC: dict[str, Any] = {
    "unit": "user",
    "arms": {"control": 1, "treatment": 1},
    "metrics": [{"name": "label"}, {"name": "revenue", "kind": "mean", "covariate": "age"}],
    "planned_units": 100,
}


def serve(three: list[Any], trio: Any, m: Any, *, experiment: str | None = None) -> ShardMap:
    """Make a cluster that holds sales and serves the route person, maybe in an experiment."""
    made: ShardMap = m.give_map(three)
    for edge in three:
        with Client(edge.url) as client:
            client.apply(m.DOCUMENT)
    m.send_split(made, three, m.sale_columns())
    with Client(trio.single.url) as client:
        archive = client.models.archive("person", 1)
    for edge in three:
        m.serve_person(edge, archive)
        if experiment is not None:
            with Client(edge.url) as client:
                client.experiments.put(experiment, SPEC)
                arms = [{"name": name, "model": "person@1"} for name in SPEC["arms"]]
                route = {"service": "person", "arms": arms, "experiment": experiment}
                client.routes.put("person", route)
    return made


def predict(urls: list[str], rows: Iterable[dict[str, Any]] = USER_AT) -> list[str]:
    with Client(urls) as client:
        found = client.predict("person", list(rows))["predictions"]
        return [one["prediction_id"] for one in found]


def on_loop(edge: Any, work: Any) -> Any:
    return asyncio.run_coroutine_threadsafe(work, edge.loop).result(60)


def move(made: ShardMap, slots: Any, target: str, hook: t.Hook = lambda _: None) -> ShardMap:
    return t.move(made, slots, target, hook)[0]


def pages(edge: Any) -> pl.DataFrame:
    """All that a shard lists as served, but when it came there and what its log called it."""
    on_loop(edge, edge.daemon.predictions.settle())
    daemon = edge.daemon
    selection = ServedSelection(limit=10_000)
    found, _ = read_page(daemon.environment, daemon.paths.predictions, selection)
    return found.drop("position", "served_time", "sequence").sort("prediction_id")


def performance(edge: Any) -> Any:
    """All cohorts of the cluster: whoever is asked, the same."""
    with Client(edge.url) as client:
        found = client.performance("person")["cohorts"]
    return [one for one in found if one["period"] == "all"]


def own_cohorts(edge: Any) -> list[Any]:
    """What a shard adds to them."""
    found: list[Any] = on_loop(edge, edge.daemon.parts.give("performance", {"model": "person"}))
    return found


def consistency(edge: Any) -> dict[str, int]:
    with Client(edge.url) as client:
        found = client.run_consistency()
    return {
        name: found[name]
        for name in ("rows_compared", "values_compared", "mismatches", "unavailable")
    }


def nothing_left(edges: list[Any]) -> None:
    """No list of a move is there any more, and no shard holds what another one owns."""
    for edge in edges:
        owned = edge.daemon.ownership.member.flags
        with edge.daemon.environment.snapshot() as snapshot:
            for prefix in (CHANGED, SEQUENCES, UNITS, OUTCOMES, b"move/"):
                assert not list(read_keys(snapshot, prefix)), prefix
            for table in (Table.PREDICTIONS, Table.LABELS, Table.ONLINE, Table.TILES):
                assert all(owned[key[0] << 8 | key[1]] for key, _ in snapshot.scan(table))


def users_of(m: Any, made: ShardMap, shard: str) -> list[dict[str, Any]]:
    return [row for row in USER_AT if made.owner(m.slots_of_row(row)[0]).name == shard]


def test_predictions_labels_and_their_sums_go_along_and_come_back(
    three: Any, trio: Any, cluster_module: Any
) -> None:
    m, urls = cluster_module, [edge.url for edge in three]
    made = serve(three, trio, m)
    a, b, _ = three
    slots, users = made.slots_of("a"), users_of(m, made, "a")
    ids = predict(urls, users)
    on_loop(a, a.daemon.predictions.settle())
    assert on_loop(a, a.daemon.prediction_files.run())  # vectors of these lie in a file
    ids += predict(urls, users)
    orphan = PredictionIds().make(m.START_US, None, slots[0])
    with Client(urls) as client:
        client.feedback([{"prediction_id": n, "label": i % 2} for i, n in enumerate(ids[::2])])
        client.feedback([{"prediction_id": n, "label": 1} for n in ids[::4]])  # some are revised
        assert client.feedback([{"prediction_id": orphan, "label": 1}])["orphans"] == 1
    before, sums, audited = pages(a), performance(a), consistency(a)
    assert len(before) == len(ids) > 15
    assert audited["rows_compared"] == len(ids)
    assert (audited["mismatches"], audited["unavailable"]) == (0, 0)

    made = move(made, slots, "b")
    assert pages(b).equals(before)
    assert (performance(b), consistency(b)) == (sums, audited)
    assert performance(a) == sums
    assert (len(pages(a)), own_cohorts(a)) == (0, [])
    nothing_left(three)
    with Client(urls) as client:
        again = client.feedback([{"prediction_id": ids[0], "label": 1, "label_time": m.AT_US // 2}])
        assert again["rejected"][0]["code"] == "future_label"
        found = client.feedback([{"prediction_id": n, "label": 0} for n in ids[1::2]])
        assert found["joined"] == len(ids[1::2])
        assert client.feedback([{"prediction_id": orphan, "label": 1}])["orphans"] == 0
    ids += predict(urls, users)  # of b's own
    on_loop(b, b.daemon.predictions.settle())
    assert on_loop(b, b.daemon.prediction_files.run())  # which are what came, too
    before, sums, audited = pages(b), performance(b), consistency(b)
    assert audited["rows_compared"] == len(ids)
    assert (audited["mismatches"], audited["unavailable"]) == (0, 0)

    for target in ("a", "c", "a"):  # where a's lists and file still have what left it once
        source = next(edge for edge in three if len(pages(edge)))
        made = move(made, slots, target)
        edge = three["abc".index(target)]
        assert pages(edge).equals(before), target
        assert performance(edge) == sums, target
        assert pages(source).is_empty()
        nothing_left(three)
    on_loop(a, a.daemon.prediction_files.run())
    assert pages(a).equals(before)
    assert not check_served(a.daemon.environment, a.daemon.paths.predictions).problems


def test_units_of_experiments_keep_their_arms_outcomes_and_sums(
    three: Any, trio: Any, cluster_module: Any
) -> None:
    m, urls = cluster_module, [edge.url for edge in three]
    made = serve(three, trio, m, experiment="prices")
    a, b, _ = three
    slots, users = made.slots_of("a"), users_of(m, made, "a")
    ids = predict(urls, users) + predict(urls, users)
    outcomes = [
        {"unit": row["user"], "id": f"order-{i}", "values": {"revenue": row["age"] * i}}
        for row in users
        for i in range(3)
    ]
    with Client(a.url) as client, Client(urls) as split:
        split.feedback([{"prediction_id": n, "label": i % 3 == 0} for i, n in enumerate(ids)])
        assert client.experiments.send_outcomes("prices", outcomes)["accepted"] == len(outcomes)
        before = client.experiments.get("prices")
    records = dict(a.daemon.experiments.find("prices").records)
    assert len(records) == len(users)

    made = move(made, slots, "b")
    assert b.daemon.experiments.find("prices").records == records
    assert not a.daemon.experiments.find("prices").records
    with Client(b.url) as client, Client(a.url) as old:
        assert facts(client) == facts_of(before)
        assert facts(old) == facts_of(before)
        replaced = client.experiments.send_outcomes("prices", outcomes)
        assert (replaced["accepted"], replaced["replaced"]) == (len(outcomes), len(outcomes))
        assert old.experiments.send_outcomes("prices", outcomes[:1])["accepted"] == 0
        assert facts(client) == facts_of(before)
    nothing_left(three)
    with a.daemon.environment.snapshot() as snapshot:
        assert not snapshot.count(Table.UNITS)


def facts(client: Client) -> Any:
    return facts_of(client.experiments.get("prices"))


def facts_of(found: dict[str, Any]) -> Any:
    """Counts to the last unit, and values up to the rounding that another order brings."""
    result = found["result"]
    table = [
        (
            arm,
            of["units"],
            {k: (v["units"], round(v["value"], 12)) for k, v in of["metrics"].items()},
        )
        for phase in result["phases"]
        for arm, of in sorted(phase["arms"].items())
    ]
    return result["units"], result["units_moved"], result["units_switched"], table


def test_what_comes_during_a_move_comes_along(three: Any, trio: Any, cluster_module: Any) -> None:
    """Predictions, labels and outcomes between any two steps before the pause, and restarts."""
    m, urls = cluster_module, [edge.url for edge in three]
    made = serve(three, trio, m, experiment="prices")
    a, b, _ = three
    slots, users = made.slots_of("a"), users_of(m, made, "a")
    ids, paused = predict(urls, users), False
    number = 0

    def meanwhile(step: str) -> None:
        nonlocal paused, ids, number
        paused = paused or step == "before leave pause"
        if paused:
            return
        number += 1
        new = predict(urls, users[number % len(users) :][:2])
        with Client(urls) as client, Client(a.url) as there:
            labels = [{"prediction_id": n, "label": number % 2} for n in (*new, ids[number])]
            assert client.feedback(labels)["orphans"] == 0
            sent = {"unit": users[0]["user"], "id": f"o{number % 5}", "values": {"revenue": number}}
            there.experiments.send_outcomes("prices", [sent])
        ids += new

    def begin_again(step: str) -> None:
        meanwhile(step)
        if step == "after take take" and number > 6:
            raise t.Ended

    with pytest.raises(t.Ended):
        move(made, slots, "b", begin_again)
    taken = a.daemon.experiments.find("prices")
    move(made, slots, "b", meanwhile)
    assert number > 12
    assert sorted(pages(b)["prediction_id"].to_list()) == sorted(ids)
    labelled = pages(b).filter(pl.col("label").is_not_null())
    sums = performance(b)
    assert sum(one["predictions"] for one in sums) == len(ids)
    assert sum(one["labelled"] for one in sums) == len(labelled) > number
    assert not taken.records
    assert len(b.daemon.experiments.find("prices").records) == len(users)
    with Client(b.url) as client:
        assert facts(client)[0] == len(users)
    with b.daemon.environment.snapshot() as snapshot:
        assert snapshot.count(Table.UNITS) == min(number, 5)
    nothing_left(three)


def test_a_cancelled_move_leaves_all_where_it_was(
    three: Any, trio: Any, cluster_module: Any
) -> None:
    m, urls = cluster_module, [edge.url for edge in three]
    made = serve(three, trio, m, experiment="prices")
    a, b, _ = three
    users = users_of(m, made, "a")
    ids = predict(urls, users)
    with Client(urls) as client, Client(a.url) as there:
        client.feedback([{"prediction_id": n, "label": 1} for n in ids])
        sent = {"unit": users[0]["user"], "id": "o", "values": {"revenue": 7}}
        there.experiments.send_outcomes("prices", [sent])
    before, sums = pages(a), performance(a)

    def hook(step: str) -> None:
        if step == "before arrive seal":
            raise t.Ended

    with pytest.raises(t.Ended):
        move(made, made.slots_of("a"), "b", hook)
    assert pages(b).is_empty()  # they are there, and not looked at
    with b.daemon.environment.snapshot() as snapshot:
        assert snapshot.count(Table.PREDICTIONS) == len(ids)
        assert snapshot.count(Table.UNITS) == 1
    with connections("test") as connect:
        newest = newest_map(made, connect)
        for part in list(pending(newest, connect)):
            newest = cancel(newest, part, connect)
    assert (pages(a).equals(before), performance(a)) == (True, sums)
    assert (len(pages(b)), own_cohorts(b)) == (0, [])
    with b.daemon.environment.snapshot() as snapshot:
        assert not snapshot.count(Table.UNITS)
    nothing_left(three)
    ids += predict(urls, users)
    newest = move(newest, newest.slots_of("a"), "b")
    assert sorted(pages(b)["prediction_id"].to_list()) == sorted(ids)


def test_shards_that_differ_in_an_experiment_move_no_units_of_it(
    three: Any, trio: Any, cluster_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    m, urls = cluster_module, [edge.url for edge in three]
    made = serve(three, trio, m, experiment="prices")
    weights = {"arms": {"control": 1, "treatment": 3}}
    b = three[1]
    monkeypatch.setattr(b.daemon.experiments, "_fence", lambda _: None)  # as one that lags, or errs
    # Nobody takes part at a yet, so slots move.
    on_loop(b, b.daemon.experiments.put("prices", {**SPEC, **weights}, by="a test"))
    made = move(made, made.slots_of("a")[:10], "b")
    predict(urls, users_of(m, made, "a"))
    with pytest.raises(ConflictError) as raised:
        move(made, made.slots_of("a"), "b")
    assert (raised.value.code, bool(raised.value.hint)) == ("experiments_differ", True)
    with connections("test") as connect:
        for part in list(pending(made, connect)):
            made = cancel(newest_map(made, connect), part, connect)
    with Client(three[0].url) as client:
        client.experiments.put("prices", {**SPEC, **weights})
    made = move(made, made.slots_of("a"), "b")
    assert made.slots_of("a") == []
