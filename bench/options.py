"""What a scenario is run with: lengths, sizes, and where peers are installed."""

from dataclasses import dataclass
from pathlib import Path

PEERS = Path(".peers")


@dataclass(frozen=True, slots=True)
class Options:
    """`seconds`: of a round of load.  `rounds`: of each side.  `rows`: of spine and features.

    `entities`: the most that a store is filled with.
    """

    seconds: float = 3.0
    rounds: int = 5
    rows: int = 1_000_000
    peers: Path = PEERS
    entities: int = 1_000_000


class SkippedError(Exception):
    """A scenario can't run here; the message says what is missing and how to get it."""
