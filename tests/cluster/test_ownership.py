"""A shard answers for its own slots alone, with the bits of a daemon that holds everything."""

import asyncio
import json
import threading
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mlpd import Entity, FeatureView
from mlpd.cli import main
from mlpd.client import Client
from mlpd.core.definitions import build_document
from mlpd.core.errors import (
    ConflictError,
    DefinitionError,
    MisdirectedError,
    MlpdError,
)
from mlpd.core.hashing import SLOTS
from mlpd.daemon.fsck_child import Findings, check_directory
from mlpd.storage.map_store import FileMapStore
from mlpd.storage.tables import Table

pytestmark = pytest.mark.timeout(300)  # the first test starts four daemons and trains

USER_AT = [{"user": f"u{i}", "age": 0.5} for i in range(40)]


def by_owner(m: Any, trio: Any, rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {"a": [], "b": [], "c": []}
    for row in rows:
        found[trio.shard_map.owner(m.slots_of_row(row)[0]).name].append(row)
    return found


def test_each_shard_reads_the_bits_that_one_daemon_would(trio: Any, cluster_module: Any) -> None:
    m = cluster_module
    for service, rows in (("person", USER_AT), ("place", [{"shop": i} for i in m.SHOPS])):
        for name, mine in by_owner(m, trio, rows).items():
            assert mine, "no keys on this shard: the test says nothing of it"
            asked = {"entities": mine, "at": m.AT_US}
            with Client(trio.single.url) as one, Client(trio.at(name).url) as shard:
                want, found = (c.read_features(service, **asked) for c in (one, shard))
            for part in ("columns", "statuses", "event_times"):
                assert found[part] == want[part]
            assert any(v is not None for values in want["columns"].values() for v in values)


def test_joins_and_predictions_are_those_of_one_daemon(trio: Any, cluster_module: Any) -> None:
    m, name = cluster_module, "b"
    mine = by_owner(m, trio, USER_AT)[name]
    spine = [{**row, "event_time": m.START_US + 40 * 3_600_000_000} for row in mine]
    with Client(trio.single.url) as one, Client(trio.at(name).url) as shard:
        assert shard.history("person", spine=spine).equals(one.history("person", spine=spine))
        asked: dict[str, Any] = {"at": m.AT_US, "include": ["vector"]}
        want, found = (c.predict("person", mine, **asked)["predictions"] for c in (one, shard))
    for part in ("score", "vector"):
        assert (
            np.array([p[part] for p in found]).tobytes()
            == np.array([p[part] for p in want]).tobytes()
        )
    for prediction in found:  # where its label will be sent
        slot = int(prediction["prediction_id"][16:20], 16)
        assert trio.shard_map.owner(slot).name == name


def post(url: str, path: str, body: Any) -> tuple[int, Any]:
    """Ask one daemon, as a client that knows of no shards does."""
    head = {"Content-Type": "application/json"}
    asked = urllib.request.Request(url + path, json.dumps(body).encode(), head)
    try:
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_what_another_shard_owns_is_refused_with_its_place(trio: Any, cluster_module: Any) -> None:
    m = cluster_module
    theirs = by_owner(m, trio, USER_AT)["b"][0]
    event = {"event_time": 1, "known_at": 1, "user": theirs["user"]}
    label = {"prediction_id": f"{1:016x}{trio.shard_map.slots_of('b')[0]:04x}{1:012x}", "label": 1}
    spine = [{**theirs, "event_time": 1, "sequence": 1}]
    join = {"service": "person", "entities": spine, "mode": "as_of_sequence"}
    calls = {
        "/v1/features/read": {"service": "person", "entities": [theirs]},
        "/v1/features/history": join,
        "/v1/predict/person": {"rows": [theirs]},
        "/v1/events/sales": {"rows": [event]},
        "/v1/events/notes": {"rows": [{"event_time": 1, "text": "x"}]},
        "/v1/feedback": {"labels": [label]},
    }
    keyless = trio.shard_map.owner(6924).name
    with Client(trio.at("a").url) as client:
        before = client.status()["sequence"]
        for path, body in calls.items():
            owner = keyless if path == "/v1/events/notes" else "b"
            if owner == "a":
                continue
            status, answer = post(trio.at("a").url, path, body)
            error, details = answer["error"], answer["error"]["details"]
            assert (status, error["code"]) == (421, "wrong_shard"), path
            assert (details["shard"], details["epoch"]) == (owner, 1), path
            assert details["url"] == trio.at(owner).url
            assert trio.shard_map.owner(details["slot"]).name == owner
        assert client.status()["sequence"] == before


def test_rows_without_a_key_and_services_without_views_are_anybodys(trio: Any) -> None:
    for edge in trio.shards:
        with Client(edge.url) as client:
            found = client.read_features("person", entities=[{"user": None, "age": 1.0}])
            assert found["columns"]["profile.amount"] == [None]
            assert client.read_features("bare", entities=[{"age": 1.0}])["columns"]


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"x-mlpd-epoch": "0"}, 421, "stale_epoch"),
        ({"x-mlpd-epoch": "2"}, 503, "map_behind"),
        ({"x-mlpd-epoch": "1", "x-mlpd-routing": "0" * 32}, 421, "stale_routing"),
        ({"x-mlpd-epoch": "1"}, 421, "stale_routing"),
        ({"x-mlpd-epoch": "-1"}, 400, "invalid_epoch"),
        ({"x-mlpd-epoch": "9" * 400}, 400, "invalid_epoch"),
        ({"x-mlpd-epoch": "\u0661"}, 400, "invalid_epoch"),
    ],
    ids=str,
)
def test_events_of_a_sender_with_another_map_are_refused(
    trio: Any, cluster_module: Any, headers: dict[str, str], status: int, code: str
) -> None:
    mine = by_owner(cluster_module, trio, USER_AT)["a"][0]
    body = {"rows": [{"event_time": 1, "user": mine["user"]}]}
    encoded = {name: value.encode().decode("latin-1") for name, value in headers.items()}
    found, answer, _ = trio.at("a").call("POST", "/v1/events/sales", body, encoded)
    assert (found, answer["error"]["code"]) == (status, code), answer


def test_old_maps_may_read_but_not_change(trio: Any, cluster_module: Any) -> None:
    mine = by_owner(cluster_module, trio, USER_AT)["a"][:1]
    old, edge = {"x-mlpd-epoch": "0"}, trio.at("a")
    body: dict[str, Any] = {"service": "person", "entities": mine}
    assert edge.call("POST", "/v1/features/read", body, old)[0] == 200
    assert edge.call("POST", "/v1/predict/person", {"rows": mine}, old)[0] == 421
    assert edge.call("POST", "/v1/feedback", {"labels": []}, old)[0] == 421
    new = {"x-mlpd-epoch": "2"}
    assert edge.call("POST", "/v1/features/read", body, new)[0] == 503
    # A daemon that lost its map, restored from a backup say, is behind everybody.
    assert trio.single.call("POST", "/v1/features/read", body, {"x-mlpd-epoch": "1"})[0] == 503


def test_a_reproduction_needs_all_events(trio: Any) -> None:
    with Client(trio.shards[0].url) as client, pytest.raises(ConflictError) as refused:
        client.models.reproduce("person", 1)
    assert refused.value.code == "several_shards"


def test_a_view_of_a_new_entity_is_refused_where_there_are_events(
    trio: Any, cluster_module: Any
) -> None:
    m = cluster_module
    by_both = Entity("pair", {"user": "string", "shop": "int64"})
    wanted = build_document([*m.OBJECTS, by_both, FeatureView("p", by_both, m.sales, ["amount"])])
    fine = build_document([*m.OBJECTS, FeatureView("more", m.user, m.sales, ["bought"])])
    with Client(trio.shards[0].url) as client:
        for act in (client.plan, client.apply):
            with pytest.raises(MlpdError) as refused:
                act(wanted)
            assert refused.value.code == "new_entity"
            assert refused.value.status == DefinitionError.status
        assert client.plan(fine)["backfill"].keys() == {"more"}
    with Client(trio.single.url) as client:
        assert client.plan(wanted)["backfill"].keys() == {"p"}


def test_views_built_later_have_what_is_owned(three: Any, cluster_module: Any) -> None:
    m = cluster_module
    made = m.give_map(three)
    for edge in three:
        with Client(edge.url) as client:
            client.apply(m.DOCUMENT)
    sent = m.send_split(made, three, m.sale_columns(400))
    assert sum(sent) > 400  # events of two entities are on two shards
    assert max(sent) < 400
    more = build_document([*m.OBJECTS, FeatureView("more", m.shop, m.sales, ["amount"])])
    shops = 0
    for shard, edge in zip(made.shards, three, strict=True):
        with Client(edge.url) as client:
            client.apply(more)
        view_id = edge.daemon.state.catalog.views["more"].view_id.to_bytes(4, "big")
        with edge.daemon.environment.snapshot() as snapshot:
            keys = [key for key, _ in snapshot.scan(Table.ONLINE)]
        assert {made.owner(int.from_bytes(key[:2], "big")) for key in keys} == {shard}
        shops += sum(key[2:6] == view_id for key in keys)
    assert shops == len(m.SHOPS)


def check(directory: Any) -> Findings:
    found = Findings()
    check_directory(directory, found, online=False, deep=True, send=lambda _: None)
    return found


def test_the_deep_check_replays_what_is_owned(
    tmp_path: Any, transform_cache: Any, cluster_module: Any
) -> None:
    m = cluster_module
    with m.serve_all(tmp_path, 2, transform_cache) as running:
        made = m.give_map(running)
        for edge in running:
            with Client(edge.url) as client:
                client.apply(m.DOCUMENT)
        m.send_split(made, running, m.sale_columns(200))
        directory = running[0].daemon.paths
    found = check(directory)
    assert found.problems == []
    assert found.checked["replay"]["events"] > 0
    (directory.root / "cluster.json").unlink()  # as if it owned everything
    assert {p["code"] for p in check(directory).problems} == {"replay_differs"}


def test_a_restored_shard_is_that_shard(
    tmp_path: Any, transform_cache: Any, cluster_module: Any
) -> None:
    m, backup, restored = cluster_module, tmp_path / "backup", tmp_path / "restored"
    with m.serve_all(tmp_path, 2, transform_cache) as running:
        made = m.give_map(running)
        for edge in running:
            with Client(edge.url) as client:
                client.apply(m.DOCUMENT)
        m.send_split(made, running, m.sale_columns(100))
        with Client(running[1].url) as client:
            client.backup(str(backup))
    done = CliRunner().invoke(main, ["restore", str(backup), "--data-dir", str(restored)])
    assert done.exit_code == 0, done.output
    found = FileMapStore(restored).load()
    assert found is not None
    assert (found.shard, found.shard_map) == ("b", made)


def refusal(client: Client, value: Any, shard: str, expected: int) -> str:
    with pytest.raises(MlpdError) as refused:
        client.cluster.put_map(value, shard=shard, expected=expected)
    return refused.value.code


def test_which_maps_a_daemon_takes(three: Any, cluster_module: Any) -> None:
    m = cluster_module
    made = m.map_of(three)
    with Client(three[0].url) as client:
        empty = {"shard": None, "epoch": 0, "digest": None, "map": None}
        assert client.cluster.map() == empty
        assert refusal(client, {"epoch": 1}, "a", 0) == "invalid_map"
        assert refusal(client, made.to_dict(), "z", 0) == "unknown_shard"
        assert refusal(client, made.to_dict(), "a", 1) == "epoch_moved"
        client.cluster.put_map(made.to_dict(), shard="a", expected=0, dry_run=True)
        assert client.cluster.map() == empty
        taken = client.cluster.put_map(made.to_dict(), shard="a", expected=0)
        assert taken == client.cluster.map()
        assert (taken["shard"], taken["epoch"], taken["digest"]) == ("a", 1, made.digest)
        assert client.cluster.put_map(made.to_dict(), shard="a", expected=0) == taken  # again
        other = m.map_of(three, cluster="aa" * 16).next(made.shards, made.owners)
        assert refusal(client, other.to_dict(), "a", 1) == "other_cluster"
        assert refusal(client, made.to_dict(), "b", 1) == "other_shard"
        turned = made.next(made.shards, made.owners[::-1])
        assert refusal(client, turned.to_dict(), "a", 1) == "slots_not_moved"
        renamed = made.next(made.shards[:2], [min(o, 1) for o in made.owners])
        assert client.cluster.put_map(renamed.to_dict(), shard="a", expected=1)["epoch"] == 2
        assert refusal(client, made.to_dict(), "a", 2) == "older_map"
    with Client(three[1].url) as client:
        client.apply(m.DOCUMENT)
        client.events.send("notes", [{"event_time": 1, "text": "one"}])
        assert refusal(client, made.to_dict(), "b", 0) == "slots_hold_data"
        with pytest.raises(ConflictError, match="holds events"):
            client.cluster.put_map(made.to_dict(), shard="b", expected=0, dry_run=True)
        whole = made.next(made.shards, (1,) * SLOTS)
        assert client.cluster.put_map(whole.to_dict(), shard="b", expected=0)["epoch"] == 2
        client.events.send("notes", [{"event_time": 1, "text": "two"}])  # it owns everything still


def test_a_map_outlives_a_restart(serve_process: Any, cluster_module: Any) -> None:
    m = cluster_module
    with Client(serve_process.url) as client:
        made = m.first_map("0f" * 16, [m.Shard("a", serve_process.url), m.Shard("b", "http://x:1")])
        taken = client.cluster.put_map(made.to_dict(), shard="a", expected=0)
        client.apply(m.DOCUMENT)
    serve_process.kill()
    serve_process.start()
    with Client(serve_process.url) as client:
        assert client.cluster.map() == taken
    asked = {"service": "place", "entities": [{"shop": i} for i in range(50)]}
    assert post(serve_process.url, "/v1/features/read", asked)[0] == 421


def test_a_map_that_comes_between_the_check_and_the_write_refuses_the_write(
    three: Any, cluster_module: Any
) -> None:
    """The events wait behind the map in the writer's queue."""
    m, edge = cluster_module, three[0]
    made = m.map_of(three)
    with Client(edge.url) as client:
        client.apply(m.DOCUMENT)
    held, let = threading.Event(), threading.Event()

    def hold(_: Any) -> None:
        held.set()
        let.wait(20)

    async def race() -> list[Any]:
        holding = asyncio.ensure_future(edge.daemon.writer.write(hold))
        await asyncio.to_thread(held.wait, 20)
        first = asyncio.ensure_future(edge.daemon.ownership.install(made.to_dict(), "a", 0))
        while not edge.daemon.writer.queued_entries:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)
        source = edge.daemon.state.catalog.definitions.source("sales")
        batch = m.parse_batch(source, {"event_time": [1], "user": ["u1"]}, now_us=m.START_US)
        checked = edge.daemon.ownership.check_events([batch], m.Sender())
        assert checked is None
        second = asyncio.ensure_future(edge.daemon.ingest.ingest([batch], None, checked))
        await asyncio.sleep(0.05)
        let.set()
        return await asyncio.gather(holding, first, second, return_exceptions=True)

    done = asyncio.run_coroutine_threadsafe(race(), edge.loop).result(30)
    assert done[1]["epoch"] == 1
    assert isinstance(done[2], MisdirectedError)
    assert done[2].code == "stale_epoch"
