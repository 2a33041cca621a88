"""The daemon as a whole: what it imports, restarts, kill -9, changed definitions, the audit."""

import asyncio
import random
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from mlpd.client import Client
from mlpd.core.definitions import (
    Aggregate,
    Entity,
    FeatureService,
    FeatureView,
    Source,
    WindowView,
    build_document,
)
from mlpd.core.errors import ConflictError, MlpdError
from mlpd.daemon.app import Daemon
from mlpd.daemon.ingest import Ingested
from mlpd.daemon.read import ReadResult, given_columns
from mlpd.features.ingest import parse_batch

user = Entity("user")
clicks = Source("clicks", timestamp="at", schema={"user": "string", "x": "float64"})
KILLS = 20

HEAVY = ("polars", "lightgbm", "numba", "llvmlite", "scipy", "pandas", "pyarrow", "onnx", "sklearn")


def document(*, window: str = "1h") -> dict[str, Any]:
    load = WindowView("load", user, clicks, [window], [Aggregate.count(), Aggregate.sum("x")])
    last = FeatureView("last", user, clicks, ["x"])
    return build_document([user, clicks, load, last, FeatureService("s", [load, last])])


async def send(daemon: Daemon, rows: list[dict[str, Any]], key: str | None = None) -> Ingested:
    source = daemon.state.catalog.definitions.source("clicks")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return await daemon.ingest.ingest([parse_batch(source, columns, now_us=daemon.clock())], key)


def read(daemon: Daemon, name: str) -> ReadResult:
    closure = daemon.read.closure("s")
    return daemon.read.read(closure, given_columns(closure, [{"user": name}]))


def values(result: ReadResult) -> list[Any]:
    return [column.to_list()[0] for column in result.frame.columns.values()]


def test_the_process_of_a_daemon_imports_nothing_heavy() -> None:
    script = (
        "import asyncio, sys, tempfile, pathlib\n"
        "from mlpd.core.config import Config\n"
        "import mlpd.http.run\n"
        "from mlpd.daemon.app import Daemon\n"
        "async def main():\n"
        "    daemon = Daemon(pathlib.Path(tempfile.mkdtemp(dir=sys.argv[1])), Config())\n"
        "    await daemon.start()\n"
        "    await daemon.stop()\n"
        "asyncio.run(main())\n"
        "print(*sorted(name for name in sys.modules if '.' not in name))\n"
    )
    command = [sys.executable, "-c", script, "/tmp"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "onnxruntime" in loaded
    assert not loaded & set(HEAVY)


def test_a_child_that_joins_imports_nothing_that_serves() -> None:
    script = (
        "import sys\n"
        "from mlpd.daemon import history_child, home_child\n"
        "print(*sorted({'onnxruntime', 'aiohttp', 'mlpd.daemon.routes'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


async def test_a_restart_serves_the_same_bits(open_daemon: Any) -> None:
    async with open_daemon() as daemon:
        await daemon.definitions.apply(document())
        now = daemon.clock()
        await send(daemon, [{"at": now - i, "user": "a", "x": 0.1 * i} for i in range(50)])
        before = values(read(daemon, "a"))
        assert before[0] == 50
    async with open_daemon() as daemon:
        assert values(read(daemon, "a")) == before


async def test_an_idempotency_key_outlives_a_restart(open_daemon: Any) -> None:
    async with open_daemon() as daemon:
        await daemon.definitions.apply(document())
        rows = [{"at": daemon.clock() - 1, "user": "a", "x": 1.0}]
        first = await send(daemon, rows, "once")
    async with open_daemon() as daemon:
        again = await send(daemon, rows, "once")
        assert again.replayed
        assert (again.accepted, again.sequence) == (first.accepted, first.sequence)
        assert values(read(daemon, "a"))[0] == 1


async def test_a_view_that_comes_later_equals_one_that_was_always_there(daemon: Daemon) -> None:
    plain = build_document([user, clicks])
    await daemon.definitions.apply(plain)
    now = daemon.clock()
    rows = [{"at": now - 1_000_000 * i, "user": f"u{i % 3}", "x": float(i)} for i in range(300)]
    await send(daemon, rows)
    await daemon.compactor.run()
    await send(daemon, [{"at": daemon.clock(), "user": "u0", "x": 7.5}])
    plan = await daemon.definitions.apply(document())
    assert plan.backfill == {"last": 301, "load": 301}
    mine = [row["x"] for row in rows if row["user"] == "u0"]
    assert values(read(daemon, "u0")) == [101, sum(mine) + 7.5, 7.5]


async def test_a_view_sees_first_events_that_come_while_it_is_compiled(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    await daemon.definitions.apply(build_document([user, clicks]))
    compiling, go_on = threading.Event(), threading.Event()
    build = daemon.state.build

    def build_slowly(*arguments: Any, **named: Any) -> Any:
        compiling.set()
        assert go_on.wait(40)
        return build(*arguments, **named)

    monkeypatch.setattr(daemon.state, "build", build_slowly)
    applying = asyncio.create_task(daemon.definitions.apply(document()))
    assert await asyncio.to_thread(compiling.wait, 40)
    await send(daemon, [{"at": daemon.clock() - 1, "user": "a", "x": 2.5}])
    go_on.set()
    await applying
    assert values(read(daemon, "a")) == [1, 2.5, 2.5]


async def test_a_replay_may_not_look_into_the_past(daemon: Daemon) -> None:
    await daemon.definitions.apply(document())
    await send(daemon, [{"at": daemon.clock() - 1, "user": "a", "x": 1.0}])
    closure = daemon.read.closure("s")
    with pytest.raises(ConflictError) as refused:
        daemon.read.read(
            closure, given_columns(closure, [{"user": "a"}]), at_us=daemon.clock() // 2
        )
    assert refused.value.code == "at_in_the_past"


async def test_two_applies_of_one_version_leave_one(daemon: Daemon) -> None:
    await daemon.definitions.apply(document(), expected_version=0)
    with pytest.raises(ConflictError) as refused:
        await daemon.definitions.apply(document(window="2h"), expected_version=0)
    assert refused.value.code == "definitions_changed"
    assert daemon.state.catalog.version == 1


@pytest.mark.timeout(300)
def test_nothing_acknowledged_is_lost_in_twenty_kills(serve_process: Any) -> None:
    """Acknowledged rows are in the log and in the features, each once, after every kill -9."""
    with Client(serve_process.url) as client:
        client.apply(document(window="1d"))
    acknowledged = 0
    unknown = 0  # sent when the daemon died: stored or not, both are right
    chance = random.Random(7)
    for _ in range(KILLS):
        count, lost = _send_until_killed(serve_process, chance.uniform(0.05, 0.25))
        acknowledged += count
        unknown += lost
        serve_process.start()
        with Client(serve_process.url) as client:
            columns = client.read_features("s", entities=[{"user": "a"}])["columns"]
            counted = columns["load.count_1d"][0]
            assert acknowledged <= counted <= acknowledged + unknown
            assert columns["load.x_sum_1d"][0] == counted


def _send_until_killed(serve_process: Any, delay_s: float) -> tuple[int, int]:
    """Send rows until the daemon is killed, so long after its first acknowledgement."""
    killer = threading.Timer(delay_s, serve_process.process.kill)
    with Client(serve_process.url) as client:
        _send_row(client)
    count = 1
    killer.start()
    try:
        with Client(serve_process.url, timeout_s=2.0) as client:
            while True:
                _send_row(client)
                count += 1
    except (MlpdError, OSError):
        return count, 1
    finally:
        killer.join()
        serve_process.kill()


def _send_row(client: Client) -> None:
    client.events.send("clicks", [{"at": time.time_ns() // 1000, "user": "a", "x": 1.0}])
