"""How a version did, as tables: test metrics with bounds, classes, folds, the search."""

from collections.abc import Mapping
from typing import Any

from mlpd.cli.output import print_pairs, print_table, show_value

CLASS_SLICE = "(class)"


def print_metrics(metrics: Mapping[str, float], report: Mapping[str, Any]) -> None:
    """Write a version's test metrics with their 95 % intervals; what has no report, without."""
    test = (report.get("evaluation") or {}).get("test") or {}
    known = test.get("metrics") or {}
    if metrics:
        rows = [
            (name, *_estimate(known.get(name), value)) for name, value in sorted(metrics.items())
        ]
        print_table(["metric", "value", "95 % interval"], rows, title="Test metrics")
    _print_classes((test.get("slices") or {}).get(CLASS_SLICE) or {})
    _print_calibration(report.get("calibration"))
    _print_folds(report.get("cross_validation"))
    _print_search(report.get("search"))


def _estimate(found: Mapping[str, float] | None, value: float | None) -> tuple[Any, str | None]:
    if found is None:
        return value, None
    return value, f"{show_value(found['low'])} to {show_value(found['high'])}"


def _print_classes(classes: Mapping[str, Any]) -> None:
    if not classes:
        return
    names = list(next(iter(classes.values()))["metrics"])
    rows = [
        (name, part["rows"], *((part["metrics"][n] or {}).get("value") for n in names))
        for name, part in classes.items()
    ]
    print_table(["class", "rows", *names], rows, title="Classes")


def _print_calibration(found: Mapping[str, Any] | None) -> None:
    if not found:
        return
    before, after = found["before"], found["after"]
    rows = [
        (name, before["metrics"][name]["value"], after["metrics"][name]["value"])
        for name in before["metrics"]
    ]
    rows.append(("ece", before["ece"], after["ece"]))
    print_table(["metric", "before", "after"], rows, title=f"Calibration, {found['method']}")


def _print_folds(found: Mapping[str, Any] | None) -> None:
    if not found:
        return
    rows = [
        (name, spread["mean"], spread["deviation"], spread["least"], spread["largest"])
        for name, spread in found["metrics"].items()
    ]
    title = f"{len(found['folds'])} folds by time, {found['window']}"
    print_table(["metric", "mean", "deviation", "least", "largest"], rows, title=title)


def _print_search(found: Mapping[str, Any] | None) -> None:
    if not found:
        return
    pruned = sum(trial["state"] == "pruned" for trial in found["trials"])
    told = f"{len(found['trials'])}, {pruned} of them given up; the best is {found['best']}"
    print_pairs({"trials": told, **found["params"]}, title="Search")
