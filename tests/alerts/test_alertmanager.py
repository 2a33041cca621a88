"""Debian's Alertmanager takes what we send: beginnings, ends, sending again; amtool reads it."""

import asyncio
import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlpd.core.targets import Target, parse_networks
from mlpd.core.time import SECOND_US, system_clock
from mlpd.daemon.outbound import Outbound
from mlpd.daemon.sinks import AlertmanagerSink
from tests.alerts.test_deliveries import desk
from tests.conftest import ManualClock, until

PROGRAM = shutil.which("prometheus-alertmanager")
AMTOOL = shutil.which("amtool")
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="prometheus-alertmanager is not installed (Debian has it): not tried"
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def fetch(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.loads(answer.read())


def answers(url: str) -> bool:
    try:
        fetch(f"{url}/api/v2/status")
    except (OSError, urllib.error.URLError):
        return False
    return True


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """The port of an Alertmanager of its own."""
    config = tmp_path / "alertmanager.yml"
    config.write_text("route: {receiver: nobody}\nreceivers: [{name: nobody}]\n")
    found = free_port()
    assert PROGRAM is not None
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                PROGRAM,
                f"--config.file={config}",
                f"--storage.path={tmp_path / 'data'}",
                f"--web.listen-address=127.0.0.1:{found}",
                "--cluster.listen-address=",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        yield found
    finally:
        process.terminate()
        process.wait(20)


async def test_it_shows_what_fires_and_what_is_over(port: int) -> None:
    url = f"http://127.0.0.1:{port}"
    await until(lambda: answers(url), 50)
    clock = ManualClock(system_clock() - 30 * SECOND_US)
    outbound = Outbound(parse_networks(["127.0.0.0/8"], "test"))
    target = Target("http", "127.0.0.1", port, "/")
    sink = AlertmanagerSink(target, outbound, 60 * SECOND_US, clock)
    odd = 'a "b" \\ {}\n\u00e4'
    async with desk(sink, clock) as found:
        found.see(2.0, "a", "b", odd)
        await found.settle()

        async def held() -> set[str]:
            alerts = await asyncio.to_thread(fetch, f"{url}/api/v2/alerts")
            return {alert["labels"]["source"] for alert in alerts}

        assert await held() == {"a", "b", odd}
        if AMTOOL is not None:
            command = [AMTOOL, "alert", "query", f"--alertmanager.url={url}", "-o", "json"]
            listed = json.loads(await asyncio.to_thread(subprocess.check_output, command))
            assert {alert["annotations"]["summary"] for alert in listed} >= {"a at 2.0"}
        found.see(0.0, "b", odd)
        await found.settle()
        assert await held() == {"a"}
