"""Benchmarks: `python -m bench` lists the scenarios, `python -m bench NAME` runs one.

`all` runs every one but the long ones.  Prints one JSON object for each; --save keeps it in
bench/results and writes the tables there anew, as `python -m bench table` does.  `python -m bench
peers install NAME` makes a peer's environment in the folder that --peers names.
"""

import argparse
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from bench import results
from bench.options import PEERS, Options, SkippedError
from bench.peers import NAMES, install
from bench.scenarios import LONG, SCENARIOS
from bench.turns import machine


def main() -> int:
    """Read the command line, run, print; returns the exit status."""
    # As installed: with this set, every daemon and child would compile 250 modules, 0.6 s of it.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if sys.argv[1:2] == ["peers"]:
        options = _peers_parser().parse_args(sys.argv[2:])
        install(options.name, options.peers)
        return 0
    options = _parser().parse_args()
    if options.scenario is None:
        for name, scenario in SCENARIOS.items():
            print(f"{name:10} {(scenario.__doc__ or '').splitlines()[0]}")
        return 0
    if options.scenario == "table":
        results.update()
        return 0
    names = [options.scenario]
    if options.scenario == "all":
        names = [name for name in SCENARIOS if name not in LONG]
    settings = Options(
        options.seconds, options.rounds, options.rows, options.peers, options.entities
    )
    failed = [name for name in names if not _run(name, settings, keep=options.save)]
    return 1 if failed else 0


def _run(name: str, options: Options, *, keep: bool) -> bool:
    """Run a scenario; False if it failed: the others of `all` are run all the same."""
    before = machine(Path(tempfile.gettempdir()))
    try:
        cases = SCENARIOS[name](options)
    except SkippedError as reason:
        print(f"{name}: skipped: {reason}", file=sys.stderr)
        return True
    except Exception:  # noqa: BLE001 - the boundary: it is shown, and the exit status tells
        print(f"{name}: failed", file=sys.stderr)
        traceback.print_exc()
        return False
    found: dict[str, Any] = {"scenario": name, "machine": before, "cases": cases}
    print(json.dumps(found), flush=True)
    if keep:
        results.save(found)
        results.update()
    return True


def _peers_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench peers")
    parser.add_argument("verb", choices=["install"])
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--peers", type=Path, default=PEERS, help="where peers are installed")
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("scenario", nargs="?", choices=[*SCENARIOS, "all", "table"])
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each side, in turns")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the join's two sides")
    parser.add_argument(
        "--entities", type=int, default=1_000_000, help="most entities of growth: 10000000 works"
    )
    parser.add_argument("--peers", type=Path, default=PEERS, help="where peers are installed")
    parser.add_argument("--save", action="store_true", help="keep the results in bench/results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
