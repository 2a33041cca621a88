"""A comparison over time as a picture: its lift, and the interval that holds at every look."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlpd.core.errors import NotFoundError
from mlpd.core.time import parse_time
from mlpd.monitoring.svg import IntervalPoint, draw_interval


def draw_timeline(
    name: str, points: Sequence[Mapping[str, Any]], metric: str | None, arm: str | None
) -> str:
    """Return an SVG of one comparison in a timeline: the first one, or that of `metric` and `arm`.

    Relative to the control where its value is never 0, else the difference as it is.  Raises
    NotFoundError(code="unknown_comparison") for one that was never there.
    """
    found = [
        (point["at"], c)
        for point in points
        for c in point["comparisons"]
        if metric in (None, c["metric"]) and arm in (None, c["arm"])
    ]
    if not found:
        raise NotFoundError(
            f"experiment {name!r} has no points of metric {metric or 'any'} and arm {arm or 'any'}",
            code="unknown_comparison",
            hint="Points are kept once both arms pass the guard: mlpd experiments show.",
        )
    first = found[0][1]
    same = [
        (at, c) for at, c in found if (c["metric"], c["arm"]) == (first["metric"], first["arm"])
    ]
    relative = all(c["control_value"] for _, c in same)
    what = "lift" if relative else "difference"
    title = f"{name}: {what} of {first['metric']}, {first['arm']} over {first['control']}"
    drawn = [_point(at, c, relative=relative) for at, c in same]
    return draw_interval(drawn, title, unit="%" if relative else "")


def _point(at: str, comparison: Mapping[str, Any], *, relative: bool) -> IntervalPoint:
    scale = 100 / abs(comparison["control_value"]) if relative else 1.0
    low, value, high = (scale * comparison[key] for key in ("low", "difference", "high"))
    label = f"{at[:16].replace('T', ' ')}, {comparison['units']:,} units"
    return IntervalPoint(float(parse_time(at)), low, value, high, label)
