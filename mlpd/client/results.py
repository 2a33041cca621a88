"""Types of answers, as the daemon's messages have them: dicts that type checkers know."""

from typing import Any, NotRequired, TypedDict


class PredictedRow(TypedDict):
    """One row's answer.

    `prediction_id`: None for a row that is not logged: no label can join it.  `label`: the score
    cut at 0.5, or of several classes the chosen one; `scores` has one for each then.  A row with
    `fallback` was answered for an arm that could not, and says why; with the route's default score
    it has no label, arm, model and version.  `rank`: its place, from 1, in an interleaved list.
    The rest is there when it was asked for with `include` or `explain`; `statuses` and `ages_s` are
    by feature and by view.
    """

    prediction_id: str | None
    score: float
    label: NotRequired[int]
    scores: NotRequired[list[float]]
    arm: NotRequired[str]
    model: NotRequired[str]
    version: NotRequired[int]
    fallback: NotRequired[str]
    rank: NotRequired[int]
    vector: NotRequired[list[float] | None]
    features: NotRequired[dict[str, Any]]
    statuses: NotRequired[dict[str, str]]
    ages_s: NotRequired[dict[str, float | None]]
    raw_score: NotRequired[float]
    base: NotRequired[float]
    contributions: NotRequired[dict[str, float]]


class Predictions(TypedDict):
    """Answers in the order of the rows that were sent.

    `t_us`: the moment of the features, microseconds UTC; `sequence`: the last event they saw.
    """

    route: str
    route_version: int
    predictions: list[PredictedRow]
    t_us: int
    sequence: int


class Recorded(TypedDict):
    """What became of labels: counts, and the refused ones with index, code, message, hint."""

    accepted: int
    joined: int
    orphans: int
    revised: int
    stale: int
    late: int
    conflicts: int
    rejected: list[dict[str, Any]]
