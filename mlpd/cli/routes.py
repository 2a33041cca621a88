"""`mlpd routes`: named endpoints, which model versions answer on them, and their history."""

import json
from typing import Any

import click

from mlpd.cli.lazy import OrderedGroup
from mlpd.cli.output import (
    print_lines,
    print_pairs,
    print_table,
    print_title,
    show_share,
    show_time,
    show_value,
)
from mlpd.cli.session import Session, confirm, connected, examples, yes_option
from mlpd.core.errors import ValidationError


@click.group(cls=OrderedGroup)
def routes() -> None:
    """Decide which models answer."""


@routes.command("list")
@connected
def list_routes(session: Session) -> None:
    """List routes with the versions that serve them."""
    session.show(session.client.routes.list(), _print_routes)


@routes.command()
@click.argument("name")
@connected
def show(session: Session, name: str) -> None:
    """Show a route: arms, shadows, experiment, and what serves it now."""
    session.show(session.client.routes.get(name), _print_route)


@routes.command(
    "set",
    epilog=examples(
        "mlpd routes set flight-risk --service flight_risk --arm flight-risk@champion",
        "mlpd routes set flight-risk --service flight_risk --experiment retrain \\",
        "    --arm control=flight-risk@1 --arm treatment=flight-risk@2 --shadow flight-risk@3",
    ),
)
@click.argument("name")
@click.option("--service", help="The feature service that makes the vector.")
@click.option(
    "--arm", "arms", multiple=True, metavar="[ARM=]MODEL@VERSION[:WEIGHT]", help="May be repeated."
)
@click.option("--shadow", "shadows", multiple=True, metavar="MODEL@VERSION", help="Likewise.")
@click.option("--experiment", help="The experiment whose assignment chooses the arm.")
@click.option("--fallback", type=float, help="The score answered when no arm can.")
@click.option(
    "--file",
    type=click.File(encoding="utf-8"),
    help="The route as JSON, `-` for stdin, instead of the options above.",
)
@click.option("--expected", type=int, metavar="N", help="Only if it is at this version now.")
@connected
def set_(  # noqa: PLR0913 - one per option
    session: Session,
    name: str,
    *,
    service: str | None,
    arms: tuple[str, ...],
    shadows: tuple[str, ...],
    experiment: str | None,
    fallback: float | None,
    file: Any,
    expected: int | None,
) -> None:
    """Make a route, or its next version.

    Its models are loaded, and serve, when this returns.
    """
    if file is not None:
        document = _read(file.read())
    else:
        if service is None or not arms:
            raise click.UsageError("a route takes --service and at least one --arm, or --file")
        document = {
            "service": service,
            "arms": [_arm(text) for text in arms],
            "shadows": list(shadows),
            "experiment": experiment,
            "fallback": fallback,
        }
    session.show(session.client.routes.put(name, document, expected=expected), _print_route)


@routes.command()
@click.argument("name")
@connected
def history(session: Session, name: str) -> None:
    """Show a route's versions, newest first, and what each changed."""
    session.show(session.client.routes.history(name), _print_history)


@routes.command()
@connected
def shadows(session: Session) -> None:
    """Show how far shadows differ from the models that they shadow."""
    session.show(session.client.shadows(), _print_shadows)


@routes.command()
@click.argument("name")
@click.argument("version", type=int)
@connected
def rollback(session: Session, name: str, version: int) -> None:
    """Make an earlier version's content the next version."""
    session.show(session.client.routes.roll_back(name, version), _print_route)


@routes.command()
@click.argument("name")
@yes_option
@connected
def delete(session: Session, name: str, *, yes: bool) -> None:
    """Remove a route; its history stays."""
    confirm(session, f"Remove the route {name}?  Requests to it will fail.", yes=yes)
    answer = session.client.routes.delete(name)
    session.show(answer, lambda _: print_lines(f"removed the route {name}"))


def _arm(text: str) -> dict[str, Any]:
    """Return the arm in `[ARM=]MODEL@VERSION[:WEIGHT]`."""
    name, equals, rest = text.partition("=")
    model, colon, weight = (rest if equals else text).partition(":")
    try:
        found: dict[str, Any] = {"model": model, "weight": float(weight) if colon else 1.0}
    except ValueError:
        raise click.UsageError(f"the weight in --arm {text!r} is not a number") from None
    return {"name": name, **found} if equals else found


def _read(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ValidationError(f"the file is not JSON: {error}", code="malformed_body") from None
    if not isinstance(document, dict):
        raise ValidationError("the file is not a JSON object", code="malformed_body")
    # What `routes show --json` prints goes back in as it is.
    return {k: v for k, v in document.items() if k not in ("name", "version", "serving", "error")}


def _print_routes(answer: dict[str, Any]) -> None:
    rows = [
        (
            *(route["name"], route["version"]),
            "broken" if route["error"] else "ready",
            "\n".join(f"{arm}: {reference}" for arm, reference in (route["serving"] or {}).items()),
            *(route["shadows"], route["experiment"]),
        )
        for route in answer["routes"]
    ]
    headers = ["route", "version", "state", "serving", "shadows", "experiment"]
    print_table(headers, rows, empty="No routes yet.  mlpd routes set NAME --help shows how.")


def _print_route(route: dict[str, Any]) -> None:
    print_pairs(
        {
            "route": route["name"],
            "version": route["version"],
            "service": route["service"],
            "state": "broken" if route["error"] else "ready",
            "error": route["error"],
            "shadows": route["shadows"] or None,
            "experiment": route["experiment"],
            "fallback": route["fallback"],
        }
    )
    serving = route["serving"] or {}
    total = sum(arm["weight"] for arm in route["arms"])
    arms = [
        (arm["name"], arm["model"], serving.get(arm["name"]), f"{arm['weight'] / total:.1%}")
        for arm in route["arms"]
    ]
    print_table(["arm", "model", "serving", "share"], arms, title="Arms")


def _print_shadows(answer: dict[str, Any]) -> None:
    rows = [
        (
            *(pair["route"], pair["primary"], pair["shadow"], pair["n"]),
            *(pair["mean"], _interval(pair["mean_interval"]), pair["max_abs"]),
            show_share(pair["disagreement_rate"]),
        )
        for pair in answer["shadows"]
    ]
    headers = [
        *("route", "primary", "shadow", "rows"),
        *("difference", "interval", "largest", "other label"),
    ]
    print_table(headers, rows, empty="No shadow has scored anything since the start.")


def _interval(bounds: list[float] | None) -> str | None:
    return None if bounds is None else f"[{show_value(bounds[0])}, {show_value(bounds[1])}]"


def _print_history(answer: dict[str, Any]) -> None:
    for entry in answer["versions"]:
        print_title(f"version {entry['version']}, {show_time(entry['at'])}, {entry['by']}")
        lines = map(_change, entry["changes"]) if entry["route"] else ["removed"]
        print_lines(*(f"  {line}" for line in lines))


def _change(change: dict[str, Any]) -> str:
    path, before, after = change["path"], change["from"], change["to"]
    if before is None:
        return f"+ {path}: {show_value(after)}"
    if after is None:
        return f"- {path}: {show_value(before)}"
    return f"~ {path}: {show_value(before)} -> {show_value(after)}"
