"""Followers: everything that an owner does comes to them, byte for byte; and what they answer."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from mlpd.client import Client
from mlpd.core.definitions import build_document
from mlpd.core.errors import (
    ConfigurationError,
    ConflictError,
    MisdirectedError,
    NotFoundError,
    UnavailableError,
)
from mlpd.core.time import system_clock
from mlpd.daemon.fsck import check_stopped
from mlpd.daemon.replica_watch import ReplicaLook
from mlpd.storage.tables import Table
from tests.cluster import moving as t
from tests.cluster.replicas import (
    Node,
    differences,
    eventually,
    files_of,
    make_map,
    nodes,
    tables_of,
    write_replicas,
)

pytestmark = pytest.mark.timeout(180)


def sales(count: int, start: int = 0) -> list[dict[str, Any]]:
    now_us = time.time_ns() // 1000
    return [
        {"at": now_us - 10**6 + i, "n": i, "user": t.USERS[i % 30], "shop": t.SHOPS[i * 7 % 29]}
        for i in range(start, start + count)
    ]


def fill(owner: Node) -> None:
    make_map({"a": owner.url})
    with Client(owner.url) as client:
        client.apply(t.DOCUMENT)
        client.events.send("sales", sales(50))


def parquets(node: Node) -> set[str]:
    return {path.name for path in (node.directory / "segments").rglob("*.parquet")}


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[Node]]:
    """An owner, shard a of one, and a node that doesn't run yet."""
    with nodes(tmp_path, 2) as made:
        fill(made[0].start())
        yield made


def test_what_an_owner_does_comes_to_its_follower_byte_for_byte(pair: list[Node]) -> None:
    owner, follower = pair
    follower.start(owner.url)
    assert [line.split()[0] for line in follower.told] == ["taking", "fetching", "checking"]
    with Client(owner.url) as client:
        for i in range(20):
            client.events.send("sales", sales(7, 100 * i), idempotency_key=f"k{i}")
        client.apply(t.SMALLER)
        client.apply(t.DOCUMENT)
        client.events.send("sales", sales(3000))
        assert not differences(owner, follower)
        for _ in range(2):
            assert owner.do(lambda daemon: daemon.compactor.run())
            client.events.send("sales", sales(30))
        assert not differences(owner, follower)
        assert parquets(follower)
        assert client.erase("user", [{"user": "u3"}])["sources"]["sales"]["rows"] > 0
        assert not differences(owner, follower)
        eventually(lambda: parquets(follower) == parquets(owner))
    follower.stop()
    owner.stop()
    report = check_stopped(follower.directory, system_clock, deep=True)
    assert report["clean"], report


def test_a_follower_reads_as_its_owner_and_leaves_everything_else_to_it(pair: list[Node]) -> None:
    owner, follower = pair
    follower.start(owner.url)
    ask = {"service": "users", "entities": [{"user": "u1"}, {"user": "nobody"}]}
    with Client(owner.url) as ours, Client(follower.url) as theirs:
        sent = ours.events.send("sales", sales(10))
        want = ours.read_features("users", entities=ask["entities"])
        found = theirs.read_features(
            "users", entities=ask["entities"], min_sequence=sent["sequence"]
        )
        assert found["columns"] == want["columns"]
        assert found["sequence"] == sent["sequence"]
        with pytest.raises(MisdirectedError) as caught:
            theirs.apply(t.SMALLER)
        assert caught.value.code == "follower"
        assert caught.value.details["url"] == owner.url
        # Where the client may go elsewhere, it does.
        assert theirs.events.send("sales", sales(1))["sequence"] == sent["sequence"] + 1
        assert theirs.cluster.routing() == ours.cluster.routing()
        assert ours.cluster.role()["followers"][0]["url"] == follower.url


@dataclass
class Answer:
    status: int
    staleness: str
    error: Any


def post(node: Node, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Answer:
    connection = HTTPConnection(node.url.removeprefix("http://"), timeout=20)
    sent = {"Content-Type": "application/json", **(headers or {})}
    connection.request("POST", path, json.dumps(body), sent)
    answer = connection.getresponse()
    found = json.loads(answer.read())
    connection.close()
    return Answer(answer.status, answer.headers.get("x-mlpd-staleness-ms", ""), found.get("error"))


def read(node: Node, max_staleness_ms: str, **fields: Any) -> Answer:
    """Read a user, as stale as is said."""
    body = {"service": "users", "entities": [{"user": "u1"}], **fields}
    headers = {"x-mlpd-max-staleness-ms": max_staleness_ms}
    return post(node, "/v1/features/read", body, headers)


def test_a_reader_says_how_stale_an_answer_may_be(pair: list[Node]) -> None:
    owner, follower = pair
    follower.start(owner.url)
    eventually(lambda: follower.role()["staleness_ms"] is not None)
    found = read(follower, "30000")
    assert (found.status, found.staleness.isdecimal()) == (200, True)
    assert read(owner, "0").staleness == ""
    assert read(follower, "-1").error["code"] == "invalid_staleness"
    sequence = owner.role()["sequence"]
    eventually(lambda: follower.role()["sequence"] == sequence)
    owner.stop()
    eventually(lambda: follower.role()["staleness_ms"] > 100)
    found = read(follower, "100")
    assert (found.status, found.error["code"]) == (503, "replica_behind")
    assert found.error["details"]["staleness_ms"] > 100
    assert read(follower, "100", min_sequence=sequence).status == 200
    assert read(follower, "100", min_sequence=sequence + 1).status == 503
    assert read(follower, "600000").status == 200
    assert follower.role()["trouble"]
    follower.stop()
    follower.start()  # what the directory is, it stays; the owner is still away
    found = read(follower, "600000")
    assert (found.status, found.error["code"]) == (503, "replica_behind")
    found = read(follower, "100", min_sequence=sequence)
    assert (found.status, found.staleness) == (200, "unknown")


def test_restarts_of_either_go_on_where_they_were(pair: list[Node]) -> None:
    owner, follower = pair
    follower.start(owner.url)
    for turn in range(2):
        stopped = (follower, owner)[turn]
        stopped.stop()
        if stopped is follower:
            with Client(owner.url) as client:
                client.events.send("sales", sales(500))
        stopped.start()
        with Client(owner.url) as client:
            client.events.send("sales", sales(5))
        assert not differences(owner, follower)
    assert len(follower.told) == 3  # one backup alone


def test_one_that_was_away_for_longer_than_the_feed_starts_again(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, feed_bytes=200_000) as (owner, follower):
        fill(owner.start())
        follower.start(owner.url)
        follower.stop()
        with Client(owner.url) as client:
            for _ in range(12):
                client.events.send("sales", sales(200))
            owner.do(lambda daemon: daemon.compactor.run())
            follower.start()
            eventually(lambda: follower.role()["sequence"] == owner.role()["sequence"])
            client.events.send("sales", sales(5))
        assert not differences(owner, follower)
        assert follower.told[:1] == [f"taking a backup of {owner.url}"]


def test_files_that_were_replaced_before_they_were_fetched_make_it_start_again(
    pair: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlpd.cluster.replica.beside.AGAIN_S", 0.1)
    owner, follower = pair
    follower.start(owner.url)
    follower.stop()
    owner.do(lambda daemon: daemon.compactor.run())
    (path,) = (owner.directory / "segments").rglob("*.parquet")
    path.rename(path.with_suffix(".hidden"))
    follower.start()
    eventually(lambda: any("tried again" in line for line in follower.told))
    path.with_suffix(".hidden").rename(path)
    assert not differences(owner, follower)
    with Client(follower.url) as client:
        assert client.read_features("users", entities=[{"user": "u1"}])["columns"]


def test_bad_beginnings_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    with nodes(tmp_path, 3) as (owner, follower, other):
        owner.start()
        with pytest.raises(ConflictError) as caught:
            follower.start(owner.url)
        assert caught.value.code == "no_cluster"
        assert "init" in caught.value.hint
        assert not list(tmp_path.glob("*.fetching"))
        with pytest.raises(UnavailableError):
            follower.start("http://127.0.0.1:9")
        fill(owner)
        fill(other.start())
        other.stop()
        with pytest.raises(ConflictError) as caught:
            other.start(owner.url)
        assert caught.value.code == "holds_data"
        other.start(owner.url, discard=True)
        assert other.role()["role"] == "follower"
        assert not differences(owner, other)
        with pytest.raises(MisdirectedError), Client(other.url) as client:
            client.cluster.snapshot()  # a follower has none
        with Client(owner.url) as client:
            for path in (
                "lmdb/data.mdb",
                "segments/../role.json",
                "/etc/passwd",
                "segments/x",
                "\0",
            ):
                with pytest.raises(NotFoundError):
                    client.cluster.file(path, 0)
            with pytest.raises(ConflictError) as caught:
                client.cluster.feed("00" * 32, follower="x")
            assert caught.value.code == "feed_gone"


def test_predictions_labels_models_and_routes_come_along(
    tmp_path: Path, trio: Any, cluster_module: Any
) -> None:
    m = cluster_module
    with Client(trio.single.url) as client:
        archive = client.models.archive("person", 1)
    rows = [{"user": user, "age": 0.5} for user in m.USERS]
    with nodes(tmp_path, 2) as (owner, follower):
        owner.start()
        make_map({"a": owner.url})
        with Client(owner.url) as client:
            client.apply(build_document([m.user, m.shop, m.sales, m.profile, m.spend, m.person]))
            client.events.send("sales", m.sale_columns(100))
            follower.start(owner.url)
            client.models.adopt(archive)
            client.models.move_alias("person", "champion", 1)
            route = {"service": "person", "arms": [{"model": "person@champion"}]}
            client.routes.put("person", route)
            made = client.predict("person", rows)
            ids = [row["prediction_id"] for row in made["predictions"]]
            client.feedback([{"prediction_id": i, "label": 1} for i in ids[:7]])
            owner.do(flush)
            assert not differences(owner, follower)
        held = tables_of(follower)
        assert len(held[Table.PREDICTIONS]) == len(rows)
        assert len(held[Table.LABELS]) == 7
        assert any(path.startswith("registry/blobs") for path in files_of(follower))
        answer = post(follower, "/v1/predict/person", {"rows": rows[:1]})
        assert (answer.status, answer.error["code"]) == (421, "follower")


async def flush(daemon: Any) -> None:
    daemon.predictions.flush()
    await daemon.writer.write(lambda _: None)


def test_a_feed_that_nobody_reads_for_a_day_ends(
    pair: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, _ = pair
    with Client(owner.url) as client:
        client.cluster.forget_snapshot(client.cluster.snapshot()["snapshot"])
        client.events.send("sales", sales(1))
        owner.do(lambda daemon: daemon.feeding.rest())
        assert list((owner.directory / "feed").iterdir())
        monkeypatch.setattr("mlpd.daemon.feeding.IDLE_S", 0.0)
        owner.do(lambda daemon: daemon.feeding.rest())
        assert not (owner.directory / "feed").exists()
        client.events.send("sales", sales(1))


def test_two_followers_each_have_all(tmp_path: Path) -> None:
    with nodes(tmp_path, 3) as (owner, *followers):
        fill(owner.start())
        for follower in followers:
            follower.start(owner.url)
        with Client(owner.url) as client:
            for _ in range(5):
                client.events.send("sales", sales(20))
        for follower in followers:
            assert not differences(owner, follower)


def test_clients_and_routers_read_from_followers_where_that_is_allowed(
    tmp_path: Path, cluster_module: Any
) -> None:
    with nodes(tmp_path, 3) as (first, owner, follower):
        for node in (first, owner):
            node.start()
        make_map({"a": first.url, "b": owner.url})
        urls = [first.url, owner.url]
        for node in (first, owner):
            with Client(node.url) as client:
                client.apply(t.DOCUMENT)
        follower.start(owner.url)
        write_replicas(first.url, "b", [follower.url])
        entities = [{"user": user} for user in t.USERS]
        with (
            Client(urls, timeout_s=10) as plain,
            Client(urls, timeout_s=10, max_staleness_s=600) as lenient,
            Client(urls, timeout_s=10, max_staleness_s=0) as strict,
            cluster_module.serve_router(urls, max_staleness_s=600.0) as router,
            Client(router.url, timeout_s=10) as routed,
        ):
            plain.events.send("sales", sales(90))
            want = plain.read_features("users", entities=entities)["columns"]
            assert not differences(owner, follower)
            for client in (lenient, strict, routed):
                assert client.read_features("users", entities=entities)["columns"] == want
            owner.stop()
            for client in (lenient, routed):
                assert client.read_features("users", entities=entities)["columns"] == want
            for client in (plain, strict):
                found = client.read_features("users", entities=entities)
                assert {error["code"] for error in found["errors"]} == {"unreachable"}
        with pytest.raises(ConfigurationError):
            Client(urls, max_staleness_s=-1)


def test_lag_is_a_metric_of_both_and_an_alert_of_the_owner(
    pair: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, follower = pair
    follower.start(owner.url)
    write_replicas(owner.url, "a", [follower.url])
    with Client(owner.url) as ours, Client(follower.url) as theirs:
        ours.events.send("sales", sales(3))
        assert not differences(owner, follower)
        text = theirs.metrics()
        assert "mlpd_replica_lag_rows 0" in text
        assert 'mlpd_role{role="follower"} 1' in text
        line = f'mlpd_replica_follower_lag_rows{{follower="{follower.url}"}} 0'
        eventually(lambda: line in ours.metrics())
    now_s = [100.0]
    look = ReplicaLook(owner.daemon.roles, owner.daemon.feeding, 30.0, lambda: now_s[0])
    (found,) = look.measure()
    assert found.value < found.threshold == 30.0
    follower.stop()
    monkeypatch.setattr("mlpd.daemon.feeding.RECENT_S", 0.0)
    look.measure()
    now_s[0] += 31.0
    (found,) = look.measure()
    assert found.value == 31.0
    assert found.text == f"the follower at {follower.url} isn't heard of"
    write_replicas(owner.url, "a", [])
    assert not look.measure()
