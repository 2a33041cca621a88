"""Disk use in /metrics is what the files take, source by source, and costs a look a minute."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from mlpd.core.errors import UnavailableError
from mlpd.core.time import system_clock
from mlpd.daemon.app import Daemon
from mlpd.daemon.disk import WALK_S, disk_collector, measure_disk
from mlpd.monitoring.metrics import Collected
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.horizons import Horizon, move_horizon
from tests.daemon.quick import prepare


def values_of(collected: Any) -> dict[tuple[str, ...], float]:
    return {
        (family.descriptor.name, *labels): value
        for family in collected
        for labels, value in family.samples
    }


def size_of(folder: Path) -> int:
    return sum(p.lstat().st_size for p in folder.rglob("*") if not p.is_dir() or p.is_symlink())


async def test_bytes_are_those_of_the_files(
    daemon: Daemon, trainable: Any, click_columns: Any
) -> None:
    await prepare(daemon, trainable, click_columns)
    before = measure_disk(daemon.environment, daemon.paths)
    assert before.log > 8_000
    assert before.segments == {}
    await daemon.compactor.run()
    run = daemon.paths.runs / "some" / "deeper"
    run.mkdir(parents=True)
    (run / "log").write_bytes(bytes(12_345))
    await daemon.writer.write(lambda txn: move_horizon(txn, "clicks", Horizon(5_000_000, 9)))
    values = values_of(disk_collector(daemon.environment, daemon.paths)())
    files = [*daemon.paths.segments.glob("clicks/*/*.parquet")]
    assert values["mlpd_segments", "clicks"] == len(files) > 0
    assert values["mlpd_segments_rows", "clicks"] == 1_000
    assert values["mlpd_segments_bytes", "clicks"] == sum(p.stat().st_size for p in files)
    assert values["mlpd_folder_bytes", "runs"] == 12_345
    for name in ("registry", "cache"):
        assert values["mlpd_folder_bytes", name] == size_of(daemon.paths.root / name)
    assert values["mlpd_log_bytes",] < before.log
    assert values["mlpd_history_begins_timestamp_seconds", "clicks"] == 5.0
    assert values["mlpd_disk_free_bytes",] > 0
    body, _ = await daemon.monitor.expose_metrics("")
    assert b'mlpd_segments_rows{source="clicks"} 1000' in body


def test_a_look_holds_for_a_minute(tmp_path: Path) -> None:
    data, now_s = DataDirectory(tmp_path), 0.0
    data.runs.mkdir()
    with Environment.open(data.lmdb, clock=system_clock, map_bytes=1 << 30) as environment:
        collect = disk_collector(environment, data, lambda: now_s)

        def runs() -> float:
            found: list[Collected] = [*collect()]
            return values_of(found)["mlpd_folder_bytes", "runs"]

        assert runs() == 0
        (data.runs / "log").write_bytes(b"12345")
        now_s = WALK_S - 1
        assert runs() == 0
        now_s = WALK_S
        assert runs() == 5
        shutil.rmtree(data.runs)
        now_s = 2 * WALK_S
        assert runs() == 0
    with pytest.raises(UnavailableError):
        measure_disk(environment, data)
