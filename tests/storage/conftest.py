"""Real LMDB environments in a temporary directory, and a clock that tests can move."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mlpd.core.columns import DType
from mlpd.core.convert import column_of
from mlpd.core.names import TimeUs
from mlpd.storage.environment import Environment
from mlpd.storage.log import RecordKind, append
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

Operation = Callable[[WriteTransaction], tuple[int, int]]
START_US = 1_700_000_000_000_000


@dataclass
class ManualClock:
    now_us: int = START_US

    def __call__(self) -> TimeUs:
        return TimeUs(self.now_us)


def append_events(*numbers: int, source: str = "departures") -> Operation:
    """An operation that appends one event per number, at event time START_US + number."""

    def op(txn: WriteTransaction) -> tuple[int, int]:
        return append(
            txn,
            kind=RecordKind.EVENTS,
            source=source,
            columns={"n": column_of(DType.INT64, numbers)},
            event_us=np.array(numbers, np.int64) + START_US,
        )

    return op


@pytest.fixture(scope="session")
def events() -> Callable[..., Operation]:
    return append_events


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def environment(tmp_path: Path, clock: ManualClock) -> Iterator[Environment]:
    with Environment.open(tmp_path / "lmdb", clock=clock) as opened:
        yield opened


@pytest.fixture
def writer(environment: Environment) -> Iterator[Writer]:
    opened = Writer(environment)
    yield opened
    opened.close()
