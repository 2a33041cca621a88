"""Debian's HAProxy finds our slots, follows the map without a reload, and says what is down."""

import base64
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self
from urllib.parse import quote

import pytest
from click.testing import CliRunner, Result

from mlpd.cli import main
from mlpd.cluster.haproxy.config import Files, Front, parse_files, write_files
from mlpd.cluster.haproxy.follow import Done, Follower
from mlpd.cluster.haproxy.runtime import Haproxy, Server
from mlpd.cluster.placement import first_map
from mlpd.core.columns import DType
from mlpd.core.hashing import SLOTS, slot_of
from mlpd.core.keys import encode_entity
from mlpd.core.shards import Shard, ShardMap

PROGRAM = shutil.which("haproxy")
CLUSTER = "0f" * 16
pytestmark = pytest.mark.timeout(300)  # the first test may start four daemons and train
KEYS = 100_000
PER_SEND = 250
TEXT, INT, BYTES = "x-mlpd-key", "x-mlpd-key-int", "x-mlpd-key-bytes"
DEADLINE_S = 40.0

with_haproxy = pytest.mark.skipif(
    PROGRAM is None, reason="haproxy is not installed (Debian has it): not tried"
)

Key = tuple[str, str, int]
"""A header, its value, and the slot of the key that it tells."""


def slot(types: Sequence[DType], *parts: object) -> int:
    encoded = encode_entity(types, parts, "e")
    assert encoded is not None
    return slot_of(encoded)


def text_key(text: str) -> Key:
    return TEXT, quote(text, safe=""), slot([DType.STRING], text)


def int_key(number: int) -> Key:
    return INT, str(number), slot([DType.INT64], number)


def bytes_key(types: Sequence[DType], *parts: object) -> Key:
    encoded = encode_entity(types, parts, "e")
    assert encoded is not None
    return BYTES, base64.urlsafe_b64encode(encoded).decode(), slot_of(encoded)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


class Shards:
    """Tiny shards that answer any request with their name, at `urls`, until closed."""

    def __init__(self) -> None:
        self.urls: dict[str, str] = {}
        self._servers: dict[str, ThreadingHTTPServer] = {}

    def start(self, name: str) -> Shard:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16  # one packet an answer

            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(name)))
                self.end_headers()
                self.wfile.write(name.encode())

            def log_message(self, *_: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """Be quiet: haproxy resets the connections of its health checks."""

        server = self._servers[name] = Quiet(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        self.urls[name] = f"http://127.0.0.1:{server.server_port}"
        return Shard(name, self.urls[name])

    def close(self) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()


@pytest.fixture
def shards() -> Iterator[Shards]:
    made = Shards()
    yield made
    made.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path that is short enough for a socket."""
    with TemporaryDirectory(prefix="hap", dir="/tmp") as name:
        yield Path(name)


@contextmanager
def running(files: Files, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run haproxy in the foreground; ready when the block begins, gone when it ends."""
    assert PROGRAM is not None
    log = files.config.with_suffix(".log")
    with log.open("ab") as out:
        command = [PROGRAM, "-db", "-f", str(files.config)]
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        until(lambda: listens(port), log.read_text)
        yield process
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


def listens(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def until(holds: Callable[[], bool], why: Callable[[], object] = lambda: "") -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline_s, why()
        time.sleep(0.01)


def ask(port: int, key: Key | None = None, path: str = "/") -> tuple[int, str]:
    headers = {} if key is None else {key[0]: key[1]}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def key_in(owned: Sequence[int]) -> Key:
    """Return a key of one of some slots."""
    wanted = set(owned)
    return next(key for i in range(10**6) if (key := text_key(f"k{i}"))[2] in wanted)


def random_keys(count: int) -> list[Key]:
    """Return keys of all kinds, those that are hard among them."""
    rng = random.Random(11)
    alphabet = "ab{}{}%+?&=, \"'\\\0\n/#7Bé日𝄞" + "xyz" * 5
    keys: list[Key] = []
    while len(keys) < count:
        text = "".join(rng.choices(alphabet, k=rng.randrange(12)))
        number = rng.getrandbits(64) - 2**63
        raw = rng.randbytes(rng.randrange(12))
        braced = int.from_bytes(b"{" + rng.randbytes(3) + b"}" + rng.randbytes(3), "big")
        keys += [text_key(text), text_key(f"user:{number}"), text_key("q" * rng.randrange(470))]
        keys += [int_key(number), int_key(rng.randrange(10**6)), int_key(braced)]
        keys += [
            bytes_key([DType.BYTES], raw),
            bytes_key([DType.STRING, DType.INT64], text, number),
        ]
    return keys[:count]


def ask_slots(port: int, keys: Sequence[Key]) -> list[int]:
    """Return the slot that haproxy has computed for each key, over one connection."""
    found: list[int] = []
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for first in range(0, len(keys), PER_SEND):
            some = keys[first : first + PER_SEND]
            lines = [f"GET / HTTP/1.1\r\nHost: x\r\n{h}: {value}\r\n\r\n" for h, value, _ in some]
            connection.sendall("".join(lines).encode())
            answer, slots = b"", []
            while len(slots) < len(some):
                part = connection.recv(1 << 16)
                assert part, answer[-500:]
                answer += part
                slots = re.findall(rb"slot=(-?\d*);", answer)
            found += [int(text or -1) for text in slots]
    return found


@with_haproxy
def test_haproxy_computes_our_slots(folder: Path) -> None:
    files, port = parse_files(str(folder / "lb.cfg"), None), free_port()
    made = first_map(CLUSTER, [Shard("a", "http://127.0.0.1:9")])
    write_files(made, Front(f"127.0.0.1:{port}", 0), files)
    told = (
        'http-request return status 200 content-type text/plain lf-string "slot=%[var(txn.slot)];"'
    )
    config = files.config.read_text()
    assert config.count("use_backend") == 1
    files.config.write_text(config.replace("use_backend", f"{told}\n    use_backend"))
    keys = random_keys(KEYS)
    published = {"B6": 1271, "": 566, "héllo": 10605, "1": 417, "{42}.cart": 697, "{42}.user": 697}
    keys[:0] = [(TEXT, quote(text), number) for text, number in published.items()]
    keys += [(TEXT, "{42}.cart", 697), (TEXT, "%7b42%7D.cart", 697), text_key("a{}{b}")]
    keys += [(INT, "1", 4580), (INT, "-1", 12649), (BYTES, "YgD__wAA", 4692)]
    keys += [(BYTES, "c0I2AABpgAAAAAAAACo=", 10938), (BYTES, "c0I2AABpgAAAAAAAACo", 10938)]
    keys += [int_key(2**63 - 1), int_key(-(2**63)), bytes_key([DType.STRING], "x" * 500)]
    with running(files, port):
        found = ask_slots(port, keys)
    wrong = [(key, got) for key, got in zip(keys, found, strict=True) if key[2] != got]
    assert (len(wrong), wrong[:5]) == (0, [])


@with_haproxy
def test_a_header_without_a_slot_is_refused(folder: Path) -> None:
    files, port = parse_files(str(folder / "lb.cfg"), None), free_port()
    write_files(
        first_map(CLUSTER, [Shard("a", "http://127.0.0.1:9")]), Front(f"127.0.0.1:{port}", 0), files
    )
    rubbish = [(TEXT, "50%"), (TEXT, "%zz"), (TEXT, "x" * 478), (TEXT, "%00" * 240)]
    rubbish += [
        (INT, ""),
        (INT, "1.5"),
        (INT, "1e3"),
        (INT, "+1"),
        (INT, "9" * 20),
        (INT, "0x1"),
    ]
    rubbish += [(BYTES, "*"), (BYTES, "YgD//wAA"), (BYTES, "A")]
    with running(files, port):
        for header, value in rubbish:
            status, body = ask(port, (header, value, 0))
            assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_key_header"), value
        connection = HTTPConnection("127.0.0.1", port, timeout=10)
        for pair in ((TEXT, TEXT), (TEXT, INT), (INT, BYTES)):
            connection.putrequest("GET", "/")
            for header in pair:
                connection.putheader(header, "1")
            connection.endheaders()
            answer = connection.getresponse()
            assert (answer.status, "x-mlpd-key-int" in answer.read().decode()) == (400, True)
        connection.close()


class Load(threading.Thread):
    """Asks for keys in turns over one connection until stopped; keeps what isn't a 200."""

    def __init__(self, port: int, keys: Sequence[Key]) -> None:
        super().__init__()
        self.port, self.keys = port, keys
        self.stopped = threading.Event()
        self.done = 0
        self.failed: list[bytes] = []

    def run(self) -> None:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        while not self.stopped.is_set():
            header, value, _ = self.keys[self.done % len(self.keys)]
            try:
                connection.request("GET", "/", headers={header: value})
                answer = connection.getresponse()
                body = answer.read()
                if answer.status != 200:
                    self.failed.append(body)
            except OSError as error:
                self.failed.append(repr(error).encode())
                connection.close()
            self.done += 1
        connection.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.join(DEADLINE_S)


def moved(shard_map: ShardMap, slots: Sequence[int], to: str) -> ShardMap:
    """Return the next map, by which some slots are another shard's."""
    owners = list(shard_map.owners)
    for number in slots:
        owners[number] = shard_map.index(to)
    return shard_map.next(shard_map.shards, owners)


@dataclass
class Balanced:
    """A running haproxy before tiny shards a, b and c; `newest` holds the maps, the last counts."""

    port: int
    files: Files
    haproxy: Haproxy
    follower: Follower
    newest: list[ShardMap]
    keys: dict[str, Key]
    process: "subprocess.Popen[bytes]"
    load: Load

    def follow(self) -> Done:
        """Look once; something was to be done."""
        done = self.follower.step()
        assert done is not None
        return done

    def ask(self, key: Key | None) -> tuple[int, str]:
        """Ask through haproxy."""
        return ask(self.port, key)


@pytest.fixture
def balanced(folder: Path, shards: Shards) -> Iterator[Balanced]:
    files, port = parse_files(str(folder / "lb.cfg"), None), free_port()
    first = first_map(CLUSTER, [shards.start(name) for name in "abc"])
    front, newest = Front(f"127.0.0.1:{port}", 1), [first]
    write_files(first, front, files)
    haproxy = Haproxy(files.socket, files.map)
    follower = Follower(files, front, haproxy, lambda: newest[-1])
    keys = {name: key_in(first.slots_of(name)) for name in "abc"}
    with running(files, port) as process, Load(port, [*keys.values()]) as load:
        yield Balanced(port, files, haproxy, follower, newest, keys, process, load)
        until(lambda: load.done > 200)
        if process.poll() is None:
            assert haproxy.pid() == process.pid
            assert load.failed == []


@with_haproxy
def test_slots_move_without_a_reload_or_a_lost_request(balanced: Balanced) -> None:
    keys, files, haproxy, newest = (
        balanced.keys,
        balanced.files,
        balanced.haproxy,
        balanced.newest,
    )
    (first,) = newest
    assert [balanced.ask(keys[name]) for name in "abc"] == [(200, name) for name in "abc"]
    assert balanced.ask(None) == (200, "a")
    done = balanced.follow()
    assert (done.epoch, done.pid, done.slots, done.files) == (1, balanced.process.pid, 0, ())
    assert balanced.follower.step() is None
    # One slot, after a kill -9 half-way; then a quarter of them.
    newest.append(moved(first, [keys["a"][2]], "c"))
    killed = haproxy.ask(f"prepare map {files.map}").split()[-1]
    haproxy.order(f"add map @{killed} {files.map} <<\n{keys['a'][2]} nowhere\n")
    assert balanced.ask(keys["a"]) == (200, "a")
    done = balanced.follow()
    assert (done.epoch, done.slots, done.files) == (2, 1, (str(files.map),))
    assert balanced.ask(keys["a"]) == (200, "c")
    newest.append(moved(newest[-1], first.slots_of("b")[: SLOTS // 4], "a"))
    assert balanced.follow().slots == SLOTS // 4
    assert balanced.ask(key_in(newest[-1].slots_of("b"))) == (200, "b")
    assert balanced.ask(keys["b"]) == (200, "a")
    assert haproxy.load().rows == {
        **{str(number): f"shard_{newest[-1].owner(number).name}" for number in range(SLOTS)},
        "any": "shard_a",
    }


@with_haproxy
def test_shards_move_and_join_without_a_reload_while_there_are_spares(
    balanced: Balanced, shards: Shards
) -> None:
    keys, newest = balanced.keys, balanced.newest
    (first,) = newest
    a, b, c = first.shards
    b = replace(b, url=shards.start("b2").url)
    d, e = shards.start("d"), shards.start("e")
    owners, fifth = list(first.owners), key_in([5])
    owners[keys["c"][2]], owners[5] = 3, 4
    newest.append(first.next((a, b, c, d, e), owners))
    # By a kill -9 before it was enabled.
    address = d.url.removeprefix("http://")
    assert "registered" in balanced.haproxy.ask(f"add server spare_1/d {address} check")
    done = balanced.follow()
    assert (done.added, done.readdressed, done.reload_needed) == (("d",), ("b",), ("e",))
    assert done.files == (str(balanced.files.config), str(balanced.files.map))
    assert balanced.ask(keys["c"]) == (200, "d")
    assert balanced.ask(keys["b"]) == (200, "b2")
    assert balanced.ask(fifth) == (200, first.owner(5).name)
    assert balanced.haproxy.pid() == balanced.process.pid
    # A restart goes by the files: each has a backend of its own, and nothing is left to set.
    balanced.process.terminate()
    balanced.process.wait(DEADLINE_S)
    with running(balanced.files, balanced.port):
        assert balanced.ask(fifth) == (200, "e")
        assert balanced.ask(keys["c"]) == (200, "d")
        done = balanced.follow()
        assert (done.slots, done.added, done.reload_needed, done.files) == (0, (), (), ())
        found = balanced.haproxy.load().servers["d"]
        assert found == Server("shard_d", address)


@with_haproxy
def test_real_shards_answer_through_it(folder: Path, trio: Any, cluster_module: Any) -> None:
    files, port = parse_files(str(folder / "lb.cfg"), None), free_port()
    write_files(trio.shard_map, Front(f"127.0.0.1:{port}", 0), files)

    def read(service: str, row: dict[str, Any], key: Key | None) -> tuple[int, Any]:
        body = {"service": service, "entities": [row], "at": cluster_module.AT_US}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/features/read",
            json.dumps(body).encode(),
            {"content-type": "application/json", **({} if key is None else {key[0]: key[1]})},
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    with running(files, port):
        for service, rows in (
            ("person", [({"user": u, "age": 1.0}, text_key(u)) for u in cluster_module.USERS]),
            ("place", [({"shop": s}, int_key(s)) for s in cluster_module.SHOPS]),
        ):
            for row, key in rows:
                status, answer = read(service, row, key)
                assert status == 200, answer
                body = {"service": service, "entities": [row], "at": cluster_module.AT_US}
                _, alone, _ = trio.single.call("POST", "/v1/features/read", body)
                for known in (answer, alone):
                    for name in ("sequence", "t_us"):
                        known.pop(name, None)
                assert answer == alone
        stranger = next(u for u in cluster_module.USERS if text_key(u)[2] >= SLOTS // 2)
        for key in (None, key_in([3])):
            status, answer = read("person", {"user": stranger, "age": 1.0}, key)
            assert (status, answer["error"]["code"]) == (421, "wrong_shard")
        assert ask(port, path="/v1/status")[0] == 200


@with_haproxy
def test_a_shard_that_is_down_costs_its_keys_alone_and_comes_back(
    folder: Path, shards: Shards
) -> None:
    files, port = parse_files(str(folder / "lb.cfg"), None), free_port()
    gone = free_port()
    made = first_map(CLUSTER, [shards.start("a"), Shard("b", f"http://127.0.0.1:{gone}")])
    write_files(made, Front(f"127.0.0.1:{port}", 0), files)
    keys = [key_in(made.slots_of(name)) for name in "ab"]
    with running(files, port):
        # Before the health checks have failed, and after.
        for _ in range(2):
            status, body = ask(port, keys[1])
            error = json.loads(body)["error"]
            assert (status, error["code"]) == (503, "shard_down")
            assert "shard_b" in error["message"]
            assert ask(port, keys[0]) == (200, "a")
            until(lambda: "DOWN" in Haproxy(files.socket, files.map).ask("show stat"))
        back = replace(made.shards[1], url=shards.start("b").url)
        newest = made.next((made.shards[0], back), made.owners)
        Follower(
            files, Front("127.0.0.1:1", 0), Haproxy(files.socket, files.map), lambda: newest
        ).step()
        until(lambda: ask(port, keys[1]) == (200, "b"))


@with_haproxy
def test_a_shard_on_a_socket_joins_and_one_that_hangs_up_is_told(
    balanced: Balanced, folder: Path
) -> None:
    path, (first,) = folder / "d.sock", balanced.newest
    balanced.load.keys = [balanced.keys["a"], balanced.keys["b"]]
    began = balanced.load.done
    until(lambda: balanced.load.done > began + 3)
    owners = [
        3 if slot == balanced.keys["c"][2] else owner for slot, owner in enumerate(first.owners)
    ]
    balanced.newest.append(first.next((*first.shards, Shard("d", f"unix:{path}")), owners))
    ready = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    stop = threading.Event()

    def serve() -> None:
        """Answer health checks, and hang up on everything else."""
        while not stop.is_set():
            with suppress(TimeoutError):
                connection, _ = server.accept()
                with connection:
                    asked = connection.recv(1 << 16)
                    if asked.startswith(b"GET /readyz "):
                        connection.sendall(ready)

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        server.settimeout(0.05)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            done = balanced.follow()
            assert (done.added, done.reload_needed) == (("d",), ())
            assert balanced.haproxy.load().servers["d"] == Server("spare_1", "unix")
            status, body = balanced.ask(balanced.keys["c"])
            assert (status, json.loads(body)["error"]["code"]) == (502, "shard_lost")
        finally:
            balanced.newest.append(balanced.newest[-1].next(first.shards, first.owners))
            balanced.follow()
            stop.set()
            thread.join(DEADLINE_S)


Run = Callable[..., Result]


@pytest.fixture
def mlpd(folder: Path) -> Run:
    runner = CliRunner(env={"COLUMNS": "200"})
    words = ["shard", "haproxy", "--out", str(folder / "lb.cfg")]
    return lambda *more: runner.invoke(main, [*words, *map(str, more)])


@with_haproxy
def test_the_command_writes_and_follows(folder: Path, trio: Any, mlpd: Run) -> None:
    url, port = trio.shards[1].url, free_port()
    where = ("--url", url, "--bind", f"127.0.0.1:{port}")
    dry = mlpd(*where, "--dry-run")
    assert (dry.exit_code, "backend shard_c" in dry.output) == (0, True), dry.output
    assert list(folder.iterdir()) == []
    files = parse_files(str(folder / "lb.cfg"), None)
    done = mlpd(*where, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["written"] == [str(files.config), str(files.map)]
    assert "Nothing had changed." in mlpd(*where).output
    checked = subprocess.run(
        [str(PROGRAM), "-c", "-f", str(files.config)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert "WARNING" not in checked.stderr + checked.stdout
    command = [sys.executable, "-m", "mlpd", "shard", "haproxy", "--out", str(files.config)]
    with ExitStack() as stack:
        first = stack.enter_context(running(files, port))
        process = stack.enter_context(
            subprocess.Popen(
                [*command, *where, "--follow", "--json", "--every", "0.05"],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        )
        stack.callback(process.kill)
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert (said["pid"], said["epoch"], said["slots"]) == (first.pid, 1, 0)
        first.terminate()
        first.wait(DEADLINE_S)
        assert json.loads(process.stdout.readline())["error"]["code"] == "no_haproxy"
        second = stack.enter_context(running(files, port))
        assert json.loads(process.stdout.readline())["pid"] == second.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
