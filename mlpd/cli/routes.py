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
    show_duration,
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
        "mlpd routes set flight-risk --service flight_risk --canary new \\",
        "    --arm old=flight-risk@1 --arm new=flight-risk@2 \\",
        "    --step 1%:10m --step 10%:1h:1000 --step 100%:1h --guard slower=2",
    ),
)
@click.argument("name")
@click.option("--service", help="The feature service that makes the vector.")
@click.option(
    "--arm", "arms", multiple=True, metavar="[ARM=]MODEL@VERSION[:WEIGHT]", help="May be repeated."
)
@click.option("--shadow", "shadows", multiple=True, metavar="MODEL@VERSION", help="Likewise.")
@click.option("--experiment", help="The experiment whose assignment chooses the arm.")
@click.option(
    "--fallback-model",
    "fallback_models",
    multiple=True,
    metavar="MODEL@VERSION",
    help="Answers for an arm that can't: MODEL@champion~1 is the champion before. Repeatable.",
)
@click.option("--fallback", type=float, help="The score answered when none of them can either.")
@click.option(
    "--log-share", type=float, metavar="SHARE", help="Log this share of the rows (0.1), by lot."
)
@click.option("--canary", metavar="ARM", help="The arm whose share grows by --step.")
@click.option(
    "--step",
    "steps",
    multiple=True,
    metavar="SHARE:TIME[:ROWS]",
    help="Of the canary: 5%:10m, or 5%:10m:1000 for at least 1,000 of its rows. Repeatable.",
)
@click.option(
    "--guard",
    "guards",
    multiple=True,
    metavar="NAME=LIMIT",
    help="What ends the canary: failed_share, slower, score_shift; rows. Repeatable.",
)
@click.option(
    "--on-failure",
    type=click.Choice(["rollback", "stop"]),
    help="Whether a guard takes the canary's arm out (the default), or leaves it as it is.",
)
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
    fallback_models: tuple[str, ...],
    fallback: float | None,
    log_share: float | None,
    canary: str | None,
    steps: tuple[str, ...],
    guards: tuple[str, ...],
    on_failure: str | None,
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
            "fallback_models": list(fallback_models),
            "fallback": fallback,
            "log_share": log_share,
            "canary": _canary(canary, steps, guards, on_failure),
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


def _canary(
    arm: str | None, steps: tuple[str, ...], guards: tuple[str, ...], on_failure: str | None
) -> dict[str, Any] | None:
    if arm is None:
        if steps or guards or on_failure:
            raise click.UsageError("--step, --guard and --on-failure belong to a --canary ARM")
        return None
    found: dict[str, Any] = {"arm": arm, "steps": [_step(text) for text in steps]}
    if guards:
        found["guard"] = dict(map(_guard, guards))
    return found if on_failure is None else {**found, "on_failure": on_failure}


def _step(text: str) -> dict[str, Any]:
    """Return the step in `SHARE:TIME[:ROWS]`; 5% is 0.05."""
    share, _, rest = text.partition(":")
    hold, colon, rows = rest.partition(":")
    try:
        number = float(share.removesuffix("%")) / (100.0 if share.endswith("%") else 1.0)
        found: dict[str, Any] = {"share": number, "for": hold}
        return {**found, "rows": int(rows)} if colon else found
    except ValueError:
        raise click.UsageError(f"--step {text!r} is not SHARE:TIME[:ROWS], as 5%:10m") from None


def _guard(text: str) -> tuple[str, float | int | None]:
    name, _, limit = text.partition("=")
    try:
        if limit == "off":
            return name, None
        return name, int(limit) if name == "rows" else float(limit)
    except ValueError:
        raise click.UsageError(f"--guard {text!r} is not NAME=LIMIT, as slower=2") from None


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
            _state(route),
            "\n".join(f"{arm}: {reference}" for arm, reference in (route["serving"] or {}).items()),
            *(route["shadows"], route["experiment"]),
        )
        for route in answer["routes"]
    ]
    headers = ["route", "version", "state", "serving", "shadows", "experiment"]
    print_table(headers, rows, empty="No routes yet.  mlpd routes set NAME --help shows how.")


def _state(route: dict[str, Any]) -> str:
    trial = route["trial"]
    if route["error"]:
        return "broken"
    if trial is None or trial["state"] != "running":
        return "ready"
    return f"canary, step {trial['step']} of {trial['steps']}"


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
            "fallback models": route["fallback_models"] or None,
            "serving fallbacks": route["serving_fallbacks"] or None,
            "fallback": route["fallback"],
            "logged": None if route["log_share"] == 1.0 else show_share(route["log_share"]),
        }
    )
    serving = route["serving"] or {}
    total = sum(arm["weight"] for arm in route["arms"])
    arms = [
        (arm["name"], arm["model"], serving.get(arm["name"]), f"{arm['weight'] / total:.1%}")
        for arm in route["arms"]
    ]
    print_table(["arm", "model", "serving", "share"], arms, title="Arms")
    if route["trial"] is not None:
        _print_trial(route["trial"], route["canary"])


def _print_trial(trial: dict[str, Any], canary: dict[str, Any] | None) -> None:
    state = trial["state"].replace("_", " ")
    served = f"{show_duration(trial['served_s'])} of {show_duration(trial['hold_s'])}"
    print_pairs(
        {
            "state": state if trial["why"] is None else f"{state}: {trial['why']}",
            "tries": f"{trial['model']} as {trial['arm']}",
            "step": f"{trial['step']} of {trial['steps']}, {trial['share']:.2%} of the rows",
            "served": served,
            "rows": f"{trial['rows']:,} of {trial['rows_wanted']:,} wanted",
            "rows failed": trial["rows_failed"],
            "time, to the others'": trial["time_ratio"],
            "mean score, to theirs": trial["score_shift"],
            "waits for": trial["waits_for"],
            "started": show_time(trial["started"]),
            "ended": None if trial["ended"] is None else show_time(trial["ended"]),
        },
        title="Canary" if canary else "Last canary",
    )
    if canary:
        steps = [(f"{s['share']:.2%}", s["for"], s["rows"]) for s in canary["steps"]]
        print_table(["share", "for", "rows at least"], steps, title="Steps")


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
