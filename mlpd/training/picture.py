"""Draws a run's evaluation as one small SVG: the ROC curve beside the calibration."""

from collections.abc import Iterable
from html import escape

from mlpd.training.auc import Floats, roc_curve
from mlpd.training.evaluate import Evaluation

_SIDE, _MARGIN = 260, 46
_PANEL = _SIDE + 2 * _MARGIN
_STYLE = (
    "text{font:12px sans-serif;fill:#333}.axis{fill:none;stroke:#999}"
    ".even{stroke:#bbb;stroke-dasharray:4 4}.line{fill:none;stroke:#1f77b4;stroke-width:2}"
    ".dot{fill:#1f77b4}"
)


def draw_report(title: str, labels: Floats, scores: Floats, evaluation: Evaluation) -> str:
    """Return an SVG of 704 x 372 units, under 10 KB, that stands alone and runs no script.

    `labels` and `scores` are those of `evaluation`, which `evaluate_binary` made.  Without both
    classes the ROC panel stays empty.  A calibration dot's area follows its number of rows.
    """
    area = evaluation.metrics["auc"]
    heading = "ROC curve" if area is None else f"ROC curve, AUC {area.value:.4f}"
    if area is not None:
        heading += f" ({area.low:.4f} to {area.high:.4f})"
    curve = [] if area is None else [_line(zip(*roc_curve(labels, scores), strict=True))]
    width, height = 2 * _PANEL, _PANEL + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{_MARGIN}" y="18" font-weight="bold">{escape(title)}</text>',
        *_panel(0, heading, "false positive rate", "true positive rate", curve),
        *_panel(_PANEL, "Calibration", "mean score", "observed rate", _dots(evaluation)),
        "</svg>",
    ]
    return "\n".join(parts)


def _panel(left: int, heading: str, x: str, y: str, marks: Iterable[str]) -> Iterable[str]:
    yield f'<g transform="translate({left + _MARGIN},{_MARGIN + 8})">'
    yield f'<text y="-8">{heading}</text>'
    yield f'<rect class="axis" width="{_SIDE}" height="{_SIDE}"/>'
    yield f'<line class="even" x1="0" y1="{_SIDE}" x2="{_SIDE}" y2="0"/>'
    for tick in (0.0, 0.5, 1.0):
        at = tick * _SIDE
        yield f'<text x="{at:g}" y="{_SIDE + 16}" text-anchor="middle">{tick:g}</text>'
        yield f'<text x="-6" y="{_SIDE - at + 4:g}" text-anchor="end">{tick:g}</text>'
    middle = _SIDE // 2
    yield f'<text x="{middle}" y="{_SIDE + 32}" text-anchor="middle">{x}</text>'
    yield f'<text transform="translate(-30,{middle}) rotate(-90)" text-anchor="middle">{y}</text>'
    yield from marks
    yield "</g>"


def _line(points: Iterable[tuple[float, float]]) -> str:
    drawn = " ".join(f"{x * _SIDE:.1f},{_SIDE - y * _SIDE:.1f}" for x, y in points)
    return f'<polyline class="line" points="{drawn}"/>'


def _dots(evaluation: Evaluation) -> Iterable[str]:
    bins = evaluation.calibration
    yield _line((row.mean_score, row.observed) for row in bins)
    for row in bins:
        radius = 2 + 10 * (row.rows / evaluation.rows) ** 0.5
        x, y = row.mean_score * _SIDE, _SIDE - row.observed * _SIDE
        label = f"{row.rows} rows, mean score {row.mean_score:.3f}, observed {row.observed:.3f}"
        yield f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}">'
        yield f"<title>{label}</title></circle>"
