"""Benchmarks: `python -m bench` lists the scenarios, `python -m bench NAME` runs one.

`all` runs every one.  Prints one JSON object for each.  `python -m bench peers install NAME` makes
a peer's environment in the folder that --peers names.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.options import PEERS, Options, SkippedError
from bench.peers import NAMES, install
from bench.scenarios import SCENARIOS
from bench.turns import machine


def main() -> int:
    """Read the command line, run, print; returns the exit status."""
    if sys.argv[1:2] == ["peers"]:
        options = _peers_parser().parse_args(sys.argv[2:])
        install(options.name, options.peers)
        return 0
    options = _parser().parse_args()
    if options.scenario is None:
        for name, scenario in SCENARIOS.items():
            print(f"{name:10} {(scenario.__doc__ or '').splitlines()[0]}")
        return 0
    names = list(SCENARIOS) if options.scenario == "all" else [options.scenario]
    settings = Options(options.seconds, options.rounds, options.rows, options.peers)
    return max(_run(name, settings) for name in names)


def _run(name: str, options: Options) -> int:
    before = machine(Path(tempfile.gettempdir()))
    try:
        cases = SCENARIOS[name](options)
    except SkippedError as reason:
        print(f"{name}: skipped: {reason}", file=sys.stderr)
        return 0
    found: dict[str, Any] = {"scenario": name, "machine": before, "cases": cases}
    print(json.dumps(found), flush=True)
    return 0


def _peers_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench peers")
    parser.add_argument("verb", choices=["install"])
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--peers", type=Path, default=PEERS, help="where peers are installed")
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("scenario", nargs="?", choices=[*SCENARIOS, "all"])
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each side, in turns")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the join's two sides")
    parser.add_argument("--peers", type=Path, default=PEERS, help="where peers are installed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
