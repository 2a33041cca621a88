"""`mlpd shard` on real daemons: says what it does, does all or nothing, finishes what it began."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlpd.cli import main
from mlpd.cli.local_cluster import make_one
from mlpd.client import Client
from mlpd.cluster.members import Member, _judge
from mlpd.core.errors import ConflictError
from mlpd.core.shards import Shard

Run = Callable[..., Result]


@pytest.fixture
def mlpd() -> Run:
    runner = CliRunner(env={"COLUMNS": "200"})
    return lambda *words: runner.invoke(main, [str(word) for word in words])


def named(running: list[Any]) -> list[str]:
    return [f"{name}={edge.url}" for name, edge in zip("abc", running, strict=True)]


def test_daemons_are_made_one_once_and_are_only_that_one(three: Any) -> None:
    urls = {name: edge.url for name, edge in zip("abc", three, strict=True)}
    make_one({"a": urls["a"], "b": urls["b"]})
    assert epochs(three) == [1, 1, 0]
    make_one({"a": urls["a"], "b": urls["b"]})
    assert epochs(three) == [1, 1, 0]
    for others in (urls, {"a": urls["a"]}, {"a": urls["b"], "b": urls["a"]}):
        with pytest.raises(ConflictError) as refused:
            make_one(others)
        assert refused.value.code == "other_cluster_here"
        assert f"b = {urls['b'].rpartition(':')[2]}" in refused.value.hint
    assert epochs(three) == [1, 1, 0]


def epochs(running: list[Any]) -> list[int]:
    return [edge.daemon.ownership.epoch for edge in running]


def test_a_cluster_is_made_shown_and_finished(three: Any, cluster_module: Any, mlpd: Run) -> None:
    members = named(three)
    dry = mlpd("shard", "init", *members, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "every daemon is ready" in dry.output
    assert "Nothing was changed." in dry.output
    assert "5461-10921" in dry.output
    assert epochs(three) == [0, 0, 0]
    # A command that died when the first one had the map.
    begun = cluster_module.map_of(three)
    with Client(three[0].url) as client:
        client.cluster.put_map(begun.to_dict(), shard="a", expected=0)
    half = mlpd("shard", "status", "--url", three[0].url)
    assert half.exit_code == 1
    assert half.output.count("no map") == 2
    done = mlpd("shard", "init", *members, "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.output)
    assert (answer["map"], answer["given_to"]) == (begun.to_dict(), ["a", "b", "c"])
    assert epochs(three) == [1, 1, 1]
    listed = json.loads(mlpd("shard", "list", "--url", three[2].url, "--json").output)
    assert listed == begun.to_dict()
    shown = mlpd("shard", "list", "--url", three[2].url).output
    assert "arbiter  a" in shown
    assert "10922-16383" in shown
    found = mlpd("shard", "status", "--url", three[1].url, "--json")
    assert found.exit_code == 0
    status = json.loads(found.output)
    assert [shard["state"] for shard in status["shards"]] == ["ok"] * 3
    assert sum(shard["slots"] for shard in status["shards"]) == 16384
    other = mlpd("shard", "init", *members[:2])
    assert other.exit_code == 1
    assert "[already_member]" in other.output


def test_a_cluster_is_not_made_unless_all_agree(three: Any, cluster_module: Any, mlpd: Run) -> None:
    with Client(three[2].url) as client:
        client.apply(cluster_module.DOCUMENT)
        client.events.send("notes", [{"event_time": 1, "text": "x"}])
    for members, code in (
        (named(three), "slots_hold_data"),
        ([*named(three)[:2], "c=http://127.0.0.1:1"], "member_unavailable"),
        ([*named(three)[:2], f"d={three[1].url}"], "repeated_url"),
        ([*named(three)[:2], f"b={three[2].url}"], "repeated_shard"),
        (["a", "b"], "invalid_member"),
        ([f"A B={three[0].url}"], "invalid_name"),
        (["a=ftp://x"], "invalid_map"),
    ):
        refused = mlpd("shard", "init", *members)
        assert refused.exit_code == 1, refused.output
        assert f"[{code}]" in refused.output
        assert epochs(three) == [0, 0, 0]
    assert "shard c at" in mlpd("shard", "init", *named(three)).output
    single = mlpd("shard", "list", "--url", three[0].url)
    assert (single.exit_code, "[no_cluster]" in single.output) == (1, True)
    assert mlpd("shard", "init").exit_code == 2


def test_who_is_not_where_the_newest_map_says(three: Any, cluster_module: Any, mlpd: Run) -> None:
    first = cluster_module.map_of(three)
    a, b, c = first.shards
    second = first.next((a, replace(b, replicas=("http://127.0.0.1:9",)), c), first.owners)
    theirs = first.next((a, replace(b, replicas=("http://127.0.0.1:8",)), c), first.owners)
    for edge, made, name in ((three[0], second, "a"), (three[1], first, "b")):
        with Client(edge.url) as client:
            client.cluster.put_map(made.to_dict(), shard=name, expected=0)

    def states() -> list[str]:
        found = mlpd("shard", "status", "--url", three[1].url, "--json")
        assert found.exit_code == 1
        answer = json.loads(found.output)
        assert answer["epoch"] == 2
        return [shard["state"] for shard in answer["shards"]]

    assert states() == ["ok", "behind", "no map"]
    with Client(three[1].url) as client:
        client.cluster.put_map(theirs.to_dict(), shard="b", expected=1)
    with Client(three[2].url) as client:
        foreign = cluster_module.map_of(three, cluster="aa" * 16)
        client.cluster.put_map(foreign.to_dict(), shard="c", expected=0)
    assert sorted(states()) == ["another cluster", "another map", "ok"]


def test_a_daemon_under_another_name_is_noticed(cluster_module: Any) -> None:
    shards = [Shard("a", "http://127.0.0.1:1"), Shard("b", "http://127.0.0.1:2")]
    made = cluster_module.first_map("0f" * 16, shards)
    found = Member("a", "http://127.0.0.1:2", "ok", 1, made.digest, "1", 0, map=made.to_dict())
    assert _judge(found, made).state == "another shard"
    assert _judge(replace(found, shard="b"), made).state == "ok"
