"""`mlpd experiments`: units randomised between a route's arms, and what that shows so far."""

import json
from pathlib import Path
from typing import Any

import click

from mlpd.cli.lazy import OrderedGroup
from mlpd.cli.output import print_lines, print_pairs, print_table, show_share, show_time, show_value
from mlpd.cli.session import Session, connected, examples
from mlpd.core.errors import ValidationError

OUTCOMES_PART = 5_000
"""Outcomes of one request."""


@click.group(cls=OrderedGroup)
def experiments() -> None:
    """Compare models on live traffic."""


@experiments.command("list")
@connected
def list_experiments(session: Session) -> None:
    """List experiments."""
    answer = session.client.experiments.list()
    names = answer["experiments"] or ["No experiments yet."]
    session.show(answer, lambda _: print_lines(*names))


@experiments.command()
@click.argument("name")
@connected
def show(session: Session, name: str) -> None:
    """Show an experiment's result.

    Its intervals hold at every look: looking as often as you like costs no validity.
    """
    session.show(session.client.experiments.get(name), _print_experiment)


@experiments.command(
    epilog=examples(
        "mlpd experiments create retrain --unit tailnum --arm control=1 --arm treatment=1 \\",
        "    --metric squared_error:mean:lower --planned-units 3000",
    )
)
@click.argument("name")
@click.option("--unit", help="The request field that identifies a unit, such as tailnum.")
@click.option("--arm", "arms", multiple=True, metavar="ARM=WEIGHT", help="Two or more.")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME[:KIND[:BETTER]]",
    help="One or more: label, correct or squared_error; proportion, mean or ratio; higher or "
    "lower.",
)
@click.option(
    "--guardrail",
    "guardrails",
    multiple=True,
    metavar="ON[=LIMIT]",
    help="What stops an arm: errors, nulls, latency=MS, or METRIC[=MARGIN].",
)
@click.option(
    "--promote", type=float, metavar="MARGIN", help="Promote an arm that excludes such a loss."
)
@click.option("--planned-units", type=int, help="Units at which the intervals are tightest.")
@click.option("--control", metavar="ARM", help="The arm to compare with; the first by default.")
@click.option(
    "--file",
    type=click.File(encoding="utf-8"),
    help="The experiment as JSON, `-` for stdin, instead of the options above.",
)
@connected
def create(session: Session, /, name: str, *, file: Any, **options: Any) -> None:
    """Create an experiment.

    Then name it on a route that has arms of the same names.
    """
    document = _document(options) if file is None else _read(file.read())
    session.show(session.client.experiments.put(name, document), _print_experiment)


@experiments.command()
@click.argument("name")
@click.argument("arms", nargs=-1, required=True, metavar="ARM=WEIGHT...")
@click.option("--force", is_flag=True, help="Also for an arm that a guardrail stopped.")
@connected
def weights(session: Session, name: str, arms: tuple[str, ...], *, force: bool) -> None:
    """Change the arms' weights.

    That opens a new phase; arms that aren't named keep their weights.
    """
    document = session.client.experiments.get(name)["spec"]
    given = dict(map(_weight, arms))
    if unknown := sorted(given.keys() - document["arms"].keys()):
        raise ValidationError(
            f"experiment {name!r} has no arm {unknown[0]!r}; it has {', '.join(document['arms'])}",
            code="unknown_arm",
            hint="Arms are fixed; another set of arms is another experiment.",
        )
    document = {k: v for k, v in document.items() if k != "name" and v is not None}
    document["arms"] = {**document["arms"], **given}
    answer = session.client.experiments.put(name, document, force=force)
    session.show(answer, _print_experiment)


@experiments.command()
@click.argument("name")
@click.argument("arm")
@click.option("--why", default="", help="For the history.")
@click.option("--force", is_flag=True, help="Also an arm that a guardrail stopped.")
@connected
def end(session: Session, name: str, arm: str, *, why: str, force: bool) -> None:
    """End an experiment: everybody gets ARM from now on.

    Its results stay readable, and its part of a namespace is free again.
    """
    session.show(session.client.experiments.end(name, arm, why=why, force=force), _print_experiment)


@experiments.command()
@click.argument("name")
@connected
def history(session: Session, name: str) -> None:
    """Show changes, by whom or by itself, newest first."""
    session.show(session.client.experiments.history(name), _print_history)


@experiments.command(
    epilog=examples(
        "mlpd experiments outcomes checkout \\",
        """    '{"unit": "u17", "id": "order-99", "values": {"revenue": 12.5}}'""",
        "mlpd experiments outcomes checkout --file outcomes.ndjson",
    )
)
@click.argument("name")
@click.argument("outcomes", nargs=-1, metavar="JSON...")
@click.option("--file", type=click.File(encoding="utf-8"), help="One JSON object a line.")
@connected
def outcomes(session: Session, name: str, outcomes: tuple[str, ...], *, file: Any) -> None:
    """Send what became of units: unit, id, and values by metric.

    The same id again replaces what it said before.
    """
    lines = [*outcomes, *(line for line in file or () if line.strip())]
    if not lines:
        raise click.UsageError("give outcomes as JSON, or --file")
    total: dict[str, Any] = {"accepted": 0, "replaced": 0, "rejected": []}
    for start in range(0, len(lines), OUTCOMES_PART):
        part = [_outcome(line) for line in lines[start : start + OUTCOMES_PART]]
        answer = session.client.experiments.send_outcomes(name, part)
        total["accepted"] += answer["accepted"]
        total["replaced"] += answer["replaced"]
        total["rejected"] += [{**r, "index": start + r["index"]} for r in answer["rejected"]]
    session.show(total, _print_outcomes)
    if total["rejected"]:
        raise SystemExit(1)


@experiments.command()
@click.argument("name")
@click.option("--metric", help="Whose comparison; the first by default.")
@click.option("--arm", help="Which arm against the control; the first by default.")
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="SVG.")
@connected
def picture(session: Session, name: str, *, metric: str | None, arm: str | None, out: Path) -> None:
    """Draw a comparison over time: its lift, and the interval.

    The interval holds at every look.
    """
    drawn = session.client.experiments.picture(name, metric=metric, arm=arm)
    out.write_text(drawn, "utf-8")
    session.show({"path": str(out)}, lambda _: print_lines(f"drawn into {out}"))


def _document(options: dict[str, Any]) -> dict[str, Any]:
    """Return the experiment that the options of `create` describe."""
    if not all(options[name] for name in ("unit", "arms", "metrics", "planned_units")):
        raise click.UsageError(
            "an experiment takes --unit, --arm, --metric and --planned-units, or --file"
        )
    promote = options["promote"]
    document = {
        "unit": options["unit"],
        "arms": dict(map(_weight, options["arms"])),
        "metrics": [_metric(text) for text in options["metrics"]],
        "planned_units": options["planned_units"],
        "guardrails": [_guardrail(text) for text in options["guardrails"]],
        "promotion": None if promote is None else {"margin": promote},
        "control": options["control"],
    }
    return {key: value for key, value in document.items() if value not in (None, [])}


def _weight(text: str) -> tuple[str, float]:
    name, equals, weight = text.partition("=")
    try:
        if equals:
            return name, float(weight)
    except ValueError:
        pass
    raise click.UsageError(f"{text!r} is no ARM=WEIGHT")


def _metric(text: str) -> dict[str, str]:
    return dict(zip(("name", "kind", "better"), text.split(":"), strict=False))


def _guardrail(text: str) -> dict[str, Any]:
    name, _, limit = text.partition("=")
    try:
        number = float(limit) if limit else None
    except ValueError:
        raise click.UsageError(f"{text!r} is no ON[=LIMIT]") from None
    if name in ("errors", "nulls", "latency"):
        key, on = ("limit_ms" if name == "latency" else "tolerance"), {"on": name}
    else:
        key, on = "margin", {"on": "metric", "metric": name}
    return on if number is None else {**on, key: number}


def _read(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ValidationError(f"the file is not JSON: {error}", code="malformed_body") from None
    if not isinstance(document, dict):
        raise ValidationError("the file is not a JSON object", code="malformed_body")
    return {k: v for k, v in document.items() if k != "name"}


def _print_experiment(answer: dict[str, Any]) -> None:
    spec, result = answer["spec"], answer["result"]
    if answer["preference"] is not None:
        _print_preference(answer)
        return
    if result is None:  # a router has changed it on all shards
        print_lines(
            f"Experiment {spec['name']} is as given on all shards; each has its own result."
        )
        return
    ratio = result["sample_ratio"]
    print_pairs(
        {
            "experiment": spec["name"],
            "state": _state(answer),
            "unit": spec["unit"],
            "method": f"{spec['method']}, alpha {spec['alpha']:g}, {spec['correction']}",
            "bandit": answer["bandit"] and answer["bandit"]["why"],
            "units": f"{result['units']:,} (planned: {spec['planned_units']:,})",
            "excluded": _excluded(result),
            "stopped": ", ".join(f"{a} until {show_time(t)}" for a, t in answer["cooling"].items())
            or None,
            "sample ratio": f"{'ALARM' if ratio['alarm'] else 'ok'} (p = {ratio['p_value']:.3g})",
        }
    )
    for phase in result["phases"]:
        _print_phase(phase)
    rows = [
        (
            *(c["metric"], f"{c['arm']} - {c['control']}"),
            *(c["difference"], _interval(c), show_share(c["relative"])),
            *(c["p_adjusted"], c["verdict"], c["reason"]),
        )
        for c in result["comparisons"]
    ]
    headers = ["metric", "arms", "difference", "interval", "relative", "p", "verdict", "why"]
    print_table(headers, rows, title="Comparisons")
    _print_bandit(answer["bandit"])
    _print_other_answers([c for c in result["comparisons"] if c["fixed"]])


def _print_bandit(found: dict[str, Any] | None) -> None:
    """Print what a bandit's last look found: chances, and values if everybody got the arm."""
    if found is None:
        return
    rows = [
        (
            *(arm, units, show_share(found["chances"].get(arm))),
            *(found["values"].get(arm, {}).get(name) for name in ("ips", "dr", "std_error")),
        )
        for arm, units in found["units"].items()
    ]
    headers = ["arm", "units that count", "chance", "value (IPS)", "value (DR)", "+- (DR)"]
    print_table(headers, rows, title="Bandit")


def _state(answer: dict[str, Any]) -> str:
    chosen = answer["chosen"]
    return f"{answer['state']}, all get {chosen}" if chosen else str(answer["state"])


def _print_preference(answer: dict[str, Any]) -> None:
    spec, found = answer["spec"], answer["preference"]
    arms = [spec["control"], *(arm for arm in spec["arms"] if arm != spec["control"])]
    bounds = None if found["low"] is None else {"low": found["low"], "high": found["high"]}
    print_pairs(
        {
            "experiment": spec["name"],
            "state": _state(answer),
            "unit": f"{spec['unit']}, one list of both arms' picks",
            "lists": f"{found['lists']:,}, {found['clicked']:,} of them clicked",
            "preferred": f"{arms[0]} {found['first']:,}, {arms[1]} {found['second']:,}",
            f"prefer {arms[1]}": show_share(found["share"]),
            "at every look": bounds and _interval(bounds),
            "sign test, one look": f"p = {found['p_value']:.3g}",
            "verdict": f"{arms[1]}: {found['verdict']} (e = {found['e_value']:.3g})",
        }
    )


def _print_other_answers(comparisons: list[dict[str, Any]]) -> None:
    """Print what a fixed horizon and a Bayesian would say; nothing before there is an estimate."""
    if not comparisons:
        return
    rows = [
        (
            *(c["metric"], f"{c['arm']} - {c['control']}"),
            *(_interval(c["fixed"]), c["fixed"]["p_value"]),
            *(show_share(c["bayesian"]["chance"]), c["bayesian"]["risk"]),
            show_share(c["variance_kept"]) if c["variance_kept"] is not None else None,
        )
        for c in comparisons
    ]
    headers = ["metric", "arms", "Welch, one look", "p", "chance to win", "risk", "variance kept"]
    print_table(headers, rows, title="Other answers, not for peeking")


def _outcome(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise click.UsageError(f"{line.strip()[:60]!r} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise click.UsageError(f"{line.strip()[:60]!r} is not a JSON object")
    return found


def _print_outcomes(total: dict[str, Any]) -> None:
    print_lines(f"{total['accepted']:,} stored, {total['replaced']:,} of them in place of others")
    if total["rejected"]:
        rows = [(r["index"], r["code"], r["message"], r["hint"]) for r in total["rejected"]]
        headers = ["outcome", "code", "why", "what to do"]
        print_table(headers, rows, title=f"Refused: {len(rows):,}")


def _print_history(answer: dict[str, Any]) -> None:
    rows = [
        (
            *(show_time(e["at"]), e["action"], e["arm"], e["by"]),
            ", ".join(f"{arm}={weight:g}" for arm, weight in e["weights"].items()),
            e["why"] or None,
        )
        for e in answer["events"]
    ]
    print_table(["at", "what", "arm", "by", "weights from then on", "why"], rows)


def _print_phase(phase: dict[str, Any]) -> None:
    names = sorted({name for arm in phase["arms"].values() for name in arm["metrics"]})
    rows = [
        (
            *(arm, values["weight"], values["units"]),
            *(values["metrics"].get(name, {}).get("value") for name in names),
        )
        for arm, values in phase["arms"].items()
    ]
    title = f"Phase {phase['phase']}, since {show_time(phase['started_us'])}"
    print_table(["arm", "weight", "units", *names], rows, title=title)


def _excluded(result: dict[str, Any]) -> str | None:
    """Return how many units count for nothing because they were seen in two arms."""
    moved, switched = result["units_moved"], result["units_switched"]
    if not moved + switched:
        return None
    alert = "  (more than 1 %: look into it)" if result["switch_alert"] else ""
    return f"{moved:,} moved by new weights, {switched:,} switched arms{alert}"


def _interval(comparison: dict[str, Any]) -> str | None:
    if comparison["low"] is None:
        return None
    return f"[{show_value(comparison['low'])}, {show_value(comparison['high'])}]"
