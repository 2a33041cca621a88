"""Promotion: a follower takes its owner's place; whatever ends half-way, nothing is lost that isn't
said to be."""

import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pytest
from click.testing import CliRunner, Result

from mlpd.cli import main
from mlpd.client import Client
from mlpd.cluster.members import connections
from mlpd.cluster.replica.promote import (
    Plan,
    Promoted,
    carry_out,
    give_up,
    plan_promotion,
    run_steps,
)
from mlpd.core.errors import (
    ConflictError,
    MlpdError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from mlpd.core.shards import ShardMap
from mlpd.daemon.roles import refusal
from tests.cluster import moving as t
from tests.cluster.replicas import (
    Node,
    differences,
    eventually,
    make_map,
    map_at,
    nodes,
    write_replicas,
)

pytestmark = pytest.mark.timeout(90)


def known(url: str) -> ShardMap:
    """Return the map of a daemon, which may be starting anew."""
    found: ShardMap = eventually(lambda: map_at(url))
    return found


def plan(url: str, shard: str, **how: Any) -> Plan:
    with connections("test") as connect:
        return run_steps(plan_promotion(known(url), shard, **how), connect)


def promote(url: str, shard: str, **how: Any) -> Promoted:
    with connections("test") as connect:
        made = run_steps(plan_promotion(known(url), shard, **how), connect)
        return run_steps(carry_out(made), connect)


def cancel(url: str, shard: str) -> None:
    with connections("test") as connect:
        run_steps(give_up(known(url), shard), connect)


def promote_until(url: str, shard: str, last: int | str) -> tuple[bool, list[str]]:
    """Promote and end after so many questions, or that one, as kill -9 would; tell if it did."""
    asked: list[str] = []

    def connect(at: str) -> Any:
        class Cluster:
            def __getattr__(self, name: str) -> Any:
                def ask(**fields: Any) -> Any:
                    asked.append(f"{name} {fields.get('step', '')}".strip())
                    answer = getattr(real(at).cluster, name)(**fields)
                    if last in (len(asked), name):
                        raise t.Ended
                    return answer

                return ask

        return type("Client", (), {"cluster": Cluster()})()

    with connections("test") as real:
        made = run_steps(plan_promotion(known(url), shard), real)
        try:
            run_steps(carry_out(made), connect)
        except t.Ended:
            return True, asked
    return False, asked


class Writer:
    """Writes all the time; what was acknowledged is kept."""

    def __init__(self, urls: list[str]) -> None:
        self._urls = urls
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=(i,)) for i in range(2)]
        self.counts: dict[str, int] = {}
        self.failures: list[str] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def goes_on(self, rows: int) -> None:
        """Wait until so many more are written."""
        least = sum(self.counts.values()) + rows
        eventually(lambda: sum(self.counts.values()) > least)

    def _write(self, seed: int) -> None:
        rng, number = random.Random(seed), 0
        with Client(self._urls, timeout_s=20) as client:
            while not self._stop.is_set():
                user, number = rng.choice(t.USERS), number + 1
                row = {"at": time.time_ns() // 1000, "n": 1, "user": user, "shop": "s"}
                key = f"{seed}-{number}"
                until_s = time.monotonic() + 30
                while True:  # the same key: an answer that was lost counts once
                    try:
                        client.events.send("sales", [row], idempotency_key=key)
                    except MlpdError as error:
                        with self._lock:
                            self.failures.append(error.code)
                        if time.monotonic() > until_s:
                            return
                        time.sleep(0.05)
                    else:
                        break
                with self._lock:
                    self.counts[user] = self.counts.get(user, 0) + 1


def counts_at(url: str) -> dict[str, int]:
    with Client(url) as client:
        found = client.read_features("users", entities=[{"user": user} for user in t.USERS])
    counts = found["columns"]["by_user.count_1d"]
    return {user: n for user, n in zip(t.USERS, counts, strict=True) if n}


def follows(node: Node) -> None:
    """Wait until a daemon is a follower."""
    eventually(lambda: node.role()["role"] == "follower")


@pytest.fixture
def shard_a(tmp_path: Path) -> Iterator[list[Node]]:
    """A cluster of one shard with a follower, which has all."""
    with nodes(tmp_path, 2) as made:
        owner, follower = made
        owner.start()
        make_map({"a": owner.url})
        with Client(owner.url) as client:
            client.apply(t.DOCUMENT)
        follower.start(owner.url)
        write_replicas(owner.url, "a", [follower.url])
        yield made


def test_under_load_nothing_is_lost_or_doubled_and_the_owner_becomes_a_follower(
    shard_a: list[Node],
) -> None:
    owner, follower = shard_a
    with Writer([owner.url, follower.url]) as load:
        for turn in range(2):
            load.goes_on(30)
            assert promote(owner.url, "a").epoch == 3 + turn
            owner, follower = follower, owner
            follows(follower)
            load.goes_on(10)
    assert counts_at(owner.url) == load.counts
    assert set(load.failures) <= {"promoting", "not_ready", "unreachable", "connection_lost",
                                  "follower", "fenced", "shutting_down"}  # fmt: skip
    assert not differences(owner, follower)
    assert len(follower.told) == 3  # nobody started again from a backup


def test_a_driver_that_ends_anywhere_is_followed_by_one_that_finishes_or_gives_up(
    shard_a: list[Node],
) -> None:
    owner, follower = shard_a
    number, seen, turns = 1, [], 0
    while True:
        ended, asked = promote_until(owner.url, "a", number)
        seen = max(seen, asked, key=len)
        for node in (owner, follower):  # they may start anew just now
            eventually(node.role)
        if ended and turns % 2:
            try:
                cancel(owner.url, "a")
            except ConflictError as error:
                assert error.code == "promotion_done", error
                promote(owner.url, "a")
        elif ended:
            with suppress(NotFoundError):  # it was whole, and its owner doesn't follow yet
                promote(owner.url, "a")
        if known(follower.url).shard("a").url == follower.url:
            owner, follower = follower, owner
        follows(follower)
        with Client([owner.url, follower.url]) as client:
            client.events.send("sales", [{"at": time.time_ns() // 1000, "n": 1, "user": "u1"}])
        assert not differences(owner, follower)
        turns += 1
        if not ended:
            break
        number += 1 if number < 4 else 3
    assert turns > 3
    assert {"step_role pause", "step_role fence", "step_role promote"} <= set(seen)


def test_a_lost_owner_is_replaced_and_what_it_had_more_is_told_in_rows(shard_a: list[Node]) -> None:
    owner, follower = shard_a
    with Client(owner.url) as client:
        client.events.send("sales", [{"at": 1, "n": 1, "user": "u1", "shop": "s"}])
        eventually(lambda: follower.role()["head"] == owner.role()["head"])
        with pytest.raises(ConflictError) as caught:
            plan(owner.url, "a", lost=True)
        assert caught.value.code == "owner_answers"
        follower.stop()
        client.events.send("sales", [{"at": 2, "n": 1, "user": "u1", "shop": "s"}] * 7)
    owner.stop()
    follower.start()
    with pytest.raises(ConflictError) as caught:
        plan(follower.url, "a")
    assert caught.value.code == "owner_unavailable"
    promote(follower.url, "a", lost=True)
    assert map_at(follower.url).shard("a").url == follower.url
    assert map_at(follower.url).shard("a").replicas == ()
    assert counts_at(follower.url) == {}  # they were of 1970
    with Client(follower.url) as client:
        client.events.send("sales", [{"at": 3, "n": 1, "user": "u2", "shop": "s"}])
    owner.start()
    assert owner.role()["role"] == "fenced"
    assert owner.told[-1] == f"{follower.url} took this daemon's place"
    why = eventually(lambda: owner.role()["trouble"])
    lost = owner.role()["sequence"] - follower.role()["since"]
    assert lost == 7
    assert why.startswith("7 rows, sequences ")
    with Client(owner.url) as client, pytest.raises(MlpdError) as failed:
        client.apply(t.SMALLER)
    assert failed.value.details["url"] == follower.url
    owner.stop()
    owner.start(follower.url, discard=True)
    assert not differences(follower, owner)
    eventually(lambda: follower.role()["fence"] == [])


def test_an_owner_that_runs_on_hears_that_its_place_was_taken(shard_a: list[Node]) -> None:
    owner, follower = shard_a
    roles = owner.daemon.roles

    def write_nothing() -> None:
        raise refusal(roles.role)

    roles.check_begin = write_nothing  # in the background it may at any time, and then has more
    owner.do(lambda daemon: daemon.roles.barrier())
    eventually(lambda: follower.role()["head"] == owner.role()["head"])
    made = plan(owner.url, "a")
    lost = Plan(**{name: getattr(made, name) for name in Plan.__slots__} | {"lost": True})
    with connections("test") as connect:  # as if it couldn't be reached by whoever promotes
        run_steps(carry_out(lost), connect)
    eventually(lambda: owner.role()["role"] == "follower")  # it had nothing more
    assert not differences(follower, owner)


def test_with_a_lease_an_owner_without_its_follower_stops_and_only_then_is_replaced(
    tmp_path: Path,
) -> None:
    row = {"at": 1, "n": 1, "user": "u1", "shop": "s"}
    with nodes(tmp_path, 2, lease_us=3_000_000) as (owner, follower):
        owner.start()
        make_map({"a": owner.url})
        follower.start(owner.url)
        write_replicas(owner.url, "a", [follower.url])
        with Client(owner.url, timeout_s=10) as client:
            client.apply(t.DOCUMENT)
            client.events.send("sales", [row])
            follower.stop()
            stopped_s = time.monotonic()
            failed = eventually(lambda: refused(client, row), 20)
            assert failed == "lease_lost"
            assert time.monotonic() - stopped_s > 1.0
            follower.start()
            client.events.send("sales", [row])
            with Client(follower.url) as other:
                eventually(lambda: other.cluster.role()["wait_s"] > 2.0)
                wait_s = other.cluster.step_role("stand")["wait_s"]
                assert 0.0 < wait_s <= 3.03
                new = plan(owner.url, "a").new.to_dict()
                with pytest.raises(ConflictError) as caught:
                    other.cluster.step_role("promote", map=new)
                assert caught.value.code == "lease_runs"
                eventually(lambda: refused(client, row), 20)
                assert other.cluster.role()["wait_s"] <= 3.03
                other.cluster.step_role("resume")
            eventually(lambda: refused(client, row) is None)


def refused(client: Client, row: dict[str, Any]) -> str | None:
    """Return the code by which a write is refused, None if it isn't."""
    try:
        client.events.send("sales", [row])
    except (UnavailableError, OverloadedError) as error:
        return error.code
    return None


def test_of_several_shards_one_that_does_not_decide_is_promoted_too(tmp_path: Path) -> None:
    with nodes(tmp_path, 3) as (first, owner, follower):
        for node in (first, owner):
            node.start()
        make_map({"a": first.url, "b": owner.url})
        for node in (first, owner):
            with Client(node.url) as client:
                client.apply(t.DOCUMENT)
        follower.start(owner.url)
        write_replicas(first.url, "b", [follower.url])
        assert eventually(lambda: follower.role()["epoch"] == 2)
        made = plan(first.url, "b")
        with Client(owner.url) as client:  # given up by somebody else, in between
            client.cluster.step_role("pause", url=follower.url, token="t")
        cancel(first.url, "b")
        assert map_at(first.url).epoch == 3
        assert owner.role()["role"] == "owner"
        with connections("test") as connect:
            done = run_steps(carry_out(made), connect)
        assert (done.epoch, done.not_told) == (4, ())
        for node in (first, follower):
            assert map_at(node.url).shard("b").url == follower.url
        eventually(lambda: owner.role()["role"] == "follower")
        with Client(first.url) as client:
            rows = [{"at": 1, "n": 1, "user": user, "shop": "s"} for user in t.USERS]
            assert client.events.send("sales", rows)["accepted"] == len(rows)
        assert not differences(follower, owner)


def test_giving_up_opens_no_former_owner_while_the_new_one_is_down(tmp_path: Path) -> None:
    with nodes(tmp_path, 3) as (first, owner, follower):
        for node in (first, owner):
            node.start()
        make_map({"a": first.url, "b": owner.url})
        follower.start(owner.url)
        write_replicas(first.url, "b", [follower.url])
        eventually(lambda: owner.role()["epoch"] == 2)
        ended, _ = promote_until(first.url, "b", "put_map")
        assert ended
        follower.stop()
        with pytest.raises(ConflictError) as caught:
            cancel(first.url, "b")
        assert caught.value.code == "promotion_done"
        assert owner.role()["role"] == "paused"
        assert map_at(first.url).epoch == 3
        follower.start()
        assert promote(first.url, "b").epoch == 3
        follows(owner)
        assert not differences(follower, owner)


def test_bad_promotions_are_refused_with_what_to_do(shard_a: list[Node]) -> None:
    owner, follower = shard_a
    for how, code in (
        ({"shard": "z"}, "unknown_shard"),
        ({"shard": "a", "to": "http://127.0.0.1:9"}, "unknown_replica"),
    ):
        with pytest.raises(NotFoundError) as caught:
            plan(owner.url, **how)  # type: ignore[arg-type]
        assert caught.value.code == code
        assert caught.value.hint
    with Client(owner.url) as client:
        with pytest.raises(NotFoundError, match="no follower in the map"):
            client.cluster.step_role("pause", url="http://127.0.0.1:9", token="t")
        client.cluster.step_role("pause", url=follower.url, token="t")
        with pytest.raises(ConflictError) as conflict:
            client.cluster.step_role("resume", token="another")
        assert conflict.value.code == "other_pause"
        with Client(owner.url, timeout_s=0.3) as hasty:
            assert refused(hasty, {"at": 1, "n": 1}) == "promoting"
        client.read_features("users", entities=[{"user": "u1"}])
        client.cluster.step_role("resume", token="t")
        new = plan(owner.url, "a").new.to_dict()
        with pytest.raises(ConflictError) as conflict:
            client.cluster.step_role("fence", map=new, token="t")
        assert conflict.value.code == "other_pause"
        with pytest.raises(ConflictError) as conflict:
            client.cluster.step_role("promote", map=new, head="00" * 32)
        assert conflict.value.code == "wrong_role"
    with Client(follower.url) as client, pytest.raises(ConflictError) as conflict:
        client.cluster.step_role("promote", map=new, head="00" * 32)
    assert conflict.value.code == "replica_behind"


def test_the_commands_say_what_they_do_before_and_after(shard_a: list[Node]) -> None:
    owner, follower = shard_a
    runner = CliRunner(env={"COLUMNS": "200", "MLPD_URL": owner.url})

    def mlpd(*words: str) -> Result:
        return runner.invoke(main, ["shard", *words])

    shown = mlpd("status")
    assert shown.exit_code == 0, shown.output
    assert f"a      {follower.url}  follower" in shown.output
    dry = mlpd("promote", "a", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert f"The follower at {follower.url} takes the place of a's owner" in dry.output
    assert dry.output.endswith("Nothing was changed.\n")
    assert map_at(owner.url).epoch == 2
    assert mlpd("promote", "a", "--lost").exit_code == 1
    wrong = mlpd("replicas", "a", owner.url)
    assert "two members of the map have the URL" in wrong.output
    assert "give the URLs" in mlpd("replicas", "a").output
    with Client(owner.url) as client:
        client.cluster.step_role("pause", url=follower.url, token="t")
    given_up = mlpd("promote", "a", "--cancel", "--json")
    assert json.loads(given_up.output) == {"epoch": 2}
    assert owner.role()["role"] == "owner"
    done = mlpd("promote", "a", "--yes", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.output)
    assert (answer["from"], answer["to"]) == (owner.url, follower.url)
    assert (answer["epoch"], answer["lost"], answer["lag_rows"]) == (3, False, 0)
    follows(owner)
    runner.env["MLPD_URL"] = follower.url
    taken_off = mlpd("replicas", "a", "--none")
    assert "Shard a has no followers, by the map of epoch 4." in taken_off.output
    back = mlpd("replicas", "a", owner.url, "--dry-run")
    assert f"would have {owner.url}" in back.output
    assert mlpd("promote", "a").output.startswith("error: no follower of shard a answers")
