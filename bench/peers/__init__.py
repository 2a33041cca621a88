"""Peers: what users would take instead, each in a virtual environment outside of ours.

`<name>.txt` beside this file has the pinned requirements, `<name>_*.py` run in that environment.
"""

import subprocess
import sys
from pathlib import Path

from bench.options import SkippedError

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.txt")))
BASES = {"nvidia-pytriton": "/usr/bin/python3"}
"""Interpreters other than this one.  Triton starts one of its own, built from 3.11, on the standard
library of the environment's: that of 3.11.7 is too new for it, Debian's 3.11.2 is not."""
MARK = "installed"
"""A file that tells that the installation was finished."""


def install(name: str, directory: Path) -> None:
    """Make the environment of a peer in `directory`; takes minutes and the package index."""
    home = directory / name
    base = BASES.get(name, sys.executable)
    subprocess.run([base, "-m", "venv", "--clear", str(home)], check=True)
    requirements = FOLDER / f"{name}.txt"
    command = [str(home / "bin" / "python"), "-m", "pip", "install", "-q", "-r", str(requirements)]
    print(f"installing {name} into {home}", file=sys.stderr)
    subprocess.run(command, check=True)
    (home / MARK).touch()


def python_of(name: str, directory: Path) -> Path:
    """Return the interpreter of an installed peer; raises SkippedError."""
    home = directory / name
    if not (home / MARK).exists():
        raise SkippedError(
            f"{name} is not installed in {directory}: "
            f"python -m bench peers install {name} --peers {directory}"
        )
    return (home / "bin" / "python").absolute()


def version_of(name: str, python: Path) -> str:
    """Return the version of a peer's package in its environment."""
    code = f"from importlib.metadata import version; print(version({name!r}))"
    said = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    return said.stdout.strip()
