"""`mlpd shard move` and its kin on real daemons: says what it does; refuses before it moves."""

import asyncio
import json
import random
import shutil
import time
from collections import Counter, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlpd import Aggregate, FeatureService, Source, WindowView
from mlpd.cli.main import main
from mlpd.client import Client
from mlpd.client.operations import Cluster
from mlpd.cluster import membership
from mlpd.cluster.leftovers import forget, leftovers
from mlpd.cluster.members import connections
from mlpd.cluster.membership import remove_member
from mlpd.cluster.moving import spread
from mlpd.core.definitions import build_document
from mlpd.core.errors import ConflictError, NotFoundError, UnavailableError
from mlpd.core.hashing import slot_of
from mlpd.core.keys import encode_texts
from mlpd.core.shards import Shard, ShardMap
from mlpd.daemon import leaving
from mlpd.daemon.following import Following
from mlpd.storage.tables import Table
from tests.cluster import moving as t
from tests.cluster.test_moving import check_deep
from tests.conftest import PROFILE

pytestmark = pytest.mark.timeout(300)
Run = Callable[..., Result]


@pytest.fixture
def mlpd(three: Any) -> Run:
    runner = CliRunner(env={"COLUMNS": "200", "MLPD_URL": three[0].url})
    return lambda *words: runner.invoke(main, [str(word) for word in words])


@pytest.fixture
def two(three: Any, cluster_module: Any) -> ShardMap:
    """A cluster of a and b with sales; the third daemon is empty and alone."""
    made: ShardMap = cluster_module.give_map(three[:2])
    for edge in three[:2]:
        with Client(edge.url) as client:
            client.apply(t.DOCUMENT)
    with Client([edge.url for edge in three[:2]]) as client:
        rows = [
            {"at": time.time_ns() // 1000 - i, "n": 1, "user": t.USERS[i % 30], "shop": "s"}
            for i in range(60)
        ]
        client.events.send("sales", rows)
    return made


def test_a_move_is_told_asked_for_and_done(three: Any, two: ShardMap, mlpd: Run) -> None:
    dry = mlpd("shard", "move", "0-99 200", "--to", "b", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "101 slots with" in dry.output
    assert "Nothing was changed." in dry.output
    assert t.map_at(three[1].url) == two
    asked = mlpd("shard", "move", "0-99 200", "--to", "b")
    assert (asked.exit_code, "add --yes" in asked.output) == (2, True)
    assert t.map_at(three[1].url) == two
    done = mlpd("shard", "move", "0-99 200", "--to", "b", "--yes")
    assert done.exit_code == 0, done.output
    assert "Moved 101 slots" in done.output
    again = mlpd("shard", "move", "0-99 200", "--to", "b", "--yes", "--json")
    assert json.loads(again.output)["moved"] == []
    assert "Nothing is to be moved." in mlpd("shard", "move", "0-99", "--to", "b", "--yes").output
    everything = json.loads(mlpd("shard", "drain", "b", "--yes", "--json").output)
    assert everything["slots"] == 8192 + 101
    assert sum(one["events"] for one in everything["moved"]) > 0
    assert t.map_at(three[1].url).slots_of("b") == []
    assert mlpd("shard", "rebalance", "--yes").exit_code == 0
    assert len(t.map_at(three[0].url).slots_of("b")) == 8192
    status = json.loads(mlpd("shard", "status", "--json").output)
    assert status["moves"] == []
    assert "None moves." in mlpd("shard", "cancel").output


def test_an_import_that_no_source_knows_of_is_cancelled(
    three: Any, two: ShardMap, mlpd: Run
) -> None:
    """A request to begin that comes late, after its move was cancelled."""
    a, b = (edge.url for edge in three[:2])
    with Client(a) as source, Client(b) as target:
        definitions = source.cluster.survey("0-9")["definitions"]
        late = {"slots": "0-9", "shard": "a", "definitions": definitions}
        target.cluster.arrive("begin", "late", **late)
    refused = mlpd("shard", "move", "20-29", "--to", "b", "--yes")
    assert "[move_under_way]" in refused.output
    cancelled = json.loads(mlpd("shard", "cancel", "--yes", "--json").output)
    assert [(one["slots"], one["to"]) for one in cancelled["cancelled"]] == [("0-9", "b")]
    assert cancelled["epoch"] == two.epoch
    moved = mlpd("shard", "move", "20-29", "--to", "b", "--yes")
    assert moved.exit_code == 0, moved.output


def test_a_move_under_way_is_no_leftover_and_neither_is_one_of_a_source_that_is_down(
    three: Any, two: ShardMap
) -> None:
    a, b = (edge.url for edge in three[:2])
    with connections("test") as connect:
        begun = connect(a).cluster.leave("begin", "m", slots="0-9", shard="b")["leaving"]
        late = {"slots": "0-9", "shard": "a", "definitions": begun["definitions"]}
        connect(b).cluster.arrive("begin", "m", **late)
        assert not [*leftovers(two, connect)]
        connect(a).cluster.leave("cancel", "m")
        assert not [*leftovers(two, connect)]
        connect(a).cluster.leave("finish", "m")

        def down(url: str) -> Any:
            return connect(url if url == b else "http://127.0.0.1:1")

        assert not [*leftovers(two, down)]
        (left,) = leftovers(two, connect)
        assert (left.source, left.target, left.move) == ("a", "b", "m")
        forget(two, left, connect)
        assert connect(b).cluster.moves()["arriving"] is None


def test_of_two_moves_to_one_shard_that_were_begun_at_once_both_come_to_an_end(
    three: Any, two: ShardMap, mlpd: Run
) -> None:
    a, b, c = (edge.url for edge in three)
    grown = two.next([*two.shards, Shard("c", c)], two.owners)
    with connections("test") as connect:
        connect(c).apply(t.DOCUMENT)
        spread(grown, connect)
        begun = connect(a).cluster.leave("begin", "m", slots="0-9", shard="c")["leaving"]
        first = {"slots": "0-9", "shard": "a", "definitions": begun["definitions"]}
        connect(c).cluster.arrive("begin", "m", **first)
        connect(b).cluster.leave("begin", "n", slots="9000-9009", shard="c")
    second = "shard", "move", "9000-9009", "--to", "c", "--yes"
    assert "[move_under_way]" in (refused := mlpd(*second).output)
    assert "slots 0-9 arrive" in refused
    for done in (mlpd("shard", "move", "0-9", "--to", "c", "--yes"), mlpd(*second)):
        assert done.exit_code == 0, done.output
    assert t.map_at(b).slots_of("c") == [*range(10), *range(9000, 9010)]


def test_a_move_to_a_shard_that_was_removed_meanwhile_is_cancelled(
    three: Any, two: ShardMap, mlpd: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (edge.url for edge in three[:2])
    want = t.counts_of([a, b])
    assert mlpd("shard", "drain", "b", "--yes").exit_code == 0
    with connections("test") as connect:
        connect(a).cluster.leave("begin", "m", slots="0-9", shard="b")
        connect(a).cluster.leave("pause", "m")
        assert "[move_under_way]" in mlpd("shard", "remove", "b", "--yes").output
        monkeypatch.setattr(membership, "pending", lambda *_: iter(()))  # it began just now
        assert remove_member(t.map_at(a), "b", connect).shards == two.shards[:1]
        assert mlpd("shard", "cancel", "--yes").exit_code == 0
        assert connect(a).cluster.moves()["leaving"] is None
    assert t.counts_of([a]) == want


def test_a_source_that_was_removed_before_its_move_was_finished_holds_nobody_up(
    three: Any, two: ShardMap, mlpd: Run
) -> None:
    a, b = (edge.url for edge in three[:2])
    want = t.counts_of([a, b])

    def end(step: str) -> None:
        if step == "before arrive finish":
            raise t.Ended

    with pytest.raises(t.Ended):
        t.move(two, two.slots_of("b"), "a", end)
    with connections("test") as connect:

        def down(url: str) -> Any:
            return connect("http://127.0.0.1:1" if url == b else url)

        remove_member(t.map_at(a), "b", down)
        assert connect(a).cluster.moves()["arriving"] is not None
        assert mlpd("shard", "cancel", "--yes").exit_code == 0
        assert connect(a).cluster.moves()["arriving"] is None
    assert t.counts_of([a]) == want


def test_a_new_shard_gets_its_share_once_it_follows(
    three: Any, two: ShardMap, mlpd: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hindered(*_: Any) -> None:
        raise UnavailableError("the network is cut", code="unreachable")

    add = "shard", "add", f"c={three[2].url}", "--yes"
    with monkeypatch.context() as patched:
        patched.setattr(membership, "FOLLOW_S", 0.5)
        patched.setattr(Following, "_turn", hindered)
        refused = mlpd(*add)
        assert "[not_following]" in refused.output
        assert "c is a member" in refused.output
    grown = t.map_at(three[0].url)
    assert (grown.shards[:2], grown.slots_of("c")) == (two.shards, [])
    done = mlpd(*add)
    assert done.exit_code == 0, done.output
    assert len(t.map_at(three[2].url).slots_of("c")) == 5461


def test_a_shard_comes_and_goes(three: Any, two: ShardMap, mlpd: Run) -> None:
    urls = [edge.url for edge in three]
    want = t.counts_of(urls[:2])
    for member, code in (
        (f"0={urls[2]}", "arbiter_stays"),
        ("c=http://127.0.0.1:1", "member_unavailable"),
        (f"b={urls[2]}", "repeated_shard"),
        (f"c={urls[1]}", "repeated_url"),
    ):
        refused = mlpd("shard", "add", member, "--yes")
        assert (refused.exit_code, f"[{code}]" in refused.output) == (1, True), refused.output
    assert t.map_at(urls[0]) == two
    dry = json.loads(mlpd("shard", "add", f"c={urls[2]}", "--dry-run", "--json").output)
    assert dry["slots"] == 5461
    assert t.map_at(urls[0]) == two
    added = mlpd("shard", "add", f"c={urls[2]}", "--yes")
    assert added.exit_code == 0, added.output
    assert len(t.map_at(urls[2]).slots_of("c")) == 5461
    assert t.counts_of(urls) == want
    assert "[arbiter_stays]" in mlpd("shard", "remove", "a", "--yes").output
    assert mlpd("shard", "remove", "b", "--yes").exit_code == 0
    assert [shard.name for shard in t.map_at(urls[2]).shards] == ["a", "c"]
    assert t.counts_of([urls[0], urls[2]]) == want
    assert "[unknown_shard]" in mlpd("shard", "drain", "b", "--yes").output


def apply_alone(edge: Any, document: Any) -> None:
    """Apply definitions to one member past the arbiter, as one that doesn't follow has others."""
    applying = edge.daemon.definitions.apply(document)
    asyncio.run_coroutine_threadsafe(applying, edge.loop).result(30)


def test_what_cannot_move_is_refused_by_name_and_nothing_moves(
    three: Any, two: ShardMap, mlpd: Run, monkeypatch: pytest.MonkeyPatch, cluster_module: Any
) -> None:
    a, b, _ = (edge.url for edge in three)

    def refused(code: str, *words: str) -> None:
        found = mlpd("shard", *words, "--yes")
        assert (found.exit_code, f"[{code}]" in found.output) == (1, True), found.output
        assert t.map_at(a) == two
        for url in (a, b):
            with Client(url) as client:
                assert client.cluster.moves() == {"leaving": None, "arriving": None}

    refused("unknown_shard", "move", "0-9", "--to", "nobody")
    refused("invalid_slots", "move", "9-0", "--to", "b")
    refused("invalid_slots", "move", "0-16384", "--to", "b")
    refused("not_owned", "move", "0-9", "--to", "b", "--from", "b")
    refused("not_owned", "move", "8000-9000", "--to", "a", "--from", "a")
    usage = namedtuple("usage", "total used free")  # noqa: PYI024 - what shutil returns
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, 1 << 20))
        refused("target_full", "move", "0-9", "--to", "b")
    with monkeypatch.context() as patch:
        patch.setattr(leaving, "LOADED_ROWS_MAX", 0)
        refused("too_many_rows", "move", "0-8191", "--to", "b")
    apply_alone(three[1], t.SMALLER)
    refused("definitions_differ", "move", "0-9", "--to", "b")
    apply_alone(three[1], t.DOCUMENT)
    foreign = cluster_module.first_map("aa" * 16, [Shard("c", three[2].url)])
    with Client(three[2].url) as client:
        client.cluster.put_map(foreign.to_dict(), shard="c", expected=0)
    refused("other_cluster", "add", f"c={three[2].url}")


def test_a_second_move_waits_for_the_first(three: Any, two: ShardMap, mlpd: Run) -> None:
    def hook(step: str) -> None:
        if step == "after arrive begin":
            raise t.Ended

    with pytest.raises(t.Ended):
        t.move(two, range(100), "b", hook)
    status = mlpd("shard", "status")
    assert "Under way:" in status.output
    for words in (("50-150", "--to", "b"), ("8200-8300", "--to", "a"), ("200-300", "--to", "b")):
        second = mlpd("shard", "move", *words, "--yes")
        expected = 0 if words[0] == "8200-8300" else 1
        assert second.exit_code == expected, second.output
        assert expected == 0 or "[move_under_way]" in second.output
    with Client(three[0].url) as client:
        move = client.cluster.moves()["leaving"]["move"]
        with pytest.raises(ConflictError, match="already"):
            client.cluster.leave("begin", "other", slots="300-400", shard="b")
        with pytest.raises(ConflictError, match="slots move just now"):
            client.erase("user", [{"user": "u1"}])
        with pytest.raises(ConflictError, match="can't become"):
            client.cluster.leave("leave", move)
    cancelled = json.loads(mlpd("shard", "cancel", "--yes", "--json").output)
    assert [one["slots"] for one in cancelled["cancelled"]] == ["0-99"]
    assert t.map_at(three[1].url).owner(50).name == "a"
    done = json.loads(mlpd("shard", "move", "0-99", "--to", "b", "--yes", "--json").output)
    assert [one["slots"] for one in done["moved"]] == ["0-99"]


def test_an_order_to_erase_that_a_beginning_move_crosses_is_sent_again_to_all(
    three: Any, two: ShardMap
) -> None:
    """The target has carried it out, then the source refuses it, and the entity comes back."""
    a, b, _ = (edge.url for edge in three)
    name = next(n for n in t.USERS if two.owner(slot_of(b"s" + n.encode() + b"\0\0")).name == "a")
    with Client(b) as client:
        receipt = client.erase("user", [{"user": name}])
        assert receipt["online_rows"] == 0

    def refused_there(step: str) -> None:
        if step == "after arrive begin":
            for url in (a, b):
                with Client(url) as client, pytest.raises(ConflictError) as raised:
                    client.erase("user", [{"user": name}])
                assert raised.value.code == "move_under_way"
                assert "to every shard" in raised.value.hint

    t.move(two, two.slots_of("a"), "b", refused_there)
    assert t.counts_of([a, b])[0][name]  # here it is again
    for url in (a, b):
        with Client(url) as client:
            client.erase("user", [{"user": name}])
    assert not t.counts_of([a, b])[0][name]


def test_a_move_is_finished_although_some_of_its_slots_went_elsewhere(
    three: Any, cluster_module: Any, mlpd: Run
) -> None:
    made = cluster_module.give_map(three)
    for edge in three:
        with Client(edge.url) as client:
            client.apply(t.DOCUMENT)

    def hook(step: str) -> None:
        if step == "after leave pause":
            raise t.Ended

    with pytest.raises(t.Ended):
        t.move(made, range(100), "b", hook)
    assert mlpd("shard", "move", 6000, "--to", "c", "--yes").exit_code == 0
    done = json.loads(mlpd("shard", "move", "0-150 6000", "--to", "b", "--yes", "--json").output)
    assert [one["slots"] for one in done["moved"]] == ["0-99", "100-150", "6000"]
    owners = {t.map_at(three[2].url).owner(slot).name for slot in (*range(151), 6000)}
    assert owners == {"b"}


def test_what_comes_in_between_cancels_the_move(three: Any, two: ShardMap) -> None:
    a, b, _ = (edge.url for edge in three)
    want = t.counts_of([a, b])

    def apply_other(step: str) -> None:
        if step == "before leave pause":
            with Client(b) as client:
                client.apply(t.SMALLER)

    def lose_a_row(step: str) -> None:
        """Something is not as it was at the source: the digests tell."""
        if step == "after digest digest" and not t.map_at(b).epoch > 1:
            writer = three[1].daemon.writer
            with three[1].daemon.environment.snapshot() as snapshot:
                here = (int.from_bytes(key[:2], "big") for key, _ in snapshot.scan(Table.ONLINE))
                slot = next(slot for slot in here if slot in range(8192)).to_bytes(2, "big")
                key = next(iter(snapshot.scan(Table.ONLINE, slot)))[0]
            writer.write_blocking(lambda txn: txn.delete(Table.ONLINE, key))

    for hook, code in (
        (lose_a_row, "checksum_differs"),
        (apply_other, "definitions_changed"),
    ):
        with pytest.raises(ConflictError) as raised:
            t.move(t.map_at(a), two.slots_of("a"), "b", hook)
        assert raised.value.code == code
        with Client(b) as client:
            assert client.cluster.moves() == {"leaving": None, "arriving": None}
            client.apply(t.DOCUMENT)
        with three[1].daemon.environment.snapshot() as snapshot:  # what came is gone again
            slots = {int.from_bytes(key[:2], "big") for key, _ in snapshot.scan(Table.ONLINE)}
        assert slots <= set(two.slots_of("b"))
        assert t.map_at(b).owners == two.owners
        assert t.counts_of([a, b]) == want


def test_ids_of_moved_events_are_known_at_the_new_owner(
    three: Any, cluster_module: Any, mlpd: Run
) -> None:
    m = cluster_module
    made = m.give_map(three[:2])
    for edge in three[:2]:
        with Client(edge.url) as client:
            client.apply(m.DOCUMENT)
    owner = made.owner(m.slot_of(b"notes")).name
    note = {"event_time": 1, "text": "once"}
    with Client([three[0].url]) as client:
        assert client.events.send("notes", [note])["accepted"] == 1
    slot, other = m.slot_of(b"notes"), "b" if owner == "a" else "a"
    assert mlpd("shard", "move", slot, "--to", other, "--yes").exit_code == 0
    with Client([three[0].url]) as client:
        again = client.events.send("notes", [note])
        assert (again["accepted"], again["duplicates"]) == (0, 1)


def test_ids_of_events_of_several_entities_are_known_by_slot(
    three: Any, cluster_module: Any
) -> None:
    """Senders lose shards, slots move, and all is sent again: each event counts once for each."""
    made = cluster_module.give_map(three)
    urls = [edge.url for edge in three]
    views = [
        WindowView(f"by_{e.name}", e, IDS, ["1d"], [Aggregate.count()]) for e in (t.user, t.shop)
    ]
    services = [FeatureService(f"{view.entity.name}s", [view]) for view in views]
    for url in urls:
        with Client(url) as client:
            client.apply(build_document([t.user, t.shop, IDS, *views, *services]))
    rng = random.Random(PROFILE)
    now_us = time.time_ns() // 1000
    events = [
        {"at": now_us, "n": n, "user": rng.choice(t.USERS[:9]), "shop": rng.choice(t.SHOPS[:9])}
        for n in range(90)
    ]
    events += [{"at": now_us, "n": n, "shop": t.SHOPS[0]} for n in range(90, 95)]
    for _ in range(3):
        by_shard: dict[str, list[Any]] = {}
        for event in rng.sample(events, 40):
            owners = {made.owner(slot).name for slot in slots_of(event)}
            for name in rng.sample(sorted(owners), rng.randint(1, len(owners))):
                by_shard.setdefault(name, []).append(event)
        for name, rows in by_shard.items():
            send_to(three["abc".index(name)], made, rows)
        first = rng.randrange(10_000)
        made, _ = t.move(made, range(first, first + 6_000), rng.choice("abc"))
    for accepted in (None, 0):
        with Client(urls) as client:
            answer = client.events.send("ids", events)
        assert answer["rejected"] == []
        assert accepted is None or answer["accepted"] == accepted
        users, shops = t.counts_of(urls)
        for kind, found in (("user", users), ("shop", shops)):
            wanted = Counter(event[kind] for event in events if kind in event)
            assert {name: count for name, count in found.items() if count} == wanted, kind
    for edge in three:
        assert not check_deep(edge)


IDS = Source("ids", timestamp="at", event_id="n", schema=t.sales.schema)


def slots_of(event: dict[str, Any]) -> list[int]:
    names = [event[kind] for kind in ("user", "shop") if kind in event]
    return [slot_of(key) for key in encode_texts(names)]


def send_to(edge: Any, made: ShardMap, rows: list[Any]) -> None:
    """Send events to one of the shards that they concern, as a sender does who goes by the map."""
    _, routing, _ = edge.call("GET", "/v1/cluster/routing")
    headers = {"x-mlpd-epoch": str(made.epoch), "x-mlpd-routing": routing["version"]}
    status, answer, _ = edge.call("POST", "/v1/events/ids", {"rows": rows}, headers)
    assert status == 200, answer


@pytest.mark.usefixtures("two")
def test_a_daemon_of_an_older_version_is_named(mlpd: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> None:
        raise NotFoundError("there is no path", code="unknown_path")

    monkeypatch.setattr(Cluster, "survey", unknown)
    found = mlpd("shard", "move", "0-9", "--to", "b", "--yes")
    assert (found.exit_code, "[older_version]" in found.output) == (1, True), found.output
