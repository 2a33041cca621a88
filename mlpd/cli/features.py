"""`mlpd features`: what there is, how fresh it is served, and the features of one entity now."""

import json
from typing import Any

import click

from mlpd.cli.lazy import OrderedGroup
from mlpd.cli.output import (
    print_lines,
    print_pairs,
    print_table,
    show_duration,
    show_share,
    show_time,
    show_value,
)
from mlpd.cli.session import Session, connected, examples
from mlpd.core.errors import NotFoundError, ValidationError

_STATUSES = ("present", "null", "missing", "stale")


@click.group(cls=OrderedGroup)
def features() -> None:
    """List and read features."""


@features.command("list")
@click.option("--view", help="Only this view, with all its features.")
@click.option("--service", help="Only this feature service: its vector, in order.")
@connected
def list_features(session: Session, *, view: str | None, service: str | None) -> None:
    """List views, transforms and feature services."""
    from mlpd.core.document import parse_document

    definitions = parse_document(session.client.definitions()["document"])
    if service is not None:
        closure = definitions_closure(definitions, service)
        vector = [{"feature": name, "type": str(t)} for name, t in closure.dtypes.items()]
        session.show({"service": service, "vector": vector}, _print_vector)
    elif view is not None:
        session.show(_view(definitions.view(view)), _print_view)
    else:
        session.show(_all(definitions), _print_all)


@features.command(
    epilog=examples(
        "mlpd features read flight_risk origin=JFK carrier=B6 dest=BOS tailnum=N123JB \\",
        "    sched_hour=18 day_of_week=5 distance=187",
        "mlpd features read weather.temp,weather.visib origin=JFK",
    )
)
@click.argument("service")
@click.argument("keys", nargs=-1, metavar="NAME=VALUE...")
@click.option("--at", metavar="TIME", help="A moment other than now, for replays.")
@click.option(
    "--on-stale",
    type=click.Choice(["null", "value", "error"]),
    help="What a value older than its ttl becomes: null or its default, itself, or an error.",
)
@connected
def read(
    session: Session, service: str, keys: tuple[str, ...], *, at: str | None, on_stale: str | None
) -> None:
    """Read the features of one entity as a model would see them now.

    SERVICE is a feature service, or single features separated by commas.  NAME=VALUE gives entity
    keys and request fields; NAME= alone is null.
    """
    from mlpd.core.document import parse_document

    definitions = parse_document(session.client.definitions()["document"])
    single = service.split(",") if "." in service or "," in service else None
    closure = features_closure(definitions, single) if single else None
    closure = closure or definitions_closure(definitions, service)
    row = _row(keys, {**closure.key_columns, **closure.service.request})
    asked: dict[str, Any] = {"features": single} if single else {"service": service}
    answer = session.client.read_features(entities=[row], at=at, on_stale=on_stale, **asked)
    session.show(answer, _print_read)


@features.command()
@connected
def freshness(session: Session) -> None:
    """Show how old served features were.

    Since the daemon's start, per view; and how far each source has come.
    """
    session.show(session.client.freshness(), _print_freshness)


def definitions_closure(definitions: Any, service: str) -> Any:
    """Return the closure of a feature service; raises NotFoundError for an unknown one."""
    from mlpd.core.closure import build_closure

    return build_closure(definitions, definitions.service(service))


def features_closure(definitions: Any, names: list[str]) -> Any:
    """Return the closure of single features."""
    from mlpd.core.closure import build_closure
    from mlpd.core.specs import ServiceSpec

    for name in names:
        view = name.partition(".")[0]
        if "." in name and view not in definitions.views:
            known = ", ".join(sorted(definitions.views)) or "none"
            raise NotFoundError(f"unknown view {view!r}; known: {known}", code="unknown_view")
    return build_closure(definitions, ServiceSpec("features", tuple(names), {}))


def _row(keys: tuple[str, ...], types: dict[str, Any]) -> dict[str, Any]:
    row = {}
    for pair in keys:
        name, equals, text = pair.partition("=")
        if not equals or name not in types:
            raise ValidationError(
                f"{pair!r} is no NAME=VALUE of this read",
                code="unknown_field",
                hint=f"It takes {', '.join(types)}.",
            )
        row[name] = _value(name, text, str(types[name]))
    return row


def _value(name: str, text: str, dtype: str) -> Any:
    """Return the value of a typed field; no text is null."""
    if not text:
        return None
    if dtype in ("string", "timestamp"):
        return text
    if dtype == "bytes":
        return text.encode()
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    kinds = {"bool": bool, "int64": int}.get(dtype, (int, float))
    if not isinstance(value, kinds) or (dtype != "bool" and isinstance(value, bool)):
        raise ValidationError(f"{name} takes {dtype}, got {text!r}", code="wrong_type")
    return value


def _all(definitions: Any) -> dict[str, Any]:
    return {
        "views": [_view(view) for view in definitions.views.values()],
        "transforms": [
            {"name": t.name, "type": str(t.output), "reads": [ref for _, ref in t.inputs]}
            for t in definitions.transforms.values()
        ],
        "services": [
            {
                "name": s.name,
                "features": len(s.vector),
                "request": {name: str(t) for name, t in s.request.items()},
            }
            for s in definitions.services.values()
        ],
    }


def _view(view: Any) -> dict[str, Any]:
    from mlpd.core.time import format_duration

    return {
        "name": view.name,
        "kind": view.kind,
        "entity": view.entity,
        "source": view.source,
        "ttl": None if view.ttl_us is None else format_duration(view.ttl_us),
        "windows": [format_duration(window) for window in view.windows_us],
        "features": {name: str(dtype) for name, dtype in view.features.items()},
    }


def _print_vector(answer: dict[str, Any]) -> None:
    rows = [(i, e["feature"], e["type"]) for i, e in enumerate(answer["vector"])]
    print_table(["#", "feature", "type"], rows)


def _print_view(view: dict[str, Any]) -> None:
    print_pairs(
        {
            "view": view["name"],
            "per": view["entity"],
            "from": view["source"],
            "windows": view["windows"] or None,
            "ttl": view["ttl"],
        }
    )
    print_table(["feature", "type"], view["features"].items(), title="Features")


def _print_all(answer: dict[str, Any]) -> None:
    if not any(answer.values()):
        print_lines("No features yet.  Write definitions and run mlpd apply DIR.")
        return
    views = [
        (
            *(view["name"], view["entity"], view["source"], len(view["features"])),
            view["windows"] or (f"ttl {view['ttl']}" if view["ttl"] else "latest"),
        )
        for view in answer["views"]
    ]
    print_table(["view", "per", "from", "features", "windows"], views)
    transforms = [(t["name"], t["type"], t["reads"]) for t in answer["transforms"]]
    print_table(["transform", "type", "reads"], transforms, title="Transforms")
    services = [(s["name"], s["features"], list(s["request"])) for s in answer["services"]]
    print_table(["service", "features", "request fields"], services, title="Feature services")
    print_lines("", "--view NAME and --service NAME list their features.")


def _print_read(answer: dict[str, Any]) -> None:
    times, statuses = answer["event_times"], answer["statuses"]
    rows = []
    for name, values in answer["columns"].items():
        status = statuses.get(name)
        seen = times.get(name.partition(".")[0])
        event_us = None if seen is None else seen[0]
        age = None if event_us is None else show_duration((answer["t_us"] - event_us) / 1e6)
        rows.append((name, show_value(values[0]), _STATUSES[status[0]] if status else "given", age))
    print_table(["feature", "value", "status", "age"], rows)
    print_lines("", f"as of {show_time(answer['t_us'])}, sequence {answer['sequence']}")


def _print_freshness(answer: dict[str, Any]) -> None:
    views = [
        (
            name,
            *(view["present"], view["stale"], view["missing"]),
            *(show_duration(view["age_mean_s"]), show_duration(view["age_max_s"])),
            *(show_duration(view["slo_s"]), show_share(view["slo_share"])),
        )
        for name, view in answer["views"].items()
    ]
    headers = ["view", "present", "stale", "missing", "mean age", "oldest", "goal", "within goal"]
    print_table(headers, views, title="As served since the start", empty="nothing was served yet")
    sources = [(name, show_time(s["watermark"])) for name, s in answer["sources"].items()]
    print_table(["source", "newest event"], sources, title="Sources", empty="no events yet")
