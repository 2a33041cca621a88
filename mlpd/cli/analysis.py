"""What `mlpd performance --analysis` prints: by version its days or slices, and its concept."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlpd.cli.output import print_lines, print_pairs, print_table, show_share, show_value

_CONCEPT = {
    "ok": "as on the held-out rows",
    "insufficient": "fewer than 100 labels of mature days",
    "no_reference": "not known: the version was trained before there were calibrations",
}


def print_analysis(found: Mapping[str, Any]) -> None:
    """Print each version: slices where they were asked for, else days."""
    for version in found["versions"]:
        print_lines(f"{found['model']}@{version['version']}")
        print_pairs(
            {
                "predictions": version["predictions"],
                "labels": show_share(version["labelled"] / max(1, version["predictions"])),
                "delay of half of the labels": _duration(version["delay_p50_s"]),
                "delay of 95 %": _duration(version["delay_p95_s"]),
                "loss": _concept(version["concept"]),
            }
        )
        if found["by"] is not None:
            _print_groups(found["by"], "value", version["slices"], version["task"])
        else:
            _print_groups("day", "day", version["days"], version["task"])
        print_lines("")
    if not found["versions"]:
        print_lines("Nothing was predicted in this time.")


def _print_groups(title: str, name: str, groups: Sequence[Mapping[str, Any]], task: str) -> None:
    if task == "regression":
        headers = [title, "rows", "labels", "mature", "rmse", "mae", "bias"]
        metrics = ("rmse", "mae", "bias")
        rows = [(*_head(g, name), *(g["realized"][m] for m in metrics)) for g in groups]
    else:
        headers = [title, "rows", "labels", "mature", "auc", "estimated", "log loss", "estimated"]
        rows = [
            (
                *_head(g, name),
                *(g["realized"]["auc"], _band(g, "auc")),
                *(g["realized"]["log_loss"], _band(g, "log_loss")),
            )
            for g in groups
        ]
    if name == "value":  # a slice is of all days
        del headers[3]
        rows = [(*row[:3], *row[4:]) for row in rows]
    print_table(headers, rows)
    if task == "binary" and groups and groups[0]["estimated"]:
        print_lines("Estimated from the scores alone: blind to concept drift.")


def _head(group: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    mature = "yes" if group.get("mature") else "no"
    return (group[name], group["predictions"], show_share(group["coverage"]), mature)


def _band(group: Mapping[str, Any], metric: str) -> str | None:
    found = group["estimated"] and group["estimated"][metric]
    if not found:
        return None
    return f"{show_value(found['value'])} [{show_value(found['low'])}, {show_value(found['high'])}]"


def _concept(concept: Mapping[str, Any]) -> str:
    if concept["state"] in _CONCEPT:
        return _CONCEPT[concept["state"]]
    last = concept["sequence"][-1]
    return (
        f"{concept['state']} than on the held-out rows since {concept['since']}: "
        f"{show_value(last['difference'])} [{show_value(last['low'])}, {show_value(last['high'])}]"
    )


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
