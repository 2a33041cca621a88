"""Segments whose log is lost, or older than they are, are never taken for leftovers of a crash."""

import asyncio
import shutil
from pathlib import Path

import pytest

from mlpd.core.errors import ConflictError
from mlpd.core.time import system_clock
from mlpd.daemon.app import Daemon
from mlpd.daemon.fsck import check_stopped
from mlpd.storage.files import DataDirectory
from tests.conftest import SMALL, OpenDaemon


def segments_of(data: DataDirectory) -> set[Path]:
    return {path for path in data.segments.rglob("*") if path.is_file()}


async def refusal_of_start(opened: OpenDaemon, data: DataDirectory) -> ConflictError:
    with pytest.raises(ConflictError) as caught:
        async with opened(data.root):
            pass
    return caught.value


async def test_no_daemon_starts_where_lmdb_is_gone(
    data: DataDirectory, open_daemon: OpenDaemon
) -> None:
    before = segments_of(data)
    shutil.rmtree(data.lmdb)
    for _ in range(2):
        refused = await refusal_of_start(open_daemon, data)
        assert refused.code == "log_missing"
        assert "mlpd restore" in refused.hint
        assert not data.lmdb.exists()
    with pytest.raises(ConflictError) as caught:
        await asyncio.to_thread(check_stopped, data.root, system_clock)
    assert caught.value.code == "log_missing"
    assert segments_of(data) == before
    shutil.rmtree(data.segments)
    shutil.rmtree(data.registry)
    async with open_daemon(data.root):
        pass  # nothing is left that a new log could not belong to


async def test_no_daemon_starts_on_a_log_older_than_its_segments(
    data: DataDirectory, open_daemon: OpenDaemon, tmp_path: Path
) -> None:
    """As if lmdb alone came from a backup, or another directory."""
    before = segments_of(data)
    shutil.rmtree(data.lmdb)
    shutil.rmtree(data.registry)
    other = DataDirectory(tmp_path / "other")
    async with open_daemon(other.root):
        pass
    shutil.copytree(other.lmdb, data.lmdb)
    refused = await refusal_of_start(open_daemon, data)
    assert refused.code == "log_behind_segments"
    assert "ends at sequence 0" in refused.message
    assert segments_of(data) == before
    report = await asyncio.to_thread(check_stopped, data.root, system_clock, repair=True)
    assert {p["code"] for p in report["problems"]} == {"log_behind_segments"}
    assert segments_of(data) == before


async def test_leftovers_stay_where_a_file_is_missing(
    data: DataDirectory, open_daemon: OpenDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    """They may hold its rows, as where LMDB is from before a merging and the files are not."""
    named = next(data.segments.rglob("*.parquet"))
    merged = named.with_name(named.name.replace(".parquet", ".1.parquet"))
    named.rename(merged)
    async with open_daemon(data.root):
        assert merged.exists()
        assert "1 files of segments are missing" in caplog.text
    merged.rename(named)
    shutil.copy(named, merged)
    async with open_daemon(data.root):
        assert not merged.exists()
        assert named.exists()
    assert (await asyncio.to_thread(check_stopped, data.root, system_clock))["clean"]


def test_a_refused_start_gives_the_directory_back(data: DataDirectory) -> None:
    (data.lmdb / "data.mdb").unlink()
    with pytest.raises(ConflictError):
        Daemon(data.root, SMALL)
    with pytest.raises(ConflictError) as caught:
        Daemon(data.root, SMALL)
    assert caught.value.code == "log_missing"  # not data_directory_in_use
