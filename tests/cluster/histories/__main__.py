"""Simulate seeds: `python -m tests.cluster.histories --seeds 5000`; one: `--seed N --trace`."""

# ruff: noqa: T201 - it is a command

import argparse
import sys
import time

from tests.cluster.histories.nodes import lighter
from tests.cluster.histories.world import prepared, simulate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=500, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--trace", action="store_true", help="print all that happens")
    asked = parser.parse_args()
    seeds = range(asked.first, asked.first + asked.seeds)
    if asked.seed is not None:
        seeds = range(asked.seed, asked.seed + 1)
    began_s, failed = time.process_time(), 0
    requests = events = crashes = moves = added = removed = 0
    with lighter(), prepared() as root:
        for seed in seeds:
            outcome = simulate(root, seed, keep_trace=asked.trace)
            requests, events = requests + outcome.requests, events + outcome.events
            crashes, moves = crashes + outcome.crashes, moves + outcome.moves
            added, removed = added + outcome.added, removed + outcome.removed
            if asked.trace:
                print("\n".join(outcome.trace))
            if outcome.violations:
                failed += 1
                print(f"seed {seed}:", *outcome.violations[:5], sep="\n  ", flush=True)
    cpu_s = time.process_time() - began_s
    print(
        f"{len(seeds)} seeds, {failed} of them wrong, in {cpu_s:.1f} s of CPU: "
        f"{requests} requests, {events} events, {crashes} crashes, {moves} parts moved, "
        f"{added} members added, {removed} removed"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
