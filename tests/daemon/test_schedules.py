"""Schedules in a daemon whose clock a test holds: missed runs, clock jumps, summer time, chains."""

import asyncio
import dataclasses
import time
from typing import Any

import pytest

from mlpd.core.errors import ConflictError, MlpdError
from mlpd.core.time import DAY_US, HOUR_US, MINUTE_US, SECOND_US, parse_time
from mlpd.daemon import scheduler as scheduler_module
from mlpd.daemon.app import Daemon
from mlpd.features.ingest import parse_batch
from mlpd.training.runs import Run, RunState
from tests.conftest import ManualClock, until

NOON_US = parse_time("2023-11-14T12:00:00Z")


@pytest.fixture
async def held(open_daemon: Any, trainable: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Open a daemon with a held clock, no timer, no workers, and `quick` on a schedule."""
    clock = ManualClock(NOON_US)

    async def start_no_timer(_: Daemon) -> None:
        """The tests tick by themselves."""

    monkeypatch.setattr(Daemon, "_schedule", start_no_timer)

    def opened(schedule: str, **fields: Any) -> Any:
        return _Held(open_daemon(clock=clock), clock, scheduled(trainable, schedule, **fields))

    return opened


class _Held:
    def __init__(self, opening: Any, clock: ManualClock, document: dict[str, Any]) -> None:
        self._opening, self._clock, self._document = opening, clock, document

    async def __aenter__(self) -> tuple[Daemon, ManualClock]:
        daemon = await self._opening.__aenter__()
        await daemon.runs.stop()
        if daemon.state.catalog.document.get("jobs") != self._document["jobs"]:
            await daemon.definitions.apply(self._document)
        return daemon, self._clock

    async def __aexit__(self, *error: object) -> None:
        await self._opening.__aexit__(*error)


def scheduled(document: dict[str, Any], schedule: str, **fields: Any) -> dict[str, Any]:
    quick = {**document["jobs"]["quick"], "schedule": schedule, **fields}
    return {**document, "jobs": {**document["jobs"], "quick": quick}}


def ends(runs: list[Run]) -> list[int]:
    return [run.interval[1] for run in runs if run.interval]


async def test_a_due_time_is_queued_once(held: Any) -> None:
    async with held("0 13 * * *") as (daemon, clock):
        assert await daemon.scheduler.tick() == []
        clock.now_us = NOON_US + HOUR_US - 1
        assert await daemon.scheduler.tick() == []
        clock.now_us += 1
        assert ends(await daemon.scheduler.tick()) == [NOON_US + HOUR_US]
        assert await daemon.scheduler.tick() == []
        clock.now_us += DAY_US - 1
        assert await daemon.scheduler.tick() == []


@pytest.mark.parametrize(
    ("catch_up", "missed"), [("latest", 1), ("all:5", 5), ("all:366", 30), ("skip", 0)]
)
async def test_what_30_days_of_absence_missed_is_caught_up(
    held: Any, catch_up: str, missed: int
) -> None:
    async with held("30 12 * * *", catch_up=catch_up) as (daemon, clock):
        await daemon.scheduler.tick()
        clock.now_us = NOON_US + 30 * DAY_US
    async with held("30 12 * * *", catch_up=catch_up) as (daemon, clock):
        found = ends(await daemon.scheduler.tick())
        assert found == [NOON_US + HOUR_US // 2 + day * DAY_US for day in range(30 - missed, 30)]
        assert await daemon.scheduler.tick() == []


async def test_requests_and_schedules_at_once_never_fill_the_queue_beyond_its_bound(
    held: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlpd.daemon.runs.QUEUE_MAX", 20)
    async with held("every 1d", catch_up="all:10") as (daemon, clock):
        await daemon.scheduler.tick()
        clock.now_us = NOON_US + 10 * DAY_US
        await daemon.runs.stop()  # nobody takes any
        asked = [daemon.runs.enqueue("quick", trigger="test") for _ in range(30)]
        asked[15:15] = [daemon.scheduler.tick(), daemon.scheduler.tick()]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        due = [run for found in answers if isinstance(found, list) for run in found]
        taken = [run for run in answers if isinstance(run, Run)]
        refused = [error for error in answers if isinstance(error, ConflictError)]
        queued = {run.run_id for run in daemon.runs.list() if run.state is RunState.QUEUED}
        assert queued == {run.run_id for run in [*due, *taken]}
        assert len(queued) == 20
        assert len(taken) + len(refused) == 30
        assert {error.code for error in refused} == {"queue_full"}
        assert len({run.key for run in due}) == len(due) <= 10
        for run_id in queued:
            await daemon.runs.cancel(run_id)
        due += await daemon.scheduler.tick()  # what had no room follows, once
        assert sorted(ends(due)) == [NOON_US + DAY_US // 2 + day * DAY_US for day in range(10)]


async def test_more_missed_runs_than_the_queue_takes_are_queued_as_it_empties(
    held: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlpd.daemon.runs.QUEUE_MAX", 4)
    async with held("every 1d", catch_up="all:10") as (daemon, clock):
        await daemon.scheduler.tick()
        clock.now_us = NOON_US + 10 * DAY_US
        found = []
        for _ in range(4):
            queued = await daemon.scheduler.tick()
            assert len(queued) <= 4
            assert await daemon.scheduler.tick() == []  # there is no room
            found += ends(queued)
            for run in queued:
                await daemon.runs.cancel(run.run_id)
        midnight_us = NOON_US + DAY_US // 2
        assert found == [midnight_us + day * DAY_US for day in range(10)]


async def test_starting_after_30_days_of_minutes_takes_no_longer(
    held: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """43,200 runs were missed; steps are counted, since time on a loaded machine says nothing."""
    steps = 0
    real = scheduler_module.due

    def counted(schedule: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal steps
        cron = type(schedule)
        before = cron.at_or_before

        def step(self: Any, t_us: int) -> int:
            nonlocal steps
            steps += 1
            return int(before(self, t_us))

        with monkeypatch.context() as patch:
            patch.setattr(cron, "at_or_before", step)
            return real(schedule, *arguments, **named)

    async with held("* * * * *") as (daemon, clock):
        await daemon.scheduler.tick()
        clock.now_us += 30 * DAY_US
        monkeypatch.setattr(scheduler_module, "due", counted)
        assert len(await daemon.scheduler.tick()) == 1
        assert steps <= 2


async def test_a_clock_put_forward_and_back_doubles_and_silences_nothing(held: Any) -> None:
    async with held("0 * * * *") as (daemon, clock):
        await daemon.scheduler.tick()
        clock.now_us = NOON_US + HOUR_US
        assert len(await daemon.scheduler.tick()) == 1
        clock.now_us += 365 * DAY_US  # somebody's mistake
        assert len(await daemon.scheduler.tick()) == 1
        clock.now_us = NOON_US + HOUR_US - MINUTE_US  # mended, and before the first run
        assert await daemon.scheduler.tick() == []
        clock.now_us = NOON_US + HOUR_US + MINUTE_US
        assert await daemon.scheduler.tick() == []  # was queued before
        clock.now_us = NOON_US + 2 * HOUR_US
        assert ends(await daemon.scheduler.tick()) == [NOON_US + 2 * HOUR_US]


async def test_a_clock_that_trembles_queues_nothing_twice(held: Any) -> None:
    async with held("every 1h") as (daemon, clock):
        await daemon.scheduler.tick()
        found = []
        for step_us in (HOUR_US, -SECOND_US, SECOND_US, -MINUTE_US, MINUTE_US, HOUR_US):
            clock.now_us += step_us
            found += ends(await daemon.scheduler.tick())
        assert found == [NOON_US + HOUR_US, NOON_US + 2 * HOUR_US]


@pytest.mark.parametrize(
    ("day", "expected"),
    [
        ("2024-03-31", ["2024-03-31T01:00:00Z"]),  # 02:30 is skipped: it runs as the clock jumps
        ("2024-10-27", ["2024-10-27T00:30:00Z"]),  # 02:30 comes twice: the first one counts
        ("2024-06-01", ["2024-06-01T00:30:00Z"]),
    ],
)
async def test_a_nightly_job_runs_once_on_the_days_of_the_change(
    held: Any, day: str, expected: list[str]
) -> None:
    async with held("30 2 * * *", timezone="Europe/Berlin") as (daemon, clock):
        clock.now_us = parse_time(f"{day}T00:00:00Z") - 2 * HOUR_US
        await daemon.scheduler.tick()
        found = []
        for _ in range(22 * 4):
            clock.now_us += 15 * MINUTE_US
            found += ends(await daemon.scheduler.tick())
        assert found == [parse_time(text) for text in expected]


async def test_an_apply_that_changes_the_job_lets_its_interval_run_again(
    held: Any, trainable: Any
) -> None:
    async with held("0 * * * *") as (daemon, clock):
        await daemon.scheduler.tick()
        clock.now_us += HOUR_US
        (first,) = await daemon.scheduler.tick()
        clock.now_us -= 10 * MINUTE_US
        await daemon.scheduler.tick()
        await daemon.definitions.apply(scheduled(trainable, "0 * * * *", num_boost_round=6))
        clock.now_us += 10 * MINUTE_US
        (second,) = await daemon.scheduler.tick()
        assert first.interval == second.interval
        assert first.key != second.key


async def test_event_time_decides_where_a_schedule_says_so(held: Any) -> None:
    async with held("every 1d of clicks") as (daemon, clock):

        async def send(event_us: int) -> None:
            spec = daemon.state.catalog.definitions.source("clicks")
            batch = parse_batch(spec, {"at": [event_us], "user": ["a"]}, now_us=daemon.clock())
            assert (await daemon.ingest.ingest([batch])).accepted == 1

        (job,) = (job for job in daemon.scheduler.jobs() if job["name"] == "quick")
        assert job["waits_for"] == "events of clicks"
        assert await daemon.scheduler.tick() == []
        midnight_us = NOON_US - 12 * HOUR_US
        await send(midnight_us - HOUR_US)
        assert await daemon.scheduler.tick() == []
        clock.now_us += 5 * DAY_US
        assert await daemon.scheduler.tick() == []  # time alone doesn't count
        (job,) = (job for job in daemon.scheduler.jobs() if job["name"] == "quick")
        assert job["waits_for"] == "events of clicks from 2023-11-14T00:00:00Z on"
        await send(midnight_us + 1)
        (run,) = await daemon.scheduler.tick()
        assert run.interval == (midnight_us - DAY_US, midnight_us)
        await send(midnight_us - MINUTE_US)  # late
        assert await daemon.scheduler.tick() == []


async def test_a_job_runs_after_another_one_has_succeeded(held: Any) -> None:
    async with held("after endless") as (daemon, clock):
        await daemon.scheduler.tick()

        async def finish(state: RunState) -> None:
            clock.now_us += MINUTE_US
            run = daemon.runs.build("endless", trigger="test")
            run = dataclasses.replace(run, state=state, finished_us=int(clock()))
            await daemon.writer.write(lambda txn: daemon.runs.store(txn, run))

        await finish(RunState.FAILED)
        assert await daemon.scheduler.tick() == []
        await finish(RunState.SUCCEEDED)
        assert [run.job for run in await daemon.scheduler.tick()] == ["quick"]
        assert await daemon.scheduler.tick() == []
        await finish(RunState.SUCCEEDED)
        await finish(RunState.SUCCEEDED)
        assert len(await daemon.scheduler.tick()) == 1


@pytest.mark.parametrize(
    ("schedule", "fields", "code", "problem"),
    [
        ("every 10 rows of nothing", {}, "unknown_source", "unknown source 'nothing'"),
        ("every 1d of nothing", {}, "unknown_source", "unknown source 'nothing'"),
        ("after nothing", {}, "unknown_job", "unknown job 'nothing'"),
        ("after quick", {}, "invalid_schedule", "waits for itself: quick after quick"),
        ("every 1d of Clicks!", {}, "invalid_name", "'Clicks!'"),
        ("0 3 * * *", {"catch_up": "all:0"}, "invalid_schedule", "catch_up is 'all:0'"),
        ("0 3 * * *", {"timezone": "Mars/Olympus"}, "invalid_timezone", "'Mars/Olympus'"),
        ("0 3 * *", {}, "invalid_schedule", "has 4 fields"),
    ],
)
async def test_a_schedule_that_cannot_be_kept_is_not_applied(
    daemon: Daemon, trainable: Any, schedule: str, fields: dict[str, Any], code: str, problem: str
) -> None:
    with pytest.raises(MlpdError) as refused:
        await daemon.definitions.apply(scheduled(trainable, schedule, **fields))
    assert (refused.value.code, refused.value.status) == (code, 400)
    assert refused.value.message.startswith("job 'quick': ")
    assert problem in refused.value.message
    assert not daemon.state.catalog.definitions.jobs


async def test_two_jobs_that_wait_for_each_other_are_refused(
    daemon: Daemon, trainable: Any
) -> None:
    document = scheduled(trainable, "after endless")
    document["jobs"]["endless"] = {**document["jobs"]["endless"], "schedule": "after quick"}
    with pytest.raises(MlpdError, match="waits for itself"):
        await daemon.definitions.apply(document)


async def test_next_runs_are_shown(held: Any) -> None:
    async with held("30 12 * * 2", timezone="UTC") as (daemon, _):
        (job,) = (job for job in daemon.scheduler.jobs() if job["name"] == "quick")
        assert job["next_run"] == job["next_runs"][0] == "2023-11-14T12:30:00Z"  # a Tuesday
        assert len(job["next_runs"]) == 5
        assert job["next_runs"][4] == "2023-12-12T12:30:00Z"


async def test_a_blocked_loop_misses_nothing(held: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real timer, whose ticks all fall into the time in which the loop does nothing."""
    monkeypatch.setattr(scheduler_module, "TICK_S", 0.05)
    async with held("every 1h", catch_up="all:9") as (daemon, clock):
        daemon.scheduler.stop()
        await daemon.scheduler.tick()
        daemon.scheduler.start()
        await asyncio.sleep(0.1)
        clock.now_us += 3 * HOUR_US
        time.sleep(0.5)  # noqa: ASYNC251 - that is what is tried
        await until(lambda: len(daemon.runs.list()) == 3)
        hours = sorted(ends(daemon.runs.list()))
        assert hours == [NOON_US + hour * HOUR_US for hour in (1, 2, 3)]
        daemon.scheduler.stop()
