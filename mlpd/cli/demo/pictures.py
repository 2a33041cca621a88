"""The report's picture as SVG text: AUC by month and arm, live calibration, drift by week.

No script and no font, colours as attributes, names escaped: any viewer shows it.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, Final

COLOURS: Final = {"champion": "#1c7ed6", "challenger": "#d9480f"}
_GREY: Final = "#868e96"
_PANEL: Final = 300.0
_SIDE: Final = 220.0
_LEFT: Final = 50.0
_TOP: Final = 40.0
_WEEK: Final = 22.0
_DRIFT_LEFT: Final = 270.0
_LINE: Final = 14.0
_FEATURES_MAX: Final = 40
_AUC_LOW: Final = 0.5

Cohorts = Sequence[Mapping[str, Any]]


def draw_report(
    cohorts: Cohorts,
    references: Mapping[str, float],
    drift: Mapping[str, Sequence[str]],
) -> str:
    """Return the picture.

    `cohorts`: performance by month and arm.  `references`: names and AUCs to draw as lines.
    `drift`: drifted features by the day on which their week begins.
    """
    features = _drifted(drift)
    height = _TOP + _SIDE + 80 + _LINE * len(features) + 60
    parts = [
        *_auc_panel(cohorts, references),
        *_calibration_panel(cohorts),
        *_drift_panel(drift, features),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * _PANEL + 60:g} {height:g}" '
        f'role="img" font-family="sans-serif" font-size="11" fill="#343a40">'
        f'<title>mlpd demo</title><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(parts)}</svg>"
    )


def _auc_panel(cohorts: Cohorts, references: Mapping[str, float]) -> Iterator[str]:
    yield _text(_LEFT, 20, "AUC by month and arm, live", bold=True)
    for tick in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        y = _auc_y(tick)
        yield _line(_LEFT, y, _LEFT + _SIDE, y, "#e9ecef")
        yield _text(_LEFT - 6, y + 4, f"{tick:g}", anchor="end")
    width = _SIDE / max(len(cohorts), 1)
    for index, cohort in enumerate(cohorts):
        auc = cohort["performance"]["auc"]
        if auc is None:
            continue
        x, y = _LEFT + index * width, _auc_y(auc)
        yield (
            f'<rect x="{x + width * 0.15:.1f}" y="{y:.1f}" width="{width * 0.7:.1f}" '
            f'height="{_TOP + _SIDE - y:.1f}" fill="{_colour(cohort["arm"])}">'
            f"<title>{escape(cohort['period'])} {escape(cohort['arm'])}: {auc:.4f}</title></rect>"
        )
        middle = x + width / 2
        yield _text(middle, y - 4, f"{auc:.3f}", anchor="middle")
        yield _text(middle, _TOP + _SIDE + 14, cohort["period"][2:], anchor="middle")
        yield _text(middle, _TOP + _SIDE + 28, cohort["arm"], anchor="middle")
    for name, auc in references.items():
        yield _line(_LEFT, _auc_y(auc), _LEFT + _SIDE, _auc_y(auc), _GREY, dash="4 4")
        yield _text(_LEFT + 4, _auc_y(auc) - 3, f"{name} {auc:.3f}", colour=_GREY)


def _calibration_panel(cohorts: Cohorts) -> Iterator[str]:
    left = _LEFT + _PANEL
    yield _text(left, 20, "Calibration: share late by score, live", bold=True)
    yield _line(left, _TOP + _SIDE, left + _SIDE, _TOP, "#ced4da", dash="4 4")
    for tick in (0.0, 0.5, 1.0):
        yield _text(left + tick * _SIDE, _TOP + _SIDE + 14, f"{tick:g}", anchor="middle")
        yield _text(left - 6, _TOP + (1 - tick) * _SIDE + 4, f"{tick:g}", anchor="end")
    for cohort in cohorts:
        bins = [part for part in cohort["performance"]["calibration"] if part["rows"]]
        points = [
            (left + part["score_mean"] * _SIDE, _TOP + (1 - part["positive_share"]) * _SIDE)
            for part in bins
        ]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        name = f"{cohort['period']} {cohort['arm']}"
        yield (
            f'<polyline points="{drawn}" fill="none" stroke="{_colour(cohort["arm"])}" '
            f'stroke-width="1.5"><title>{escape(name)}</title></polyline>'
        )


def _drift_panel(drift: Mapping[str, Sequence[str]], features: Sequence[str]) -> Iterator[str]:
    top = _TOP + _SIDE + 70
    yield _text(_LEFT, top, f"Drifted features by week ({len(features)})", bold=True)
    for row, feature in enumerate(features):
        y = top + 10 + row * _LINE
        yield _text(_DRIFT_LEFT - 8, y + 10, feature, anchor="end")
        for column, (week, flagged) in enumerate(drift.items()):
            is_drifted = feature in flagged
            yield (
                f'<rect x="{_DRIFT_LEFT + column * _WEEK:.1f}" y="{y:.1f}" '
                f'width="{_WEEK - 2:g}" height="{_LINE - 2:g}" '
                f'fill="{"#e8590c" if is_drifted else "#e9ecef"}">'
                f"<title>{escape(feature)}, week of {escape(week)}</title></rect>"
            )
    for column, week in enumerate(drift):
        x, y = _DRIFT_LEFT + column * _WEEK + 8, top + 22 + len(features) * _LINE
        yield (
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="end" font-size="9" '
            f'transform="rotate(-40 {x:.1f} {y:.1f})">{escape(week[5:])}</text>'
        )


def _drifted(drift: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the features that drifted, most weeks first, the first of equals by name."""
    weeks: dict[str, int] = {}
    for flagged in drift.values():
        for feature in flagged:
            weeks[feature] = weeks.get(feature, 0) + 1
    return sorted(weeks, key=lambda feature: (-weeks[feature], feature))[:_FEATURES_MAX]


def _auc_y(auc: float) -> float:
    share = (max(auc, _AUC_LOW) - _AUC_LOW) / (1 - _AUC_LOW)
    return _TOP + (1 - share) * _SIDE


def _colour(arm: str) -> str:
    return COLOURS.get(arm, _GREY)


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", bold: bool = False, colour: str = ""
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    fill = f' fill="{colour}"' if colour else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}{fill}>{escape(text)}</text>'
    )


def _line(x: float, y: float, x_end: float, y_end: float, colour: str, *, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x_end:.1f}" y2="{y_end:.1f}" '
        f'stroke="{colour}"{dashes}/>'
    )
