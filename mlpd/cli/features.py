"""`mlpd features`: what there is, the features of one entity now or of many rows at their times."""

import json
from pathlib import Path
from typing import Any

import click

from mlpd.cli.lazy import OrderedGroup
from mlpd.cli.output import (
    Bar,
    print_lines,
    print_pairs,
    print_table,
    print_title,
    progress,
    show_bytes,
    show_duration,
    show_share,
    show_time,
    show_value,
)
from mlpd.cli.session import Session, confirm, connected, examples, yes_option
from mlpd.core.errors import NotFoundError, ValidationError

_STATUSES = ("present", "null", "missing", "stale")


on_stale_option = click.option(
    "--on-stale",
    type=click.Choice(["null", "value", "error"]),
    help="What a value older than its ttl becomes: null or its default, itself, or an error.",
)


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
@on_stale_option
@connected
def read(
    session: Session, service: str, keys: tuple[str, ...], *, at: str | None, on_stale: str | None
) -> None:
    """Read the features of one entity as a model would see them now.

    SERVICE is a feature service, or single features separated by commas.  NAME=VALUE gives entity
    keys and request fields; NAME= alone is null.  Bytes are text, or 0x and hex digits; lists and
    vectors are JSON.
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


@features.command(
    epilog=examples(
        "mlpd features history flight_risk --spine flights.parquet --out features.parquet",
        "mlpd features history weather.temp,weather.visib --spine flights.parquet --out w.arrow",
    )
)
@click.argument("service")
@click.option(
    "--spine",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Parquet or Arrow: event_time, entity keys, request fields.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where it goes; .parquet, .arrow, .arrows (a stream), .msgpack or .json say what it is.",
)
@click.option(
    "--mode",
    type=click.Choice(["as_known", "as_corrected", "as_of_sequence"]),
    help="What a row sees: what was known at its time (the default), all that is known now, or the "
    "events up to its sequence.",
)
@click.option(
    "--closed",
    type=click.Choice(["right", "left"]),
    help="left: latest values don't show events of a row's own time.",
)
@click.option("--statuses", is_flag=True, help="Add a column NAME__status per feature.")
@on_stale_option
@connected
def history(
    session: Session,
    service: str,
    *,
    spine: Path,
    out: Path,
    mode: str | None,
    closed: str | None,
    statuses: bool,
    on_stale: str | None,
) -> None:
    """Join the features of many rows, each as of its own event_time.

    SERVICE is a feature service, or single features separated by commas.  Rows, their order and
    their columns are those of --spine; features come after them.
    """
    import time

    single = service.split(",") if "." in service or "," in service else None
    started = time.monotonic()
    with progress(f"sending {spine.name}", spine.stat().st_size, unit="bytes") as bar:
        answer = session.patient_client.save_history(
            out,
            None if single else service,
            spine=spine,
            features=single,
            mode=mode,
            closed=closed,
            statuses=statuses,
            on_stale=on_stale,
            on_progress=_Transfer(bar, spine.name, out.name),
        )
    answer["seconds"] = time.monotonic() - started
    session.show(answer, _print_joined)


class _Transfer:
    """Moves a bar while a spine goes up, is joined, and its answer comes down."""

    def __init__(self, bar: Bar, spine: str, out: str) -> None:
        self._bar = bar
        self._texts = {"sent": f"sending {spine}", "received": f"receiving {out}"}
        self._what, self._done = "sent", 0

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._what, self._done = what, 0
            self._bar.restart(total)
        self._bar.advance(done - self._done)
        self._bar.describe("joining" if (what, done) == ("sent", total) else self._texts[what])
        self._done = done


@features.command(
    epilog=examples(
        "mlpd features stats flight_risk", "mlpd features stats weather --entities 1000"
    )
)
@click.argument("name", metavar="SERVICE|VIEW")
@click.option(
    "--entities",
    type=click.IntRange(min=1),
    help="Entities to read of each view at most; of more a sample by lot.  [default: 20000]",
)
@connected
def stats(session: Session, name: str, *, entities: int | None) -> None:
    """Summarize the values that online serving holds.

    Feature by feature over all entities that have a row, as a read of this moment finds them.  Of a
    service: what it takes from views; --json has all quantiles.
    """
    with progress("reading what online serving holds"):
        found = session.client.feature_stats(name, entities=entities)
    session.show(found, _print_stats)


@features.command()
@connected
def freshness(session: Session) -> None:
    """Show how old served features were.

    Since the daemon's start, per view; and how far each source has come.
    """
    session.show(session.client.freshness(), _print_freshness)


@features.command(
    epilog=examples("mlpd features erase user user=u42", "mlpd features erase pair user=u42 item=7")
)
@click.argument("entity")
@click.argument("keys", nargs=-1, required=True, metavar="NAME=VALUE...")
@yes_option
@connected
def erase(session: Session, entity: str, keys: tuple[str, ...], *, yes: bool) -> None:
    """Remove an entity from everything.

    Its events leave the log and the segments, as if they had never come; with them go its features,
    what they did to those of other entities, and served predictions.  There is no way back.  Prints
    the receipt, which says what remains beyond the daemon's reach.
    """
    from mlpd.core.document import parse_document

    spec = parse_document(session.client.definitions()["document"]).entity(entity)
    key = _row(keys, dict(spec.keys))
    confirm(session, f"Erase {entity} {' '.join(keys)} for good?", yes=yes)
    with progress("erasing"):
        receipt = session.patient_client.erase(entity, [key])
    session.show(receipt, _print_receipt)


@features.command()
@connected
def erasures(session: Session) -> None:
    """List what was erased, and orders under way."""
    session.show(session.client.erasures(), _print_erasures)


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
        return text if text.startswith("0x") else text.encode()
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    kinds = {"bool": bool, "int64": int}.get(dtype, (int, float))
    if dtype.endswith("]"):
        kinds = list
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
        shown = "[]" if values[0] == [] else show_value(values[0])  # an empty list is a value
        rows.append((name, shown, _STATUSES[status[0]] if status else "given", age))
    print_table(["feature", "value", "status", "age"], rows)
    print_lines("", f"as of {show_time(answer['t_us'])}, sequence {answer['sequence']}")


def _print_joined(answer: dict[str, Any]) -> None:
    print_pairs(
        {
            "file": answer["path"],
            "rows": answer["rows"],
            "size": show_bytes(answer["size_bytes"]),
            "took": show_duration(answer["seconds"]),
        }
    )


def _print_receipt(receipt: dict[str, Any]) -> None:
    print_pairs(
        {
            "erased": f"{receipt['keys']} of entity {receipt['entity']}",
            "receipt": receipt["id"],
            "finished": show_time(receipt["finished"]),
            "events up to": receipt["through_sequence"],
            "online rows": receipt["online_rows"] + receipt["tile_rows"],
            "predictions": receipt["predictions"],
            "labels": receipt["labels"] or None,
            "outcomes": receipt.get("outcomes") or None,
            "event ids": receipt["event_ids"] or None,
            "segments": f"{receipt['files_rewritten']} written anew, "
            f"{receipt['files_removed']} removed",
            "views built anew": receipt["views_rebuilt"] or None,
            "digest": receipt["digest"],
        }
    )
    sources = [
        (name, part["rows"], part["first_sequence"], part["last_sequence"])
        for name, part in receipt["sources"].items()
    ]
    headers = ["source", "events", "first sequence", "last sequence"]
    print_table(headers, sources, title="Events", empty="no source had events of it")
    print_lines("", "What this does not reach:", *(f"- {text}" for text in receipt["caveats"]))


def _print_erasures(answer: dict[str, Any]) -> None:
    rows = [
        (r["id"], r["entity"], r["keys"], show_time(r["finished"]), r["through_sequence"])
        for r in answer["receipts"]
    ]
    rows += [(r["id"], r["entity"], r["keys"], r["step"], None) for r in answer["open"]]
    headers = ["id", "entity", "keys", "finished", "up to sequence"]
    print_table(headers, rows, empty="nothing was erased")


def _print_stats(answer: dict[str, Any]) -> None:
    for view in answer["views"]:
        about = "" if view["complete"] else f" of about {view['entities_total']:,}"
        print_title(f"{view['view']}: {view['entities']:,} entities{about}")
        if view["ages_s"] and view["entities"]:
            half, most, all_of_them = map(show_duration, view["ages_s"].values())
            print_lines(f"  half are at most {half} old, 95% {most}, the oldest {all_of_them}")
        numbers = [f for f in view["features"] if "quantiles" in f]
        if numbers:
            headers = ["feature", "null", "stale", "mean", "std", "min", *_SHOWN.values(), "max"]
            print_table(headers, [_number_row(view, f) for f in numbers])
        others = [f for f in view["features"] if "top" in f]
        if others:
            rows = [(*_shares(view, f), f["distinct"], _top(f)) for f in others]
            print_table(["feature", "null", "stale", "distinct", "most frequent"], rows)
        lists = [(f, f["lengths"]) for f in view["features"] if "lengths" in f]
        if lists:
            rows = [(*_shares(view, f), n["min"], n["mean"], n["max"]) for f, n in lists]
            print_table(["feature", "null", "stale", "elements", "mean", "max"], rows)
    if answer["not_covered"]:
        print_lines("", f"From elsewhere: {', '.join(answer['not_covered'])}")


_SHOWN = {"0.05": "5%", "0.25": "25%", "0.5": "50%", "0.75": "75%", "0.95": "95%"}
"""Quantiles that a table has room for."""
_TOP_SHOWN = 3


def _shares(view: dict[str, Any], feature: dict[str, Any]) -> tuple[Any, ...]:
    n = max(1, view["entities"])
    return feature["name"], show_share(feature["null"] / n), show_share(feature["stale"] / n)


def _number_row(view: dict[str, Any], feature: dict[str, Any]) -> tuple[Any, ...]:
    show = show_time if feature["type"] == "timestamp" else show_value
    quantiles = feature["quantiles"]
    return (
        *_shares(view, feature),
        *(feature.get("mean"), feature.get("std")),
        *(show(v) for v in (feature["min"], *map(quantiles.get, _SHOWN), feature["max"])),
    )


def _top(feature: dict[str, Any]) -> str | None:
    n = max(1, feature["present"])
    shown = (f"{t['value']} {show_share(t['rows'] / n)}" for t in feature["top"][:_TOP_SHOWN])
    return ", ".join(shown) or None


def _print_freshness(answer: dict[str, Any]) -> None:
    sources = [
        (name, show_time(s["watermark"]), show_duration(s["behind_s"]), show_duration(s["lag_s"]))
        for name, s in answer["sources"].items()
    ]
    headers = ["source", "newest event", "ago", "lag"]
    print_table(headers, sources, title="Sources", empty="none has had events yet")
    views = {name: v for name, v in answer["views"].items() if _rows(v)}
    rows = [
        (
            *(name, _rows(view), show_share(view["stale_share"])),
            show_share(view["missing"] / _rows(view)),
            *(show_duration(view["age_mean_s"]), show_duration(view["age_max_s"])),
            *(show_duration(view["slo_s"]), show_share(view["slo_share"])),
        )
        for name, view in views.items()
    ]
    headers = ["view", "rows", "stale", "missing", "mean age", "oldest", "goal", "within goal"]
    print_table(headers, rows, title="As served since the start", empty="nothing was served yet")
    if views:
        _print_ages(views, answer["age_bounds_s"])
    _print_goals(answer["views"])


def _rows(view: dict[str, Any]) -> int:
    found: int = view["present"] + view["stale"] + view["missing"]
    return found


def _print_ages(views: dict[str, Any], bounds_s: list[float]) -> None:
    """Write the share of rows in each bucket that has any."""
    headers = [*(f"to {show_duration(bound)}" for bound in bounds_s), "older"]
    used = [i for i in range(len(headers)) if any(view["ages"][i] for view in views.values())]
    rows = [
        (name, *(show_share(view["ages"][i] / max(1, sum(view["ages"]))) for i in used))
        for name, view in views.items()
    ]
    print_table(["view", *(headers[i] for i in used)], rows, title="Ages as served")


def _print_goals(views: dict[str, Any]) -> None:
    """Write goals of window views: they have no age of their own, their source must keep up."""
    rows = [
        (
            *(name, view["source"], show_duration(view["slo_s"])),
            show_duration(view["behind_s"]),
            "ok" if view["behind_s"] <= view["slo_s"] else "alert",
        )
        for name, view in views.items()
        if view["kind"] == "window" and None not in (view["slo_s"], view["behind_s"])
    ]
    if rows:
        headers = ["view", "source", "goal", "newest event", "state"]
        print_table(headers, rows, title="Window views, by their sources")
