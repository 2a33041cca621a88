"""The cluster and scaling scenarios as tables: ways, growth, hot keys, tails, and what follows."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.growth_model import fit_costs
from bench.results.table import median, number, table

Results = Mapping[str, Mapping[str, Any]]
Notes = Mapping[str, Any]

TYPICAL = 0.99
"""The exponent of the tables by number of shards."""
WORTH = 1.25
"""What a doubling has to bring at least, as a factor, to be worth it."""
FULL, FULLER = "60% used", "90% used"

_WAYS = ("one daemon", "client", "router", "router, cached", "haproxy")


def ways(results: Results) -> str:
    """Return microseconds of processor time of a read, by where its rows lie and by way."""
    cases = results["cluster"]["cases"]
    rows = []
    for what in dict.fromkeys(name.partition(": ")[0] for name in cases if ": " in name):
        for way in (way for way in _WAYS if f"{what}: {way}" in cases):
            case = cases[f"{what}: {way}"]
            us = [median(case, f"{part}_us") for part in ("caller", "hop", "daemons", "cpu")]
            ratio = number(case["ratio"]["median"]) if "ratio" in case else "1"
            rows.append((what, way, *map(number, us), ratio))
    return table(("a read of", "way", "caller", "hop", "daemons", "all", "over client"), rows)


def costs(results: Results) -> str:
    """Return what the model takes for the costs of the parts, in microseconds."""
    found = fit_costs(results["cluster"]["cases"])
    daemon = (found.call, 0.0, found.row)
    router = (found.request, found.shard, found.routed)
    kept = (found.kept_request, 0.0, found.kept_row)
    rows = [
        (what, *map(number, of_each))
        for what, of_each in (
            ("daemon, of each call", daemon),
            ("router, of each request", router),
            ("router that keeps all rows", kept),
        )
    ]
    return table(("us", "fixed", "shard asked", "row"), rows)


def moves(results: Results) -> str:
    """Return how fast slots move."""
    case = results["cluster"]["cases"]["moves"]
    notes = case["notes"]
    slots, events, rows, cpu, pause = (
        _range(case, figure)
        for figure in ("slots_per_s", "events_per_s", "rows_per_s", "event_cpu_us", "pause_ms")
    )
    return table(
        ("moves of", "slots/s", "events/s", "online rows/s", "CPU us per event", "pause ms"),
        [
            (
                f"{notes['slots']:,} slots of {notes['users']:,} users, {notes['events']:,} events",
                *(slots, events, rows, cpu, pause),
            )
        ],
    )


def shards(results: Results) -> str:
    """Return by number of shards what they answer, over one without a cache."""
    names = ("1 row", "1 row, cached", "16 rows", "16 rows, cached", "100 rows", "100 rows, tagged")
    series = [_growth(results, TYPICAL, name) for name in names]
    skew = series[0]
    rows = []
    for i, count in enumerate(skew["shards"]):
        answered = [
            number(notes["requests_per_s"][i] / _one(results, TYPICAL, name))
            for name, notes in zip(names, series, strict=True)
        ]
        spread = f"{number(skew['skew_min'][i])} to {number(skew['skew_max'][i])}"
        asked, routers = series[2]["fan_out"][i], skew["routers"][i]
        rows.append((f"{count:,}", *answered, spread, number(routers), number(asked)))
    head = ("shards", *names, "busiest over mean, 1 row", "routers, 1 row", "asked, 16 rows")
    return table(head, rows)


def hot(results: Results) -> str:
    """Return by exponent what the most shards answer, and from which on more bring little."""
    rows = []
    for exponent in exponents(results):
        cells = []
        for name in ("1 row", "1 row, cached"):
            notes = _growth(results, exponent, name)
            most = notes["requests_per_s"][-1] / _one(results, exponent, name)
            cells += [_useful(notes), number(most)]
        hits = _growth(results, exponent, "1 row, cached")["hits"][-1]
        share = _growth(results, exponent, "1 row")["hottest_share"]
        rows.append((f"{exponent:g}", f"{100 * share:.2g} %", *cells, f"{hits:.0%}"))
    head = (
        *("exponent", "hottest key", "doubling pays up to", "1,000 shards answer"),
        *("with caches, up to", "1,000 answer", "rows from caches"),
    )
    return table(head, rows)


def tails(results: Results) -> str:
    """Return how late the slowest of so many shards answers."""
    rows = []
    for name, case in results["scaling"]["cases"].items():
        if not name.startswith("tail, "):
            continue
        notes = case["notes"]
        for i, fan_out in enumerate(notes["fan_outs"]):
            p50, plain, same, other = (
                number(notes[figure][i])
                for figure in (
                    "plain, p50_ms",
                    *(f"{way}, p99_ms" for way in ("plain", "same shard", "other copy")),
                )
            )
            rows.append((name.removeprefix("tail, "), str(fan_out), p50, plain, same, other))
    head = (
        *("loops", "shards asked", "p50 ms", "p99 ms"),
        *("p99, hedged to the same shard", "to another copy"),
    )
    return table(head, rows)


def running(results: Results) -> str:
    """Return what shards that ran did, and in brackets what the model said."""
    rows = []
    for name, case in _running(results):
        hits = _both(case, "hit_share") if name.endswith("cached") else ""
        figures = ("calls_share", "cpu_share", "daemons_us", "hop_us")
        calls, cpu, daemons, hop = (_both(case, figure) for figure in figures)
        error = 100 * (case["ratio"]["median"] - 1)
        rows.append((name, calls, f"{error:+.1f} %", cpu, hits, daemons, hop))
    head = (
        *("", "busiest shard's calls", "off by", "its processor time", "rows from the cache"),
        *("daemons, us a request", "router, us"),
    )
    return table(head, rows)


def hedges(results: Results) -> str:
    """Return how many of the hedges of those runs were answered first."""
    sent, won = (
        sum(case["notes"][figure] for _, case in _running(results))
        for figure in ("hedged", "hedges_won")
    )
    return (
        f"In the runs below {number(won)} of {number(sent)} hedges were answered first; "
        "by how much is not known."
    )


def advice(results: Results) -> str:
    """Return when to add a shard, with the figures that say so."""
    return _ADVICE.format(**_advised(results))


_ADVICE = """\
1. **When the busiest loop is 60 % used**, by the processor time of its daemon. The p99 of one
   shard is then {p99} ms and of the slowest of 16 {p99_of_16} ms; at 90 % they are {late} and
   {late_of_16} ms. The mean of the shards says little: of 16 the busiest has {skew} times the
   mean.
2. **Not for batches.** A call costs a daemon as much as {rows} rows in it, and each shard that is
   asked is a call: of requests of 16 rows 16 shards answer {wide} times what one does, of 100
   rows {large} times. Put keys that are read together under one `{{tag}}` first; 16 shards then
   answer {tagged} times as much.
3. **Not for a hot key.** A shard can't answer more for a key than it does for all: with {share} %
   of the reads for one key no number of shards answers more than {bound} times what one does. 16
   answer {hot} and 64 {hotter} times, and with routers that keep rows for a second {kept} and
   {more_kept} times.
4. **Before it is late.** What moves costs both sides {event} us of processor time an event, which
   is {event} s for a million."""


def _advised(results: Results) -> Mapping[str, str]:
    cases = results["scaling"]["cases"]
    full, fuller = (cases[f"tail, {used}"]["notes"]["plain, p99_ms"] for used in (FULL, FULLER))
    fan_out = cases[f"tail, {FULL}"]["notes"]["fan_outs"].index(16)
    costs = fit_costs(results["cluster"]["cases"])
    event = median(results["cluster"]["cases"]["moves"], "event_cpu_us")
    hottest = _growth(results, TYPICAL, "1 row")["hottest_share"]
    counts = _growth(results, TYPICAL, "1 row")["shards"]

    def at(name: str, count: int) -> float:
        found: float = relative(results, TYPICAL, name)[counts.index(count)]
        return found

    figures = {
        "p99": full[0],
        "p99_of_16": full[fan_out],
        "late": fuller[0],
        "late_of_16": fuller[fan_out],
        "skew": _growth(results, TYPICAL, "1 row")["skew"][counts.index(16)],
        "rows": costs.call / costs.row,
        "wide": at("16 rows", 16),
        "large": at("100 rows", 16),
        "tagged": at("100 rows, tagged", 16),
        "share": 100 * hottest,
        "bound": 1 / hottest,
        "hot": at("1 row", 16),
        "hotter": at("1 row", 64),
        "kept": at("1 row, cached", 16),
        "more_kept": at("1 row, cached", 64),
        "event": event,
    }
    return {name: number(value) for name, value in figures.items()}


def exponents(results: Results) -> list[float]:
    """Return the exponents that the model was run for, ascending."""
    names = (name.split(", ") for name in results["scaling"]["cases"])
    return sorted({float(parts[1]) for parts in names if parts[0] == "growth"})


def relative(results: Results, exponent: float, name: str) -> list[float]:
    """Return by number of shards what they answer, over one without a cache."""
    one = _one(results, exponent, name)
    return [found / one for found in _growth(results, exponent, name)["requests_per_s"]]


def _running(results: Results) -> list[tuple[str, Mapping[str, Any]]]:
    cases = results["scaling"]["cases"].items()
    return [(n.removeprefix("running, "), c) for n, c in cases if n.startswith("running, ")]


def _growth(results: Results, exponent: float, name: str) -> Notes:
    notes: Notes = results["scaling"]["cases"][f"growth, {exponent:g}, {name}"]["notes"]
    return notes


def _one(results: Results, exponent: float, name: str) -> float:
    """Return what one shard answers of such requests without a cache or tags."""
    plain = _growth(results, exponent, name.partition(", ")[0])
    return float(plain["requests_per_s"][0])


def _useful(notes: Notes) -> str:
    """Return up to how many shards each doubling brings a quarter or more."""
    found: Sequence[float] = notes["requests_per_s"]
    by_count = dict(zip(notes["shards"], found, strict=True))
    useful = 1
    while 2 * useful in by_count and by_count[2 * useful] >= WORTH * by_count[useful]:
        useful *= 2
    return f"{useful:,}" if 2 * useful in by_count else "the end"


def _range(case: Mapping[str, Any], figure: str) -> str:
    spread = case["ours"][figure]
    ends = f"{number(spread['min'])} to {number(spread['max'])}"
    return f"{number(spread['median'])} ({ends})"


def _both(case: Mapping[str, Any], figure: str) -> str:
    return f"{number(median(case, figure))} ({number(median(case, figure, 'against'))})"
