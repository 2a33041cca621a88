"""Random schedules of crashes, cuts, losses and promotions: what must hold does."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.cluster.simulation import SLOTS, Simulation
from tests.conftest import MEMORY, PROFILE

pytestmark = pytest.mark.timeout(600)
SEEDS = {"default": 60, "ci": 500}.get(PROFILE, 5_000)
PARTS = 4


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr("mlpd.core.shards.SLOTS", SLOTS)
    with TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def problems(seed: int, root: Path) -> list[str]:
    """Run one schedule; the seed says which kind."""
    kind = seed % 6
    simulation = Simulation(
        seed, root / str(seed), lease=kind in (2, 3), lost=kind in (1, 3), shards=1 + (kind >= 4)
    )
    simulation.run()
    return [f"seed {seed}: {problem}" for problem in simulation.problems]


@pytest.mark.parametrize("part", range(PARTS))
def test_one_owner_per_epoch_nothing_acknowledged_lost_and_no_old_read(
    part: int, root: Path
) -> None:
    found = [p for seed in range(part, SEEDS, PARTS) for p in problems(seed, root)]
    assert not found
