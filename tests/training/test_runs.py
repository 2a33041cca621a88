"""Records of runs: how long another attempt waits, and when there is none."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.time import DAY_US, SECOND_US
from mlpd.training.runs import ATTEMPTS_MAX, Run, RunState

NOW_US = 1_700_000_000_000_000
RUN = Run("r", "job", "none", "test", NOW_US, state=RunState.RUNNING)
CHANCES = st.floats(0, 1, exclude_max=True)


@given(CHANCES)
def test_attempts_wait_longer_each_time_and_end(chance: float) -> None:
    run, waits = RUN, []
    while (run := run.recover(NOW_US, chance, "the child died")).state is RunState.QUEUED:
        waits.append(run.wait_us(NOW_US) / SECOND_US)
        run = run.move(RunState.RUNNING)
    assert len(waits) == ATTEMPTS_MAX - 1
    assert 1 <= waits[0] <= 3
    assert 4 <= waits[1] <= 12
    assert (run.state, run.attempt) == (RunState.FAILED, ATTEMPTS_MAX)
    assert (run.error or {})["code"] == "run_lost"


@given(CHANCES)
def test_an_attempt_waits_until_its_time_and_no_longer(chance: float) -> None:
    run = RUN.recover(NOW_US, chance, "the child died")
    assert run.wait_us(run.not_before_us - 1) == 1
    assert run.wait_us(run.not_before_us) == 0
    assert run.wait_us(run.not_before_us + 1) == 0


def test_a_clock_that_was_put_back_keeps_no_run_waiting() -> None:
    assert RUN.recover(NOW_US, 0.5, "the child died").wait_us(NOW_US - DAY_US) == 0


def test_a_first_attempt_does_not_wait() -> None:
    assert Run("r", "job", "none", "test", NOW_US).wait_us(NOW_US) == 0


@pytest.mark.parametrize("state", list(RunState))
def test_a_record_is_read_as_it_was_written(state: RunState) -> None:
    run = dataclasses.replace(RUN, state=state, interval=(1, 2), not_before_us=5)
    assert Run.decode(run.encode()) == run


def test_a_record_of_before_waits_were_kept_is_read() -> None:
    values = RUN.to_dict()
    del values["not_before_us"]
    assert Run.from_dict(values) == RUN
