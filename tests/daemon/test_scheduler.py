"""Schedules by new rows: of their own source alone, across restarts and compactions."""

from typing import Any

import pytest

from mlpd.daemon.app import Daemon
from mlpd.features.ingest import parse_batch
from mlpd.training.runs import Run


def scheduled(document: dict[str, Any], schedule: str) -> dict[str, Any]:
    """Return the definitions with the schedule for the job `quick`."""
    jobs = document["jobs"]
    return {**document, "jobs": {**jobs, "quick": {**jobs["quick"], "schedule": schedule}}}


async def send(daemon: Daemon, source: str, count: int) -> None:
    spec = daemon.state.catalog.definitions.source(source)
    columns = {"at": [daemon.clock() - 1] * count, "user": ["a"] * count}
    batch = parse_batch(spec, columns, now_us=daemon.clock())
    assert (await daemon.ingest.ingest([batch])).accepted == count


async def tick(daemon: Daemon) -> list[Run]:
    """Tick, and cancel what became due: only that it did is of interest here."""
    due = await daemon.scheduler.tick()
    for run in due:
        await daemon.runs.cancel(run.run_id)
    return due


async def test_the_rows_of_other_sources_do_not_count(daemon: Daemon, trainable: Any) -> None:
    await daemon.definitions.apply(scheduled(trainable, "every 100 rows of clicks"))
    await tick(daemon)
    await send(daemon, "other", 500)
    await send(daemon, "clicks", 99)
    assert not await tick(daemon)
    await send(daemon, "clicks", 1)
    assert [run.job for run in await tick(daemon)] == ["quick"]
    assert not await tick(daemon)
    await send(daemon, "clicks", 99)
    assert not await tick(daemon)


async def test_rows_are_counted_across_restarts_and_compactions(
    open_daemon: Any, trainable: Any
) -> None:
    async with open_daemon() as daemon:
        await daemon.definitions.apply(scheduled(trainable, "every 100 rows of clicks"))
        await tick(daemon)
        await send(daemon, "clicks", 60)
        await send(daemon, "other", 60)
        await daemon.compactor.run()
        await send(daemon, "clicks", 20)
    async with open_daemon() as daemon:
        await daemon.compactor.run()
        await send(daemon, "clicks", 19)
        assert not await tick(daemon)
        await send(daemon, "clicks", 1)
        assert len(await tick(daemon)) == 1


@pytest.mark.parametrize("before", ["every 1h", "every 10 rows of other"])
async def test_rows_are_counted_from_when_the_schedule_came(
    daemon: Daemon, trainable: Any, before: str
) -> None:
    await daemon.definitions.apply(scheduled(trainable, before))
    await tick(daemon)
    await send(daemon, "clicks", 150)
    await daemon.definitions.apply(scheduled(trainable, "every 100 rows of clicks"))
    assert not await tick(daemon)
    await send(daemon, "clicks", 99)
    assert not await tick(daemon)
    await send(daemon, "clicks", 1)
    assert len(await tick(daemon)) == 1
