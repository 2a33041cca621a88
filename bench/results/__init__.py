"""Saved results: one JSON file per scenario, and the pages and pictures that come from them.

A page marks a generated part with `<!-- bench: NAME -->` and `<!-- bench: end -->`; `update` writes
what `PARTS` makes of the results between the two, so that it can't drift from them.
"""

import json
import re
import subprocess
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.results import capacity, drift_days, experiments, growth, scaling, scaling_picture
from bench.results.table import machines, overview

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
Results = Mapping[str, Mapping[str, Any]]
"""What was saved, by scenario."""

PARTS: dict[str, Callable[[Results], str]] = {
    "overview": overview,
    "machines": machines,
    "rates": capacity.rates,
    "bytes": capacity.bytes_table,
    "growth": growth.entities_table,
    "formulas": capacity.formulas,
    "memory": capacity.memory,
    "flights": capacity.flights,
    "shop": capacity.shop,
    "experiments": experiments.false_positives,
    "power": experiments.power,
    "guardrails": experiments.guardrails,
    "healthy": experiments.healthy,
    "bandits": experiments.bandits,
    "drift_rates": drift_days.rates,
    "drift_days": drift_days.days,
    "drift_widths": drift_days.widths,
    "ways": scaling.ways,
    "costs": scaling.costs,
    "moves": scaling.moves,
    "shards": scaling.shards,
    "hot": scaling.hot,
    "tails": scaling.tails,
    "running": scaling.running,
    "hedges": scaling.hedges,
    "advice": scaling.advice,
}
PICTURES: dict[str, Callable[[Results], str]] = {
    "bench/results/growth.svg": growth.draw,
    "mlpd/docs/pictures/scaling.svg": scaling_picture.draw,
}
"""Pictures by path in the repository."""
_DOCS = ROOT / "mlpd" / "docs"
PAGES = (
    FOLDER / "README.md",
    *(_DOCS / name for name in ("capacity.md", "scaling.md")),
    *(_DOCS / "paths" / name for name in ("experiments.md", "monitor.md")),
)

_PART = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- bench: end -->)", re.DOTALL)


def save(found: Mapping[str, Any]) -> Path:
    """Keep a scenario's results, with the time and the commit that they are of."""
    stamp = {"at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "commit": _commit()}
    path = FOLDER / f"{found['scenario']}.json"
    path.write_text(json.dumps({**found, **stamp}, indent=1) + "\n", "utf-8")
    return path


def load() -> Results:
    """Return all saved results."""
    return {
        path.stem: json.loads(path.read_text("utf-8")) for path in sorted(FOLDER.glob("*.json"))
    }


def update() -> None:
    """Write the generated parts of all pages, and the pictures, anew."""
    results = load()
    for name, draw in PICTURES.items():
        (ROOT / name).write_text(draw(results), "utf-8")
    for page in PAGES:
        page.write_text(render(page.read_text("utf-8"), results), "utf-8")


def render(page: str, results: Results) -> str:
    """Return a page with its generated parts made of `results`."""
    return _PART.sub(lambda m: m[1] + PARTS[m[2]](results) + "\n" + m[3], page)


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
