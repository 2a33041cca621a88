"""Members that share one registry, its routes and definitions: real daemons, changed anywhere."""

import asyncio
import hashlib
import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlpd import FeatureService
from mlpd.client import Client
from mlpd.cluster.members import connections, survey
from mlpd.core.errors import ConflictError, MlpdError
from mlpd.daemon import shared
from mlpd.daemon.app import Daemon
from mlpd.registry import rows
from mlpd.registry.layout import Layout
from mlpd.registry.records import Cause, Event
from mlpd.storage.leader_store import Lease
from tests.http import edge as edges

pytestmark = pytest.mark.timeout(200)  # the first test starts the trio and trains

ROUTE = {"service": "person", "arms": [{"model": "person@champion"}]}
EXPERIMENT = {
    "unit": "user",
    "arms": {"a": 1.0, "b": 1.0},
    "metrics": [{"name": "bought", "kind": "mean", "better": "higher"}],
    "planned_units": 100,
}


@pytest.fixture(scope="module")
def archives(trio: Any) -> list[bytes]:
    """The trio's model."""
    with Client(trio.single.url) as client:
        first: bytes = client.models.archive("person", 1)
    return [first]


@contextmanager
def serving(root: Path, cache: Path, port: int = 0) -> Iterator[edges.Edge]:
    """Run a daemon on a folder, anew or again."""
    if not (root / "cache").exists():
        (root / "cache").mkdir(parents=True)
        (root / "cache" / "kernels").symlink_to(cache)
    with edges.serve(root, port=port) as edge:
        yield edge


def port_of(edge: edges.Edge) -> int:
    return int(edge.url.rpartition(":")[2])


def shown(edge: edges.Edge) -> dict[str, Any]:
    """What a daemon shows of all that members share; what is its own is left out."""
    with Client(edge.url) as client:
        models = {m["name"]: client.models.get(m["name"]) for m in client.models.list()["models"]}
        return {
            "definitions": client.definitions(),
            "models": models,
            "history": {name: client.models.history(name) for name in models},
            "routes": client.routes.list(),
            "route_history": {
                r["name"]: client.routes.history(r["name"]) for r in client.routes.list()["routes"]
            },
            "experiments": {
                name: {k: client.experiments.get(name)[k] for k in ("spec", "phases", "state")}
                for name in client.experiments.list()["experiments"]
            },
        }


def files_of(edge: edges.Edge) -> dict[str, bytes]:
    """The registry's files that tell what it holds: blobs by name, the journal and the index."""
    root = edge.daemon.paths.registry
    blobs = {p.name: p.read_bytes() for p in (root / "blobs" / "sha256").iterdir()}
    assert all(map(is_whole, (root / "blobs" / "sha256").iterdir()))
    more = {n: (root / n).read_bytes() for n in ("index.json", ".mlpd/journal")}
    return blobs | more


def test_what_is_changed_at_any_member_is_everywhere_when_it_is_answered(
    three: Any, archives: list[bytes], cluster_module: Any
) -> None:
    m = cluster_module
    m.give_map(three)
    arbiter, *_ = three
    rng = random.Random(1)
    more = m.build_document([*m.OBJECTS, FeatureService("more", [m.profile])])
    acts: list[Any] = [
        lambda c: c.apply(m.DOCUMENT, expected_version=0),
        lambda c: c.models.adopt(archives[0]),
        lambda c: c.models.move_alias("person", "champion", 1, why="it is good"),
        lambda c: c.routes.put("person", ROUTE, expected=0),
        lambda c: c.models.pin("person", 1, pinned=True),
        lambda c: c.experiments.put("ages", EXPERIMENT),
        lambda c: c.experiments.put("ages", {**EXPERIMENT, "arms": {"a": 3.0, "b": 1.0}}),
        lambda c: c.apply(more, expected_version=1),
        lambda c: c.routes.put("person", {**ROUTE, "fallback": 0.5}, expected=1),
        lambda c: c.routes.put("other", ROUTE),
        lambda c: c.routes.roll_back("person", 1),
        lambda c: c.experiments.end("ages", "b", why="enough"),
        lambda c: c.routes.delete("other"),
        lambda c: c.models.load("person"),
    ]
    for number, act in enumerate(acts):
        changed = (three[2], *three)[min(number, 3)] if number < 4 else rng.choice(three)
        with Client(changed.url) as client:
            act(client)
        want = shown(arbiter)
        for edge in three[1:]:
            assert shown(edge) == want, number
    assert want["routes"]["routes"][0]["version"] == 3
    assert [files_of(edge) for edge in three[1:]] == [files_of(arbiter)] * 2
    for edge in three:
        assert edge.daemon.models.pins()
        assert edge.daemon.registry.get("person").number == 1
        status = edge.call("GET", "/v1/status")[1]
        assert status["definitions_version"] == 2
        assert (status["shared"]["arbiter"], status["shared"].get("why", "")) == ("a", "")
    followers = arbiter.call("GET", "/v1/status")[1]["shared"]["followers"]
    assert [f["why"] for f in followers.values()] == ["", ""]


def test_of_two_changes_made_from_one_state_at_two_members_one_is_refused(
    three: Any, cluster_module: Any
) -> None:
    m = cluster_module
    m.give_map(three)
    with Client(three[1].url) as client:
        client.apply(m.DOCUMENT)
        client.experiments.put("ages", EXPERIMENT)
    outcomes: list[Any] = []

    def put(edge: Any, weight: float) -> None:
        with Client(edge.url) as client:
            document = m.build_document([*m.OBJECTS, FeatureService(f"s{weight:g}", [m.profile])])
            try:
                outcomes.append(client.apply(document, expected_version=1)["version"])
            except MlpdError as error:
                outcomes.append(error.code)

    threads = [threading.Thread(target=put, args=(e, i)) for i, e in enumerate(three)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, outcomes)) == ["2", "definitions_changed", "definitions_changed"]
    assert [shown(edge) for edge in three[1:]] == [shown(three[0])] * 2


def test_a_member_that_was_down_catches_up_and_one_that_is_cut_off_goes_on(
    tmp_path: Path, transform_cache: Path, archives: list[bytes], cluster_module: Any
) -> None:
    m = cluster_module
    with ExitStack() as stack:
        a, b = (stack.enter_context(serving(tmp_path / n, transform_cache)) for n in "ab")
        with serving(tmp_path / "c", transform_cache) as c:
            made, port = m.give_map([a, b, c]), port_of(c)
            with Client(c.url) as client:
                client.apply(m.DOCUMENT)
                client.models.adopt(archives[0])
                client.models.move_alias("person", "champion", 1)
                client.routes.put("person", ROUTE)
        with Client(b.url) as client:  # c is down: nobody waits for it for long
            for weight in range(1, 4):
                arms = {"a": float(weight), "b": 1.0}
                client.experiments.put("ages", {**EXPERIMENT, "arms": arms})
                client.routes.put("person", {**ROUTE, "fallback": weight / 10})
            client.routes.put("other", ROUTE)
        with serving(tmp_path / "c", transform_cache, port) as c:
            wait_for(c, a)
            assert shown(c) == shown(a)
            assert made.arbiter.name == "a"
    with serving(tmp_path / "c", transform_cache, port) as c, Client(c.url) as client:
        user = next(u for u in m.USERS if made.owner(m.slots_of_row({"user": u})[0]).name == "c")
        (found,) = client.predict("other", [{"user": user, "age": 1.0}])["predictions"]
        assert found["score"] is not None
        with pytest.raises(MlpdError) as refused:
            client.routes.put("person", ROUTE)
        assert (refused.value.code, refused.value.status) == ("arbiter_unreachable", 503)
        assert client.routes.get("person")["version"] == 4
        until(lambda: "gave no answer" in c.daemon.following.why)


def test_a_damaged_file_comes_anew_and_nothing_is_quarantined(
    three: Any, archives: list[bytes], cluster_module: Any
) -> None:
    m = cluster_module
    m.give_map(three)
    with Client(three[0].url) as client:
        client.apply(m.DOCUMENT)
        client.models.adopt(archives[0])
    member, whole = three[2], files_of(three[0])
    blobs = member.daemon.paths.registry / "blobs" / "sha256"
    for path in blobs.iterdir():
        path.chmod(0o644)
        path.write_bytes(b"x" + path.read_bytes()[1:])
    pulled = member.daemon.following.pulled_bytes
    with pytest.raises(MlpdError):
        run_on(member, member.daemon.registry.load("person", 1))
    until(lambda: member.daemon.following.pulled_bytes > pulled)
    until(lambda: all(map(is_whole, blobs.iterdir())))
    assert run_on(member, member.daemon.registry.load("person", 1)).version.state == "ready"
    assert files_of(member) == whole


def is_whole(blob: Path) -> bool:
    return hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name


def test_a_member_with_models_of_its_own_follows_nothing_and_says_so(
    three: Any, archives: list[bytes], cluster_module: Any
) -> None:
    m = cluster_module
    with Client(three[2].url) as client:
        client.apply(m.DOCUMENT)
        client.models.adopt(archives[0])
    made = m.give_map(three)
    until(lambda: "of its own" in three[2].daemon.following.why)
    began_s = time.monotonic()
    with Client(three[0].url) as client:
        client.apply(m.DOCUMENT)
    assert time.monotonic() - began_s < shared.SPREAD_S  # it isn't waited for
    with Client(three[2].url) as client:
        assert client.models.get("person")["versions"]
        assert "of its own" in client.status()["shared"]["why"]
    with connections("a test") as connect:
        _, members = survey(made, connect)
    assert [member.state for member in members] == ["ok", "ok", "not following"]


def test_questions_for_changes_that_make_no_sense_are_refused(
    three: Any, cluster_module: Any
) -> None:
    m = cluster_module
    asks = {"cluster": "x", "shard": "b", "after": 0}
    alone = three[0].call("POST", "/v1/cluster/changes", asks)
    assert alone[1]["error"]["code"] == "not_arbiter"
    made = m.give_map(three)
    asks["cluster"] = made.cluster
    for edge, more, want in (
        (three[1], {"shard": "c"}, "not_arbiter"),
        (three[0], {"cluster": "x"}, "other_cluster"),
        (three[0], {"shard": "z"}, "unknown_shard"),
        (three[0], {"after": 9}, "arbiter_behind"),
        (three[0], {"after": None}, "missing_field"),
        (three[0], {"after": -1}, "invalid_revision"),
    ):
        status, answer, _ = edge.call("POST", "/v1/cluster/changes", {**asks, **more})
        assert (status >= 400, answer["error"]["code"]) == (True, want), more
    for digest, want in (("sha256:" + "0" * 64, "unknown_blob"), ("..", "invalid_digest")):
        found = three[0].call("GET", f"/v1/registry/blobs/{digest}")
        assert found[1]["error"]["code"] == want
    headers = {"x-mlpd-forwarded-by": "c"}
    status, answer, _ = three[1].call("GET", "/v1/runs", None, headers)
    assert (status, answer["error"]["code"]) == (503, "map_behind")


def test_what_differs_from_its_digest_is_not_kept(three: Any, archives: list[bytes]) -> None:
    a, _, c = three
    with Client(a.url) as client:
        client.models.adopt(archives[0])
        version = client.models.get("person")["versions"][0]
    blobs = Layout(a.daemon.paths.registry).blobs
    good = blobs.get(version["digest"])

    async def lie(_: str, file: Any) -> None:
        file.write(good[:-1] + b"x")

    pulling = c.daemon.registry.follower().pull(version["digest"], version["size_bytes"], lie)
    with pytest.raises(MlpdError) as found:
        run_on(c, pulling)
    assert found.value.code == "blob_corrupt"
    assert not list((c.daemon.paths.registry / "blobs" / "sha256").iterdir())


def test_an_event_that_is_another_one_here_is_refused_and_nothing_is_done(
    three: Any, archives: list[bytes]
) -> None:
    a, _, c = three
    for edge in (a, c):
        with Client(edge.url) as client:
            client.models.adopt(archives[0])
    with a.daemon.environment.snapshot() as snapshot:
        events = [Event.decode(row) for row in rows.events(snapshot, 0)]
    before = files_of(c)
    with pytest.raises(ConflictError) as found:
        run_on(c, c.daemon.registry.follower().repeat(events))
    assert found.value.code == "members_differ"
    assert files_of(c) == before


def test_only_the_arbiter_with_the_last_lease_changes_what_is_shared(
    three: Any, archives: list[bytes], cluster_module: Any
) -> None:
    m = cluster_module
    m.give_map(three)
    a, _, c = three
    with Client(c.url) as client:
        client.apply(m.DOCUMENT)
        client.models.adopt(archives[0])
        client.experiments.put("ages", EXPERIMENT)
        cause = Cause("somebody", "past the arbiter")
        for work in (
            c.daemon.registry.pin("person", 1, True, cause),
            c.daemon.routes.put("person", {"service": "person", "arms": []}, by="somebody"),
            c.daemon.experiments.end("ages", "a", by="somebody"),
        ):
            with pytest.raises(MlpdError) as refused:
                run_on(c, work)
            assert refused.value.code in ("not_arbiter", "invalid_route")
        leases = a.daemon.shared
        until(lambda: leases._lease.epoch == 1)
        last = leases._lease
        leases._lease = last._replace(term=last.term - 1)  # as if another had taken over meanwhile
        try:
            with pytest.raises(MlpdError) as lost:
                client.models.pin("person", 1)
            assert lost.value.code == "lease_lost"
            until(lambda: "shows the token" in c.daemon.following.why)
        finally:
            leases._lease = last
        until(lambda: not c.daemon.following.why)
        client.models.pin("person", 1)
        assert client.models.get("person")["pinned"] == [1]


def test_schedules_run_at_the_arbiter_alone_and_a_lost_lease_queues_nothing(
    tmp_path: Path,
    transform_cache: Path,
    cluster_module: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    m = cluster_module

    async def nothing(_: Daemon) -> None:
        """The test ticks."""

    monkeypatch.setattr(Daemon, "_schedule", nothing)
    job = replace(m.train, schedule="every 10 rows of sales")
    document = m.build_document([o for o in m.OBJECTS if o is not m.train] + [job])
    with m.serve_all(tmp_path, 3, transform_cache) as running:
        made, (a, *others) = m.give_map(running), running
        with Client(others[0].url) as client:
            client.apply(document)
            for edge in running:
                assert run_on(edge, edge.daemon.scheduler.tick()) == []  # from now on
            m.send_split(made, running, m.sale_columns(200))
            for edge in others:
                assert run_on(edge, edge.daemon.scheduler.tick()) == []
            last = a.daemon.shared._lease
            a.daemon.shared._lease = last._replace(term=last.term - 1)
            assert run_on(a, a.daemon.scheduler.tick()) == []
            a.daemon.shared._lease = last
            (run,) = run_on(a, a.daemon.scheduler.tick())
            assert [r["run_id"] for r in client.runs.list()["runs"]] == [run.run_id]
            client.runs.cancel(run.run_id)


def test_every_start_takes_the_lease_with_a_greater_token(
    tmp_path: Path, transform_cache: Path
) -> None:
    found = []
    for _ in range(3):
        with serving(tmp_path / "d", transform_cache) as edge:
            found.append(edge.daemon.shared._lease)
    assert found == [Lease(0, 1), Lease(0, 2), Lease(0, 3)]


def run_on(edge: Any, work: Any) -> Any:
    """Run a coroutine on a daemon's loop."""
    return asyncio.run_coroutine_threadsafe(work, edge.loop).result(30)


def wait_for(member: Any, arbiter: Any) -> None:
    """Wait until a member has come to what the arbiter has."""
    revision = arbiter.daemon.shared.revision()
    assert run_on(member, member.daemon.following.reach(revision, 20.0))


def until(reached: Any, seconds: float = 20.0) -> None:
    end_s = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end_s
        time.sleep(0.01)
