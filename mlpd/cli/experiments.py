"""`mlpd experiments`: units randomised between a route's arms, and what that shows so far."""

import json
from typing import Any

import click

from mlpd.cli.lazy import OrderedGroup
from mlpd.cli.output import print_lines, print_pairs, print_table, show_share, show_time, show_value
from mlpd.cli.session import Session, connected, examples
from mlpd.core.errors import ValidationError


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
@click.option("--planned-units", type=int, help="Units at which the intervals are tightest.")
@click.option("--control", metavar="ARM", help="The arm to compare with; the first by default.")
@click.option(
    "--file",
    type=click.File(encoding="utf-8"),
    help="The experiment as JSON, `-` for stdin, instead of the options above.",
)
@connected
def create(
    session: Session,
    name: str,
    *,
    unit: str | None,
    arms: tuple[str, ...],
    metrics: tuple[str, ...],
    planned_units: int | None,
    control: str | None,
    file: Any,
) -> None:
    """Create an experiment.

    Then name it on a route that has arms of the same names.
    """
    if file is not None:
        document = _read(file.read())
    else:
        if unit is None or planned_units is None or not arms or not metrics:
            raise click.UsageError(
                "an experiment takes --unit, --arm, --metric and --planned-units, or --file"
            )
        document = {
            "unit": unit,
            "arms": dict(map(_weight, arms)),
            "metrics": [_metric(text) for text in metrics],
            "planned_units": planned_units,
            **({} if control is None else {"control": control}),
        }
    session.show(session.client.experiments.put(name, document), _print_experiment)


@experiments.command()
@click.argument("name")
@click.argument("arms", nargs=-1, required=True, metavar="ARM=WEIGHT...")
@connected
def weights(session: Session, name: str, arms: tuple[str, ...]) -> None:
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
    session.show(session.client.experiments.put(name, document), _print_experiment)


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
    ratio = result["sample_ratio"]
    print_pairs(
        {
            "experiment": spec["name"],
            "unit": spec["unit"],
            "method": f"{spec['method']}, alpha {spec['alpha']:g}, {spec['correction']}",
            "units": f"{result['units']:,} (planned: {spec['planned_units']:,})",
            "excluded": _excluded(result),
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
