"""Gates: what must hold of a new version before it is deployed, bound by bound; pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

OVER_CHAMPION: Final = "_over_champion"
"""Ends the name of a bound on what is gained over the champion: `auc_over_champion`."""

LATENCY, LATENCY_RATIO = "latency_p99_us", "latency_ratio"
DRIFTED: Final = "drifted_features"
SHADOW_ROWS, SHADOW_DISAGREEMENT, SHADOW_DIFFERENCE = (
    *("shadow_rows", "shadow_disagreement"),
    "shadow_difference",
)
SHADOW: Final = (SHADOW_ROWS, SHADOW_DISAGREEMENT, SHADOW_DIFFERENCE)
"""Bounds that are judged once so many rows have been scored by champion and shadow."""

AT_MOST: Final = ("log_loss", "brier", "rmse", "mae")
"""Metrics of which less is better; the others are bounded from below."""

NO_CHAMPION: Final = "there is no champion yet"
NO_SHADOW: Final = "it has yet to run: a route has to list model@challenger among its shadows"

Check = dict[str, Any]
Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a version when its gate is judged.

    `metrics`: of the test rows.  `champion`: whether there is one.  `comparison` has its `version`
    and `gains` by metric; `latency` has `p99_us` and `champion_p99_us`; `drift` has `share`, `rows`
    and `drifted`, names; `shadow` is what `PairedDifference.summary` gives, None while it has not
    run.  Where one can't be told it has `why`, and fails what is bounded by it.
    """

    metrics: Mapping[str, float]
    champion: bool = False
    comparison: Mapping[str, Any] | None = None
    latency: Mapping[str, Any] | None = None
    drift: Mapping[str, Any] | None = None
    shadow: Mapping[str, Any] | None = None


def asks_for_champion(gate: Mapping[str, float]) -> bool:
    """Tell whether a bound needs the champion beside the model when it is trained."""
    return any(name.endswith(OVER_CHAMPION) or name == LATENCY_RATIO for name in gate)


def asks_for_drift(gate: Mapping[str, float]) -> bool:
    """Tell whether a bound needs what the champion served of late."""
    return DRIFTED in gate


def gate_report(gate: Mapping[str, float], evidence: Evidence) -> Report:
    """Return `passed`, `waiting` and the `checks`: `metric`, `bound`, `value`, `passed`, `why`...

    `waiting`: all has passed but for checks of the shadow, which has yet to run; theirs is None.
    A value that is missing fails its check, but for bounds beside the champion where there is none:
    these pass.
    """
    checks = [_check(name, bound, gate, evidence) for name, bound in sorted(gate.items())]
    verdicts = [check["passed"] for check in checks]
    return {
        "passed": all(verdicts),
        "waiting": None in verdicts and False not in verdicts,
        "checks": checks,
    }


def judge_shadow(report: Report, shadow: Mapping[str, Any]) -> Report:
    """Return the report of a version that waited, with its shadow's checks judged."""
    gate = {check["metric"]: check["bound"] for check in report["checks"]}
    evidence = Evidence({}, champion=True, shadow=shadow)
    checks = [
        _check(check["metric"], check["bound"], gate, evidence)
        if check["metric"] in SHADOW
        else check
        for check in report["checks"]
    ]
    passed = all(check["passed"] for check in checks)
    return {"passed": passed, "waiting": False, "checks": checks}


def close_report(report: Report, why: str) -> Report:
    """Return the report of a version that isn't deployed for another reason, and `why`.

    Checks of a shadow that hasn't run, or that wasn't enough, fail with it.
    """
    checks = [
        check | {"passed": False, "why": why}
        if check["metric"] in SHADOW and check.get("why") != NO_CHAMPION
        else check
        for check in report["checks"]
    ]
    passed = all(check["passed"] for check in checks)
    return {"passed": passed, "waiting": False, "checks": checks}


def shadow_rows(report: Report) -> int | None:
    """Return how many rows a waiting version's shadow has to score; None for one that doesn't."""
    if not report.get("waiting"):
        return None
    bounds = {check["metric"]: check["bound"] for check in report["checks"]}
    return int(bounds[SHADOW_ROWS])


def _check(name: str, bound: float, gate: Mapping[str, float], evidence: Evidence) -> Check:
    if name.endswith(OVER_CHAMPION):
        return _check_gain(name, bound, evidence)
    judge = _JUDGES.get(name)
    if judge is not None:
        return {"metric": name, "bound": bound, **judge(bound, gate, evidence)}
    value = evidence.metrics.get(name)
    passed = value is not None and (value <= bound if name in AT_MOST else value >= bound)
    return {"metric": name, "bound": bound, "value": value, "passed": passed}


def _check_gain(name: str, bound: float, evidence: Evidence) -> Check:
    check = {"metric": name, "bound": bound, "value": None, "passed": False}
    comparison = evidence.comparison
    if comparison is None:
        return check | {"passed": True, "why": NO_CHAMPION}
    gain = comparison.get("gains", {}).get(name.removesuffix(OVER_CHAMPION))
    if gain is None:
        why = comparison.get("why", "the champion can't be compared by this metric")
        return check | {"why": why, "champion": comparison["version"]}
    return check | {
        "value": gain["low"],
        "gain": gain["value"],
        "champion": comparison["version"],
        "passed": gain["low"] >= bound,
    }


def _latency(bound: float, _: Mapping[str, float], evidence: Evidence) -> Check:
    return _at_most((evidence.latency or {}).get("p99_us"), bound, "it was not measured")


def _latency_ratio(bound: float, _: Mapping[str, float], evidence: Evidence) -> Check:
    if evidence.comparison is None:
        return _passed(NO_CHAMPION)
    told = evidence.latency or {}
    ours, theirs = told.get("p99_us"), told.get("champion_p99_us")
    why = evidence.comparison.get("why", "the champion's was not measured")
    return _at_most(ours / theirs if ours and theirs else None, bound, why)


def _drift(bound: float, _: Mapping[str, float], evidence: Evidence) -> Check:
    if not evidence.champion:
        return _passed(NO_CHAMPION)
    told = evidence.drift or {"why": "it was not measured"}
    check = _at_most(told.get("share"), bound, told.get("why", ""))
    return check | {name: told[name] for name in ("rows", "drifted") if name in told}


def _shadow_rows(bound: float, _: Mapping[str, float], evidence: Evidence) -> Check:
    if not evidence.champion:
        return _passed(NO_CHAMPION)
    if evidence.shadow is None:
        return {"value": None, "passed": None, "why": NO_SHADOW}
    found = evidence.shadow["n"]
    return {"value": found, "passed": found >= bound}


def _shadow_disagreement(bound: float, gate: Mapping[str, float], evidence: Evidence) -> Check:
    ends = (evidence.shadow or {}).get("disagreement_interval")
    return _of_shadow(ends and ends[1], bound, gate, evidence)


def _shadow_difference(bound: float, gate: Mapping[str, float], evidence: Evidence) -> Check:
    ends = (evidence.shadow or {}).get("mean_interval")
    return _of_shadow(ends and max(map(abs, ends)), bound, gate, evidence)


def _of_shadow(
    value: float | None, bound: float, gate: Mapping[str, float], evidence: Evidence
) -> Check:
    if not evidence.champion or evidence.shadow is None:
        return _shadow_rows(gate[SHADOW_ROWS], gate, evidence)
    return _at_most(value, bound, "no two rows could be compared")


def _at_most(value: float | None, bound: float, why: str) -> Check:
    if value is None:
        return {"value": None, "passed": False, "why": why}
    return {"value": value, "passed": value <= bound}


def _passed(why: str) -> Check:
    return {"value": None, "passed": True, "why": why}


_JUDGES: Mapping[str, Callable[[float, Mapping[str, float], Evidence], Check]] = {
    LATENCY: _latency,
    LATENCY_RATIO: _latency_ratio,
    DRIFTED: _drift,
    SHADOW_ROWS: _shadow_rows,
    SHADOW_DISAGREEMENT: _shadow_disagreement,
    SHADOW_DIFFERENCE: _shadow_difference,
}
