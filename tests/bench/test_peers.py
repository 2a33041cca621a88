"""Peers: pinned, skipped with a clear line where they are not installed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.options import SkippedError
from bench.peers import FOLDER, MARK, NAMES, python_of


@pytest.mark.parametrize("name", NAMES)
def test_every_requirement_of_a_peer_is_pinned(name: str) -> None:
    lines = (FOLDER / f"{name}.txt").read_text().splitlines()
    requirements = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.\-\[\]]+==[\w.]+", line) for line in requirements)
    assert any(re.split(r"[\[=]", line)[0] == name for line in requirements)


def test_an_installation_that_was_not_finished_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "feast").mkdir()
    with pytest.raises(SkippedError, match="peers install feast"):
        python_of("feast", tmp_path)
    (tmp_path / "feast" / MARK).touch()
    assert python_of("feast", tmp_path) == tmp_path / "feast" / "bin" / "python"


def test_a_scenario_without_its_peer_is_skipped_with_a_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "feast", "--peers", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "feast: skipped: feast is not installed" in done.stderr
