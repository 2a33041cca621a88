"""`python -m bench` lists the scenarios, `python -m bench NAME` runs one and prints JSON."""

import argparse
import json

from bench.load import machine
from bench.scenarios import SCENARIOS


def main() -> None:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("scenario", nargs="?", choices=sorted(SCENARIOS))
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each side, in turns")
    options = parser.parse_args()
    if options.scenario is None:
        for name, scenario in SCENARIOS.items():
            print(f"{name:10} {(scenario.__doc__ or '').splitlines()[0]}")
        return
    before = machine()
    figures = SCENARIOS[options.scenario](options.seconds, options.rounds)
    print(json.dumps({"scenario": options.scenario, "machine": before, "figures": figures}))


if __name__ == "__main__":
    main()
