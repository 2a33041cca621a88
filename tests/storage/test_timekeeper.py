"""The time protocol: "known at t" is the snapshot, whatever the clock and the threads do."""

import random
import threading
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.names import TimeUs
from mlpd.core.time import MIN_TIME_US
from mlpd.storage.environment import Environment
from mlpd.storage.log import read_records
from mlpd.storage.tables import EMPTY_HEAD, Head
from mlpd.storage.timekeeper import TimeKeeper
from mlpd.storage.writer import Writer


@dataclass
class FakeSnapshot:
    head: Head


START_US = 1_700_000_000_000_000
steps = st.lists(
    st.tuples(st.sampled_from(("begin", "commit", "end", "read")), st.integers(-50, 50)),
    max_size=200,
)


@given(steps)
def test_protocol_holds_for_every_interleaving(script: list[tuple[str, int]]) -> None:
    now_us = 0
    times = TimeKeeper(lambda: TimeUs(now_us))
    groups: list[int] = []  # K of the committed groups, in order
    reads: list[tuple[int, int]] = []  # (number of groups seen, t)
    phase, pending = "idle", 0
    for action, jump in script:
        now_us += jump
        if action == "begin" and phase == "idle":
            pending, phase = times.begin_group(), "begun"
        elif action == "commit" and phase == "begun":
            groups.append(pending)
            phase = "committed"
        elif action == "end" and phase in ("begun", "committed"):
            times.end_group()
            phase = "idle"
        elif action == "read":
            newest = groups[-1] if groups else MIN_TIME_US
            snapshot = FakeSnapshot(EMPTY_HEAD._replace(group_us=TimeUs(newest)))
            _, t_us = times.open_read(partial(copy, snapshot))
            reads.append((len(groups), t_us))
    for seen, t_us in reads:
        assert all(k < t_us for k in groups[:seen])
        assert all(k > t_us for k in groups[seen:])
    assert [t for _, t in reads] == sorted(t for _, t in reads)


def test_protocol_holds_with_real_threads_and_a_jumping_clock(tmp_path: Path, events: Any) -> None:
    rng = random.Random(7)

    def clock() -> TimeUs:
        return TimeUs(START_US + rng.randrange(-1000, 1000))

    reads: list[tuple[int, int]] = []
    done = threading.Event()

    with Environment.open(tmp_path / "lmdb", clock=clock) as environment:

        def read() -> None:
            while not done.is_set():
                with environment.read_at() as (snapshot, t_us):
                    reads.append((snapshot.sequence, t_us))

        writer = Writer(environment)
        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        for i in range(150):
            writer.write_blocking(events(i))
        done.set()
        for thread in threads:
            thread.join()
        writer.close()
        with environment.snapshot() as snapshot:
            known = {r.first: int(r.known_us[0]) for r in read_records(snapshot)}

    assert len(known) == 150
    assert len({sequence for sequence, _ in reads}) > 10
    for sequence, t_us in set(reads):
        assert sum(k <= t_us for k in known.values()) == sequence


@pytest.mark.parametrize("jump_us", [-3_600_000_000, 0, 5])
def test_arrival_times_grow_over_a_restart(
    tmp_path: Path, clock: Any, events: Any, jump_us: int
) -> None:
    with Environment.open(tmp_path / "lmdb", clock=clock) as environment:
        writer = Writer(environment)
        writer.write_blocking(events(1))
        clock.now_us += 100
        with environment.read_at() as (_, t_us):
            pass
        writer.close()
    clock.now_us += jump_us
    with Environment.open(tmp_path / "lmdb", clock=clock) as environment:
        writer = Writer(environment)
        writer.write_blocking(events(2))
        writer.close()
        with environment.snapshot() as snapshot:
            records = list(read_records(snapshot))
    assert records[0].known_us[0] < t_us < records[1].known_us[0]
