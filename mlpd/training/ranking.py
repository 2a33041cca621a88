"""How good an order is: ndcg, map and mrr by group, with bounds over the groups."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mlpd.training.auc import Estimate, Floats
from mlpd.training.evaluate import Evaluation, check_pairs, mean_estimate, wrong_scores

GRADES_MAX = 31
"""LightGBM's gains 2^grade - 1 reach up to grade 30."""
TOP = 10


def evaluate_ranking(
    labels: Floats, scores: Floats, groups: NDArray[np.int64], *, confidence: float = 0.95
) -> Evaluation:
    """Judge the order that scores give within each group: ndcg@10, map@10, mrr.

    `labels` grades [n] from 0 to 30, `scores` [n], `groups` a number per row, rows of a group one
    after the other.  Each metric is a mean over groups, and its interval that of this mean: rows of
    a group hang together.  Groups without a relevant row (a grade of 0 throughout) have no order
    and are left out; their rows count in `rows`.  Equal scores keep the order of the rows.

    ndcg (Jarvelin, Kekalainen 2002): gain 2^grade - 1, discount 1 / log2(rank + 1).  map and mrr
    take a grade above 0 for relevant; map divides by the relevant rows, at most 10.
    Raises ValidationError (`wrong_scores`).
    """
    check_pairs(labels, scores)
    if len(groups) != len(labels) or not (np.isin(labels, range(GRADES_MAX)).all()):
        raise wrong_scores(f"labels must be grades from 0 to {GRADES_MAX - 1}, each in a group")
    metrics: dict[str, Estimate | None] = {
        name: mean_estimate(values, confidence, (0.0, 1.0))
        for name, values in group_values(labels, scores, groups).items()
    }
    return Evaluation(rows=len(labels), metrics=metrics)


def group_values(labels: Floats, scores: Floats, groups: NDArray[np.int64]) -> dict[str, Floats]:
    """Return each metric of each group that has a relevant row, in the order of the groups."""
    judged = [_judge(grades) for grades in _ranked(labels, scores, groups) if grades.any()]
    columns = np.array(judged, np.float64).reshape(-1, 3).T
    return dict(zip((f"ndcg@{TOP}", f"map@{TOP}", "mrr"), columns, strict=True))


def group_sizes(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many rows each group has, in their order; groups lie one after the other.

    >>> group_sizes(np.array([4, 4, 7, 1, 1, 1])).tolist()
    [2, 1, 3]
    """
    starts = np.flatnonzero(np.diff(groups, prepend=groups[:1] - 1))
    return np.diff(np.append(starts, len(groups)))


def _ranked(labels: Floats, scores: Floats, groups: NDArray[np.int64]) -> Iterator[Floats]:
    """Yield each group's grades in the order of its scores, largest first."""
    ends = np.cumsum(group_sizes(groups))
    for start, end in zip((0, *ends[:-1]), ends, strict=True):
        order = np.argsort(-scores[start:end], kind="stable")
        yield labels[start:end][order]


def _judge(grades: Floats) -> tuple[float, float, float]:
    """Return ndcg, average precision and reciprocal rank of one group; some grade is above 0."""
    relevant = grades > 0
    ideal = -np.sort(-grades)
    hits = relevant[:TOP]
    precisions = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    average = float((precisions * hits).sum()) / min(int(relevant.sum()), TOP)
    return _gain(grades) / _gain(ideal), average, 1.0 / (1 + int(relevant.argmax()))


def _gain(grades: Floats) -> float:
    top = grades[:TOP]
    return float(((2.0**top - 1) / np.log2(np.arange(2, len(top) + 2))).sum())
