"""Slots change hands with all that they hold: reads, joins and replays keep their bits."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlpd import Aggregate, Entity, FeatureView, Job, Spine, WindowView
from mlpd.client import Client
from mlpd.cluster.members import connections
from mlpd.cluster.moving import carry_out, newest_map, plan_moves, wanted_moves
from mlpd.cluster.placement import first_map
from mlpd.core.columns import DType
from mlpd.core.definitions import build_document
from mlpd.core.errors import MlpdError
from mlpd.core.hashing import slot_of
from mlpd.core.keys import encode_entity
from mlpd.core.routing import home_slot
from mlpd.core.shards import Shard
from mlpd.core.specs import EntitySpec
from mlpd.daemon.audit_logs import NOBODY, OWN, Logs, find_seen
from mlpd.daemon.replay_check import compare_with_replay
from mlpd.storage.lineage import Import, Lineage
from mlpd.storage.map_store import FileMapStore, Member
from mlpd.storage.tables import Table

pytestmark = pytest.mark.timeout(300)

USER_AT = [{"user": f"u{i}", "age": 0.5} for i in range(40)]
SHOP_AT = [{"shop": i} for i in range(12)]


@pytest.fixture
def single(tmp_path: Path, transform_cache: Path, cluster_module: Any) -> Iterator[Any]:
    """One daemon that holds all sales."""
    m = cluster_module
    with m.serve_all(tmp_path / "single", 1, transform_cache) as (edge,):
        with Client(edge.url) as client:
            client.apply(m.DOCUMENT)
            client.events.send("sales", m.sale_columns())
        yield edge


def filled(m: Any, running: list[Any], columns: dict[str, Any]) -> Any:
    """Make a cluster that holds sales."""
    made = m.give_map(running)
    for edge in running:
        with Client(edge.url) as client:
            client.apply(m.DOCUMENT)
    m.send_split(made, running, columns)
    return made


def compact(edge: Any) -> None:

    asyncio.run_coroutine_threadsafe(edge.daemon.compactor.run(), edge.loop).result(60)


def move(made: Any, slots: Any, target: str) -> list[Any]:
    with connections("test") as connect:
        newest = newest_map(made, connect)
        plan = plan_moves(newest, wanted_moves(newest, slots, target), connect)
        return list(carry_out(plan, connect, lambda _what, _rows: None))


def read_all(m: Any, url: str) -> Any:
    """What a cluster, or one daemon, answers to reads and joins of all entities."""
    with Client([url]) as client:
        return [
            {k: client.read_features(service, entities=rows, at=m.AT_US)[k]
             for k in ("columns", "statuses", "event_times")}
            for service, rows in (("person", USER_AT), ("place", SHOP_AT))
        ]  # fmt: skip


def join_all(m: Any, made: Any, running: list[Any], single: Any, mode: str) -> None:
    """Compare joins of each shard's keys with those of one daemon, at moments of the history."""
    for service, rows in (("person", USER_AT), ("place", SHOP_AT)):
        for shard, edge in zip(made.shards, running, strict=True):
            spine = [
                {**row, "event_time": m.START_US + hour * 3_600_000_000}
                for row in rows
                if made.owner(m.slots_of_row(row)[0]) == shard
                for hour in (2, 7, 12)
            ]
            if spine:
                with Client(single.url) as one, Client(edge.url) as client:
                    found = client.history(service, spine=spine, mode=mode)
                    assert found.equals(one.history(service, spine=spine, mode=mode)), shard


def test_moved_slots_answer_as_one_daemon_would(
    three: Any, single: Any, cluster_module: Any
) -> None:
    m = cluster_module
    made = filled(m, three, m.sale_columns())
    compact(three[0])
    want = read_all(m, single.url)
    assert read_all(m, three[0].url) == want
    moved = move(made, range(6000), "b")
    assert sum(one.events for one in moved) > 100
    with Client(three[1].url) as client:
        made = m.decode_map(client.cluster.map()["map"])
    assert made.epoch > 1
    assert len(made.slots_of("a")) == 0
    assert read_all(m, three[2].url) == want
    join_all(m, made, three, single, "as_corrected")


def test_slots_come_back_and_the_replay_agrees(
    three: Any, single: Any, cluster_module: Any
) -> None:
    """History goes there and back, with events in between; each row counts once for each slot."""
    m = cluster_module
    columns = m.sale_columns()
    early = {name: values[:500] for name, values in columns.items()}
    made = filled(m, three, early)
    slots = made.slots_of("a")
    move(made, slots, "b")
    made = map_at(m, three[1])
    late = {name: values[500:] for name, values in columns.items()}
    m.send_split(made, three, late)
    compact(three[1])
    move(made, slots[1000:5000], "c")
    made = map_at(m, three[1])
    move(made, slots, "a")
    made = map_at(m, three[1])
    assert made.slots_of("a") == slots
    assert read_all(m, three[0].url) == read_all(m, single.url)
    join_all(m, made, three, single, "as_known")
    later = WindowView("later", m.user, m.sales, ["7d"], [Aggregate.sum("amount")])
    for edge in three:  # a view that comes now is built from what counts
        with Client(edge.url) as client:
            client.apply(build_document([*m.OBJECTS, later]))
            shown = client.cluster.moves()
            assert shown == {"leaving": None, "arriving": None}
        with edge.daemon.environment.snapshot() as snapshot:
            here = {int.from_bytes(key[:2], "big") for key, _ in snapshot.scan(Table.ONLINE)}
        assert here <= set(made.slots_of(edge.daemon.ownership.member.shard))
        assert not check_deep(edge), edge.url
        assert edge.daemon.ownership.has_lineage


def test_a_row_that_one_shard_took_and_another_refused_counts_once(
    three: Any, cluster_module: Any
) -> None:
    """Its client sends it anew to the new owner, for the slots of the shard that refused it."""
    m = cluster_module
    made = filled(m, three, {name: v[:10] for name, v in m.sale_columns().items()})
    row = next(
        {"user": user, "shop": shop}
        for user in m.USERS
        for shop in m.SHOPS
        if [made.owner(s).name for s in m.slots_of_row({"user": user, "shop": shop})] == ["a", "b"]
    )
    event = {"event_time": time.time_ns() // 1000 - 60_000_000, **row, "amount": 5.0}
    body, headers = {"rows": [event]}, headers_of(three[1], made)
    assert three[1].call("POST", "/v1/events/sales", body, headers)[0] == 200
    alone = {"rows": [{"event_time": event["event_time"], "user": row["user"]}]}
    keyed = headers | {"Idempotency-Key": "lost"}
    mine = three[0] if made.owner(m.slots_of_row(alone["rows"][0])[0]).name == "a" else three[1]
    assert mine.call("POST", "/v1/events/sales", alone, keyed)[0] == 200
    move(made, made.slots_of("a"), "b")
    assert three[0].call("POST", "/v1/events/sales", body, headers)[0] == 421
    status, answer, _ = mine.call("POST", "/v1/events/sales", alone, keyed)
    assert (status, answer["replayed"]) == (200, True)  # its sender learns that it was stored
    again = headers_of(three[1], map_at(m, three[1])) | {"x-mlpd-slots": "0-5460"}
    assert three[1].call("POST", "/v1/events/sales", body, again)[0] == 200
    with Client(three[1].url) as client:
        found = client.read_features("both", entities=[row])["columns"]
    assert found == {
        "profile.amount": [5.0],
        "takings.count_1d": [1],
        "takings.amount_sum_1d": [5.0],
    }
    assert not check_deep(three[1])
    move(made, m.first_map(made.cluster, made.shards).slots_of("a"), "c")
    assert not check_deep(three[2])


def map_at(m: Any, edge: Any) -> Any:
    with Client(edge.url) as client:
        return m.decode_map(client.cluster.map()["map"])


def headers_of(edge: Any, made: Any) -> dict[str, str]:
    _, routing, _ = edge.call("GET", "/v1/cluster/routing")
    return {"x-mlpd-epoch": str(made.epoch), "x-mlpd-routing": routing["version"]}


def check_deep(edge: Any) -> list[Any]:
    """Return where rows differ from the replay of the log, in a copy of the directory."""
    daemon = edge.daemon
    differences: list[Any] = []
    compare_with_replay(
        daemon.environment,
        daemon.paths,
        daemon.state.catalog,
        lambda view, key, what: differences.append((view.view.name, key, what)),
    )
    return differences


def test_what_the_new_owner_serves_is_recomputed_to_the_bit(
    three: Any, trio: Any, cluster_module: Any
) -> None:
    m = cluster_module
    made = filled(m, three, m.sale_columns())
    with Client(trio.single.url) as client:
        archive = client.models.archive("person", 1)
    slots = made.slots_of("a")
    move(made, slots, "b")
    compact(three[1])
    m.serve_person(three[1], archive)
    users = [row for row in USER_AT if m.slots_of_row(row)[0] in slots]
    with Client(three[1].url) as client:
        served = client.predict("person", users)["predictions"]
        assert len(served) == len(users) > 5
        found = client.run_consistency()
    assert (found["rows_compared"], found["mismatches"]) == (len(users), 0), found
    assert found["unavailable"] == 0


@pytest.mark.parametrize(
    "moves",
    [
        (("b", 0, None, "a"), ("c", 0, None, "a")),
        (("a", 0, 3000, "b"), ("b", 2000, 7000, "c"), ("c", 1000, 6000, "a")),
    ],
    ids=["all to one", "on and back"],
)
def test_what_moved_is_trained_on_as_if_it_had_always_been_on_one_daemon(
    three: Any, trio: Any, cluster_module: Any, moves: Any
) -> None:
    """Most events have come twice or thrice, for other slots each; as rows they count once."""
    m = cluster_module
    made = filled(m, three, m.sale_columns())
    for name, start, stop, target in moves:
        move(made, made.slots_of(name)[start:stop], target)
        made = map_at(m, three[0])
    with Client(trio.single.url) as one, Client(three[0].url) as client:
        assert client.status()["sequence"] > len(m.sale_columns()["user"])
        run = client.runs.wait(client.runs.start("person")["run_id"], timeout_s=50)
        assert run["state"] == "succeeded", run["error"]
        ours, theirs = (c.models.version("person", 1) for c in (client, one))
        for name in ("rows", "vectors_digest", "metrics"):
            assert ours["lineage"][name] == theirs["lineage"][name], name
        with pytest.raises(MlpdError) as refused:  # the log has copies, under other sequences
            client.models.reproduce("person", 1)
        assert refused.value.code == "several_shards"
        by_both = Entity("pair", {"user": "string", "shop": "int64"})
        pairs = FeatureView("p", by_both, m.sales, ["amount"])
        with pytest.raises(MlpdError) as refused:  # their events came for users and shops alone
            client.plan(build_document([*m.OBJECTS, by_both, pairs]))
        assert refused.value.code == "new_entity"


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("views", [False, True])
def test_copies_of_events_that_no_view_tells_apart_any_more_are_not_trained_on(
    three: Any, cluster_module: Any, moved: bool, views: bool
) -> None:
    """With `views`, that of users stays: then it is sales without a user that lie astray."""
    m = cluster_module
    made = filled(m, three, m.sale_columns(400))
    home = made.owner(home_slot("sales")).name  # of what concerns nothing
    for name in sorted({"a", "b", "c"} - {home}) if moved else ():
        move(made, made.slots_of(name), home)
        made = map_at(m, three[0])
    kept = [m.user, m.profile] if views else []
    blind = Job("blind", m.bare, Spine(m.sales, time="shown_at"), label="bought")
    with Client(three[0].url) as client:
        client.apply(build_document([*kept, m.sales, m.bare, blind]))
        run = client.runs.wait(client.runs.start("blind")["run_id"], timeout_s=50)
    assert run["state"] == "failed"
    assert run["error"]["code"] == "several_shards", run


def test_a_prediction_is_recomputed_only_where_all_that_it_saw_is_numbered(tmp_path: Path) -> None:
    shards = [Shard(name, f"http://{name}:1") for name in "ab"]
    member = Member("b", first_map("0f" * 16, shards))
    FileMapStore(tmp_path).store(member, 0)
    owned = set(member.shard_map.slots_of("b"))
    users = [f"u{i}" for i in range(40)]
    slots = {u: slot_of(encode_entity([DType.STRING], [u], "user") or b"") for u in users}
    came = next(u for u in users if slots[u] in owned)
    lineage = Lineage((Import(1, (slots[came],), since=3, live_from=9, ranges=((4, 9),)),))
    entity = EntitySpec("user", (("user", DType.STRING),))
    offline: Any = SimpleNamespace(lineage=lambda: lineage)
    logs, keys = Logs(offline, None, member), (*users, None)

    def told(sequence: int, brought: int, others: dict[str, int]) -> list[tuple[int, int]]:
        asked = {"sequence": sequence, "brought": brought, "others": others}
        batch: list[Any] = [SimpleNamespace(given={"user": u}, **asked) for u in keys]
        seen = find_seen(logs, entity, batch)
        return [*zip(seen.logs.tolist(), seen.sequences.tolist(), strict=True)]

    for sequence, counts in ((8, False), (9, True)):
        wanted = [slots[u] in owned and (u != came or counts) for u in users]
        found = [number for number, _ in told(sequence, 0, {})]
        assert found == [*(OWN if here else NOBODY for here in wanted), OWN]
        found = [number for number, _ in told(sequence, 1, {})]
        # It saw what came with it, alone.
        assert found == [*(OWN if u == came else NOBODY for u in users), OWN]
    of_a, none = 1 + member.shard_map.index("a"), (OWN, 10)
    wanted_of_a = [none if slots[u] in owned else (of_a, 5) for u in users]
    assert told(10, 0, {"a": 5}) == [*wanted_of_a, none]
    came_at = users.index(came)
    assert told(9, 0, {"a": 5})[came_at][0] == NOBODY  # it may have read cells of it before it came
    of_b = [(OWN, 10 if u == came else 30) if slots[u] in owned else (of_a, 5) for u in users]
    assert told(10, 1, {"a": 5, "b": 30}) == [*of_b, none]  # served elsewhere, with cells from here
