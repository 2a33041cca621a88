"""All scenarios by name; each returns its cases: ours, its floor, and their ratio."""

from collections.abc import Callable

from bench.backup import backup
from bench.drift import drift
from bench.feast import feast
from bench.footprint import footprint
from bench.join import join
from bench.loop import loop
from bench.options import Options
from bench.serving import ingest, predict, read
from bench.start import start
from bench.turns import Case

SCENARIOS: dict[str, Callable[[Options], dict[str, Case]]] = {
    "read": read,
    "predict": predict,
    "ingest": ingest,
    "join": join,
    "drift": drift,
    "start": start,
    "loop": loop,
    "footprint": footprint,
    "backup": backup,
    "feast": feast,
}
