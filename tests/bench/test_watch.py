"""The watch in a server's loop sees when it is held up."""

import asyncio
import json
import time
from pathlib import Path

from bench.bare import bare
from bench.health import sample
from bench.watch import FILE, LoopWatch, ask_delays


def test_a_blocked_loop_shows_as_a_delay_of_that_length(tmp_path: Path) -> None:
    async def block() -> None:
        watch = LoopWatch()
        await asyncio.sleep(0.01)
        time.sleep(0.2)  # noqa: ASYNC251 - the point
        await asyncio.sleep(0.01)
        watch.report(tmp_path / "delays")
        watch.report(tmp_path / "delays")

    asyncio.run(block())
    found, empty = map(json.loads, (tmp_path / "delays").read_text().splitlines())
    assert found == sorted(found)
    assert found[-1] >= 190.0
    assert empty == []


def test_a_watched_server_reports_the_delays_since_it_was_last_asked(tmp_path: Path) -> None:
    file = tmp_path / "delays"
    with bare("ingest", tmp_path / "data", {FILE: str(file)}) as (url, pid):
        waits = asyncio.run(sample(url, 0.1))
        first, second = ask_delays(pid, file), ask_delays(pid, file)
    assert len(waits) == 20
    assert waits == sorted(waits)
    assert len(first) > 0
    assert file.read_text().splitlines() == [json.dumps(first), json.dumps(second)]
