"""A 1 ms timer in a server's event loop: how late it comes is how long the loop was held up.

    python -m bench.watch serve ...     the daemon as `mlpd serve ...`, with the timer in its loop

SIGUSR1 appends a line of JSON to the file that $BENCH_WATCH names, with the delays since the last.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PERIOD_S = 0.001
FILE = "BENCH_WATCH"


class LoopWatch:
    """Measures the running loop from now on; `report` starts anew."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._delays: list[float] = []
        self._due = self._loop.time() + PERIOD_S
        self._loop.call_at(self._due, self._tick)

    def report(self, file: Path) -> None:
        """Append the delays in ascending order, in milliseconds, to `file`."""
        found, self._delays = sorted(self._delays), []
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps([round(1e3 * delay, 3) for delay in found]) + "\n")

    def _tick(self) -> None:
        now = self._loop.time()
        self._delays.append(now - self._due)
        self._due = now + PERIOD_S
        self._loop.call_at(self._due, self._tick)


def watch_loop() -> None:
    """Watch the running loop if $BENCH_WATCH names a file."""
    name = os.environ.get(FILE)
    if name is None:
        return
    watch = LoopWatch()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, watch.report, Path(name))


def ask_delays(pid: int, file: Path, *, deadline_s: float = 30.0) -> list[float]:
    """Return the delays that the watched process counted since it was last asked."""
    before = _lines(file)
    os.kill(pid, signal.SIGUSR1)
    stop = time.monotonic() + deadline_s
    while len(lines := _lines(file)) == len(before):
        if time.monotonic() > stop:
            raise TimeoutError(f"process {pid} reports no delays")
        time.sleep(0.01)
    found: list[float] = json.loads(lines[-1])
    return found


def _lines(file: Path) -> list[str]:
    text = file.read_text("utf-8") if file.exists() else ""
    return text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]


def main() -> None:
    """Run the command line of mlpd with the watch in the loop of `serve`."""
    from mlpd.cli import main as cli  # noqa: PLC0415 - the servers that are watched need not know it
    from mlpd.http import run  # noqa: PLC0415

    serve = run.serve

    async def watched(
        config: Any, directory: Path, on_ready: Callable[[str], None], beside: Any = None
    ) -> None:
        watch_loop()
        await serve(config, directory, on_ready, beside)

    run.serve = watched
    cli.main(sys.argv[1:], prog_name="mlpd")


if __name__ == "__main__":
    main()
