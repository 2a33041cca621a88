"""A power cut at any moment: what was acknowledged is on disk, and the daemon starts on it.

A child that does all that a daemon does with its data directory runs under a shim that records
every change to a file; then disks are built as a power cut may leave them, and opened.  The same
for children with a planted fault, which must be found.  MLPD_POWERCUT_STATES sets how many disks
are looked at per test (nightly: 5000).
"""

import os
import random

import pytest

from tests.storage.powercut.faults import FAULTS
from tests.storage.powercut.power import (
    Kills,
    Recording,
    after_every_mkdir,
    at_operations,
    look,
    record,
    scratch,
)

STATES = int(os.environ.get("MLPD_POWERCUT_STATES", "60"))
FAULT_STATES = 30
LIMIT_S = 60 + 4 * STATES


def check(*, seed: int, kills: Kills | None = None) -> Recording:
    with scratch() as work:
        recording = record(work, kills=kills)
        wrong = look(recording, work, states=STATES, seed=seed)
        assert not wrong, f"{len(wrong)} of {STATES} states:\n" + "\n".join(wrong[:5])
        return recording


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("seed", range(3))
def test_a_power_cut_loses_nothing_acknowledged(seed: int) -> None:
    check(seed=seed)


@pytest.mark.timeout(LIMIT_S)
def test_a_power_cut_after_kills_loses_nothing_acknowledged() -> None:
    rng = random.Random(1)
    recording = check(seed=3, kills=at_operations([rng.randrange(10, 250) for _ in range(4)]))
    assert recording.deaths == 4


@pytest.mark.timeout(LIMIT_S)
def test_names_of_folders_are_flushed_by_the_next_life_at_the_latest() -> None:
    """Each life ends when it has made a folder, and has not flushed its name yet."""
    recording = check(seed=4, kills=after_every_mkdir())
    assert recording.deaths > 8


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "none"])
def test_a_planted_fault_is_found(fault: str) -> None:
    with scratch() as work:
        found = look(record(work, fault), work, states=FAULT_STATES)
        assert found, f"{FAULT_STATES} power cuts lost nothing although there was: {fault}"
