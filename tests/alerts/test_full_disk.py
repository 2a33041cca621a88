"""A full disk under a real daemon: it is told, serving goes on, no state is lost."""

import asyncio
import contextlib
import errno
from pathlib import Path
from typing import Any

import pytest

from mlpd.client import Client
from mlpd.core.definitions import Entity, FeatureService, FeatureView, Source, build_document
from mlpd.core.errors import StorageFullError
from tests.alerts.receiver import Receiver
from tests.conftest import Process, until
from tests.storage.powercut.shim import Shim

user = Entity("user")
clicks = Source("clicks", timestamp="at", schema={"user": "string", "x": "float64"})
last = FeatureView("last", user, clicks, ["x"], freshness="1s")  # looked at every 150 ms
DOCUMENT = build_document([user, clicks, last, FeatureService("s", [last])])

CONFIG = """
[alerts]
window = "100ms"
targets = ["127.0.0.1:{port}"]
private_networks = ["127.0.0.0/8"]
webhook_url = "{url}"
"""


def told(receiver: Receiver) -> list[tuple[str, str]]:
    return [
        (alert["labels"]["alertname"], alert["status"])
        for message in receiver.messages()
        for alert in message["alerts"]
        if alert["labels"]["alertname"] == "WritesFail"
    ]


async def test_a_full_disk_is_told_and_hurts_no_read(
    daemon_directory: Path, tmp_path: Path, receiver: Receiver
) -> None:
    config = tmp_path / "mlpd.toml"
    config.write_text(CONFIG.format(port=receiver.port, url=receiver.url))
    with Shim(daemon_directory, tmp_path / "shim") as shim:
        process = Process(
            daemon_directory,
            options=("--config", str(config)),
            environment=shim.environment(),
        )
        await asyncio.to_thread(process.start)
        try:
            with Client(process.url) as client:
                await asyncio.to_thread(client.apply, DOCUMENT)
                await asyncio.to_thread(send, client, 1)
                shim.fail(errno.ENOSPC, path="/lmdb/")
                with pytest.raises(StorageFullError):
                    await asyncio.to_thread(send, client, 1)
                await until(lambda: told(receiver) == [("WritesFail", "firing")])
                read = await asyncio.to_thread(client.read_features, "s", entities=[{"user": "u1"}])
                assert read["columns"]["last.x"] == [1.0]
                listed = await asyncio.to_thread(client.alerts.list)
                assert "WritesFail" in {a["labels"]["alertname"] for a in listed["alerts"]}
                shim.mend()
                await asyncio.to_thread(send, client, 1)
                await until(lambda: told(receiver)[-1:] == [("WritesFail", "resolved")])
                stored = writes_fail(await asyncio.to_thread(client.alerts.list))
                assert stored["state"] == "resolved"
            await asyncio.to_thread(process.stop)
            # What could not be stored while the disk was full is there after the next start.
            await asyncio.to_thread(process.start)
            with Client(process.url) as client:
                again = writes_fail(await asyncio.to_thread(client.alerts.list))
            assert again == stored
            assert told(receiver)[-1:] == [("WritesFail", "resolved")]
            await asyncio.to_thread(process.stop)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.process.kill()
            process._reap()


def writes_fail(listed: Any) -> Any:
    """The alert of that name; others come and go as the source stands still."""
    (found,) = [a for a in listed["alerts"] if a["labels"]["alertname"] == "WritesFail"]
    return found


def send(client: Client, count: int) -> None:
    rows = [{"at": "2013-01-01T00:00:00Z", "user": "u1", "x": 1.0}] * count
    assert client.events.send("clicks", rows)["accepted"] == count
