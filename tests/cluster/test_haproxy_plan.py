"""What `mlpd shard haproxy` plans, writes and refuses; without HAProxy."""

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlpd.cli import main
from mlpd.cluster.haproxy.config import Front, parse_files, render_config, write_files
from mlpd.cluster.haproxy.follow import Newest, make_plan
from mlpd.cluster.haproxy.runtime import Haproxy, Running, Server
from mlpd.cluster.members import connections
from mlpd.cluster.placement import first_map
from mlpd.core.errors import MlpdError
from mlpd.core.hashing import SLOTS
from mlpd.core.shards import Shard, ShardMap

CLUSTER = "0f" * 16
pytestmark = pytest.mark.timeout(300)  # the first test may start four daemons and train


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path that is short enough for a socket."""
    with TemporaryDirectory(prefix="hap", dir="/tmp") as name:
        yield Path(name)


def moved(shard_map: ShardMap, slots: Sequence[int], to: str) -> ShardMap:
    """Return the next map, by which some slots are another shard's."""
    owners = list(shard_map.owners)
    for number in slots:
        owners[number] = shard_map.index(to)
    return shard_map.next(shard_map.shards, owners)


def test_a_plan_leaves_slots_where_they_are_rather_than_nowhere() -> None:
    a, b, c = (
        Shard(name, f"http://127.0.0.1:{port}") for name, port in zip("abc", (1, 2, 3), strict=True)
    )
    u = Shard("u", "unix:/run/u.sock")
    two = first_map(CLUSTER, [a, b])
    servers = {n: Server(f"shard_{n}", f"127.0.0.1:{p}") for n, p in (("a", 1), ("b", 2))}
    rows = {str(s): f"shard_{two.owner(s).name}" for s in range(SLOTS)} | {"any": "shard_a"}
    backends = frozenset(("shard_a", "shard_b", "spare_1", "mlpd"))
    now = Running(7, servers, rows, backends)

    def plan(shard_map: ShardMap) -> Any:
        return make_plan(shard_map, now, 1, str)

    same = plan(two)
    assert (same.added, same.readdressed, same.unplaced, same.moved) == ((), (), (), 0)
    four = two.next((a, b, c, u), [slot % 4 for slot in range(SLOTS)])
    grown = plan(four)
    assert grown.added == (("c", "spare_1", "127.0.0.1:3"),)
    assert grown.unplaced == ("u",)
    assert {grown.rows[str(slot)] for slot in range(2, SLOTS, 4)} == {"spare_1"}
    assert all(grown.rows[str(slot)] == rows[str(slot)] for slot in range(3, SLOTS, 4))
    # From TCP to a socket: HAProxy can't, so it stays as it is until a reload.
    on_socket = plan(two.next((a, replace(b, url=u.url)), two.owners))
    assert (on_socket.readdressed, on_socket.unplaced, on_socket.moved) == ((), ("b",), 0)
    # The arbiter has another name.
    first = plan(two.next((Shard("0", "http://127.0.0.1:9"), b), two.owners))
    assert first.rows["any"] == "spare_1"


def test_the_configuration_says_nothing_of_slots(folder: Path) -> None:
    files = parse_files(str(folder / "lb.cfg"), None)
    made = first_map(CLUSTER, [Shard("a", "http://127.0.0.1:1"), Shard("b", "http://[::1]:2")])
    front = Front("127.0.0.1:8790", 2)
    text = render_config(made, front, files)
    assert render_config(moved(made, [1], "a"), front, files) == text
    assert "@" not in text.replace("unix@", "")
    assert "server b [::1]:2" in text
    assert text.count("backend spare_") == 2
    assert write_files(made, front, files) == [files.config, files.map]
    assert write_files(made, front, files) == []
    assert write_files(moved(made, [9000], "a"), front, files) == [files.map]
    assert [path.name for path in sorted(folder.iterdir())] == ["lb.cfg", "lb.map"]


Run = Callable[..., Result]


@pytest.fixture
def mlpd(folder: Path) -> Run:
    runner = CliRunner(env={"COLUMNS": "200"})
    words = ["shard", "haproxy", "--out", str(folder / "lb.cfg")]
    return lambda *more: runner.invoke(main, [*words, *map(str, more)])


def test_the_command_refuses_what_cannot_be(folder: Path, trio: Any, mlpd: Run) -> None:
    url = trio.shards[0].url
    foreign = folder / "other.cfg"
    foreign.write_text("global\n")
    long = folder / ("x" * 80) / "s"
    for words, status, code in (
        (("--url", url, "--follow"), 1, "no_haproxy"),
        (("--url", url, "--follow", "--socket", foreign), 1, "no_haproxy"),
        (("--url", url, "--out", foreign), 1, "not_ours"),
        (("--url", trio.single.url), 1, "no_cluster"),
        (("--url", url, "--bind", "8790"), 2, "invalid_bind"),
        (("--url", url, "--bind", "0.0.0.0:8790"), 2, "invalid_bind"),
        (("--url", url, "--bind", "127.0.0.1:99999"), 2, "invalid_bind"),
        (("--url", url, "--bind", "127.0.0.1:80\n daemon"), 2, "invalid_bind"),
        (("--url", url, "--socket", long), 2, "invalid_path"),
        (("--url", url, "--out", folder / "a b.cfg"), 2, "invalid_path"),
        (("--url", url, "--out", folder / "a.map"), 2, "invalid_path"),
    ):
        refused = mlpd(*words)
        assert refused.exit_code == status, refused.output
        assert f"[{code}]" in refused.output
    assert mlpd("--url", url, "--follow", "--dry-run").exit_code == 2
    missing = mlpd("--url", url, "--out", folder / "no" / "lb.cfg")
    assert (missing.exit_code, "[not_written]" in missing.output) == (1, True)
    assert foreign.read_text() == "global\n"
    assert list(folder.iterdir()) == [foreign]


@contextmanager
def answering(path: Path, answers: dict[str, str]) -> Iterator[None]:
    """Serve a unix socket that answers commands by how they begin, and is no haproxy."""
    stop = threading.Event()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        server.settimeout(0.05)

        def serve() -> None:
            while not stop.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                with connection:
                    asked = connection.recv(1 << 16).decode()
                    said = next((a for c, a in answers.items() if asked.startswith(c)), "")
                    connection.sendall(said.encode())

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(40)


def test_another_program_at_the_socket_is_told_from_haproxy(folder: Path) -> None:
    haproxy = Haproxy(folder / "s.sock", folder / "lb.map")
    info = "Name: HAProxy\nPid: 7\n"
    for answers, code in (
        ({}, "not_haproxy"),
        ({"show info": "hello"}, "not_haproxy"),
        ({"show info": info, "show map": "Unknown map identifier.\n"}, "other_haproxy"),
    ):
        with answering(haproxy.path, answers), pytest.raises(MlpdError) as caught:
            haproxy.load()
        assert caught.value.code == code
        haproxy.path.unlink()
    with (
        answering(haproxy.path, {"": "Permission denied\n"}),
        pytest.raises(MlpdError) as caught,
    ):
        haproxy.replace_map({"1": "shard_a"})
    assert caught.value.code == "haproxy_refused"


def test_the_map_comes_from_whoever_has_the_newest(trio: Any) -> None:
    known = trio.shard_map
    lost = replace(
        known, shards=(replace(known.shards[0], url="http://127.0.0.1:1"), *known.shards[1:])
    )
    with connections("test") as connect:
        assert Newest(replace(lost, epoch=0), connect)() == known
        newer = replace(known, epoch=9)
        assert Newest(newer, connect)() == newer
        with pytest.raises(MlpdError) as caught:
            Newest(replace(known, cluster="aa" * 16), connect)()
        assert caught.value.code == "unavailable"
