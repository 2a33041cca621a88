"""What tests of followers share: daemons in threads that change their roles, and whole states."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlpd.client import Client
from mlpd.cluster.members import connections
from mlpd.cluster.placement import first_map
from mlpd.cluster.replica.beside import Companion
from mlpd.cluster.replica.listing import set_replicas, with_replicas
from mlpd.core.config import (
    Config,
    LimitsConfig,
    MonitoringConfig,
    ReplicaConfig,
    ServerConfig,
    StorageConfig,
)
from mlpd.core.shards import Shard, ShardMap, decode_map
from mlpd.core.time import DAY_US, SECOND_US
from mlpd.http.run import serve_until
from mlpd.storage.tables import Table

FILES = ("segments", "predictions", "registry/blobs")


class Watched(Companion):
    """A companion that shows the daemon that runs."""

    daemon: Any = None

    async def run(self, daemon: Any, url: str) -> None:
        self.daemon = daemon
        await super().run(daemon, url)


@dataclass
class Node:
    """A daemon on a directory of its own, in a thread: what `mlpd serve` runs, without signals."""

    directory: Path
    replica: ReplicaConfig = field(default_factory=ReplicaConfig)
    url: str = ""
    told: list[str] = field(default_factory=list)
    companion: Watched = field(init=False)
    _thread: threading.Thread | None = None
    _stop: "tuple[asyncio.AbstractEventLoop, asyncio.Event] | None" = None
    _error: BaseException | None = None

    def start(self, follow: str | None = None, *, discard: bool = False) -> "Node":
        port = int(self.url.rsplit(":", 1)[1]) if self.url else 0
        config = Config(
            server=replace(ServerConfig(port=port), drain_timeout_us=SECOND_US),
            limits=LimitsConfig(*(60 * SECOND_US,) * 3),
            storage=StorageConfig(compact_rows=10_000_000, compact_interval_us=DAY_US),
            monitoring=MonitoringConfig(audit_us=DAY_US),
            replica=self.replica,
        )
        up = threading.Event()

        def ready(url: str) -> None:
            self.url = url
            up.set()

        async def main() -> None:
            stop = asyncio.Event()
            self._stop = asyncio.get_running_loop(), stop
            self.companion = Watched(follow, self.told.append, discard=discard)
            await serve_until(stop, config, self.directory, ready, self.companion)

        def run() -> None:
            try:
                asyncio.run(main())
            except BaseException as error:  # noqa: BLE001 - told to the test
                self._error = error
            finally:
                up.set()

        self._error = None
        self._thread = threading.Thread(target=run)
        self._thread.start()
        assert up.wait(50)
        if self._error is not None:
            self._thread.join()
            self._thread = None
            raise self._error
        return self

    def stop(self) -> None:
        if self._thread is None or self._stop is None:
            return
        if self._thread.is_alive():
            loop, stop = self._stop
            loop.call_soon_threadsafe(stop.set)
            self._thread.join(30)
            assert not self._thread.is_alive()
        self._thread = None
        if self._error is not None:
            raise self._error

    @property
    def daemon(self) -> Any:
        """The daemon that runs now; another one after its role has changed."""
        return eventually(lambda: self.companion.daemon)

    def do(self, work: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        """Do something on the daemon's loop, with the daemon; return what it returned."""
        assert self._stop is not None
        return asyncio.run_coroutine_threadsafe(work(self.daemon), self._stop[0]).result(40)

    def role(self) -> Any:
        with Client(self.url, timeout_s=10) as client:
            return client.cluster.role()


@contextmanager
def nodes(root: Path, count: int, **how: Any) -> Iterator[list[Node]]:
    """Yield nodes that aren't started; all are stopped in the end."""
    made = [Node(root / f"n{i}", ReplicaConfig(**how)) for i in range(count)]
    try:
        yield made
    finally:
        for node in made:
            node.stop()


def eventually(test: Callable[[], Any], seconds: float = 40.0) -> Any:
    """Return what a test returns once that is true."""
    until_s = time.monotonic() + seconds
    while True:
        try:
            found = test()
        except Exception:
            if time.monotonic() > until_s:
                raise
            found = None
        if found:
            return found
        assert time.monotonic() < until_s, "it never came true"
        time.sleep(0.03)


def make_map(members: dict[str, str]) -> ShardMap:
    """Make a cluster of running daemons, by name."""
    made = first_map("0f" * 16, [Shard(name, url) for name, url in members.items()])
    for name, url in members.items():
        with Client(url) as client:
            client.cluster.put_map(made.to_dict(), shard=name, expected=0)
    return made


def map_at(url: str) -> ShardMap:
    with Client(url) as client:
        return decode_map(client.cluster.map()["map"])


def write_replicas(url: str, name: str, urls: list[str]) -> ShardMap:
    with connections("test") as connect:
        new = with_replicas(map_at(url), name, urls)
        assert not set_replicas(new, connect)
    return new


def tables_of(node: Node) -> dict[Any, Any]:
    """Return all tables of a running daemon."""
    with node.daemon.environment.snapshot() as snapshot:
        return {table: list(snapshot.scan(table)) for table in Table}


def files_of(node: Node) -> dict[Any, Any]:
    return {
        path.relative_to(node.directory).as_posix(): path.read_bytes()
        for folder in FILES
        for path in sorted((node.directory / folder).rglob("*"))
        if path.is_file()
    }


def differences(owner: Node, follower: Node) -> list[str]:
    """Return what differs at the same commit: tables, and files that the follower has."""
    for _ in range(200):
        eventually(lambda: owner.role()["head"] == follower.role()["head"])
        left, right = tables_of(owner), tables_of(follower)
        if left[Table.META] == right[Table.META]:  # no background write came in between
            break
    ours, theirs = files_of(owner), files_of(follower)
    return [
        *(str(table) for table in Table if left[table] != right[table]),
        *(path for path, data in theirs.items() if ours.get(path) != data),
    ]
