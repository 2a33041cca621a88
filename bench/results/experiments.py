"""The experiments scenario as tables: pooled rates with the bound that their number allows."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from bench.results.table import table

Results = Mapping[str, Mapping[str, Any]]

_Z_ONE_SIDED = 1.6448536269514722


def false_positives(results: Results) -> str:
    """Return how often arms that are the same are told apart, and healthy splits alarm."""
    rows = [
        (name, f"{runs:,}", _rate(ours, runs), f"{against:.1%}")
        for name, ours, against, runs in _cases(results, "A/A, ", "sample ratio, ")
    ]
    return table(("experiment", "runs", "here (at most, 95 % sure)", "peeked z-test"), rows)


def power(results: Results) -> str:
    """Return how often an effect is found, and after how many units on average."""
    cases = results["experiments"]["cases"]
    rows = []
    for name, ours, against, _ in _cases(results, "power, "):
        units = cases[name]["ours"]["units_to_end"]["median"]
        rows.append(
            (name.removeprefix("power, "), f"{ours:.0%}", f"{units:,.0f}", f"{against:.0%}")
        )
    head = (
        "effect",
        "found by the sequence",
        "units until then, mean",
        "found by one look at 8,000",
    )
    return table(head, rows)


def guardrails(results: Results) -> str:
    """Return after how many requests of its own a bad arm is stopped."""
    rows = [
        (
            name,
            str(notes["runs"]),
            f"{notes['median']:,.0f}",
            f"{notes['p95']:,}",
            f"{notes['most']:,}",
        )
        for name, notes in _guarded(results)
        if "median" in notes
    ]
    return table(
        ("an arm that fails more by", "runs", "stopped after, median", "95 %", "all"), rows
    )


def healthy(results: Results) -> str:
    """Return how often an arm as good as the control is stopped."""
    rows = [
        (name.removeprefix("healthy, "), f"{notes['runs']:,}", str(notes["stopped"]))
        for name, notes in _guarded(results)
        if "stopped" in notes
    ]
    return table(("both arms", "runs of 1,000,000 requests", "stopped"), rows)


def bandits(results: Results) -> str:
    """Return what a bandit loses against even shares, and where its traffic is at the end."""
    rows = [
        (
            name,
            f"{case['notes']['runs']:,}",
            f"{case['ours']['lost']['median']:,.0f}",
            f"{case['against']['lost']['median']:,.0f}",
            f"{case['ours']['best_share']['median']:.0%}",
        )
        for name, case in results["bandits"]["cases"].items()
    ]
    return table(("arms", "runs", "lost", "lost by even shares", "best arm's last share"), rows)


def _guarded(results: Results) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, case in results["guardrails"]["cases"].items():
        yield name, case["notes"]


def _cases(results: Results, *prefixes: str) -> Iterator[tuple[str, float, float, int]]:
    for name, case in results["experiments"]["cases"].items():
        if name.startswith(prefixes):
            notes = case["notes"]
            yield name, notes["pooled"], notes["pooled_against"], notes["runs"]


def _rate(rate: float, runs: int) -> str:
    """Return a rate with its upper bound: Wilson's, one-sided."""
    z = _Z_ONE_SIDED
    middle = rate + z * z / (2 * runs)
    spread = z * math.sqrt(rate * (1 - rate) / runs + z * z / (4 * runs * runs))
    return f"{rate:.2%} ({(middle + spread) / (1 + z * z / runs):.2%})"
