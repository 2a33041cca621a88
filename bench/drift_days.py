"""Scenario drift_days: which days of 2013 flight_risk's drift report calls drifted, storms or not.

What days were is told by the flights (`flights_year`), what drifted by mlpd's own code: profile,
counts and report are those of a daemon, over windows of one UTC day.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bench.flights_year import KINDS, Kind, Year, kinds_of_days, load_year
from bench.options import Options
from bench.turns import Case, alone
from mlpd.cli.definitions import conf_folder, load_folder
from mlpd.cli.demo.timeline import month_us
from mlpd.core.document import parse_document
from mlpd.core.kernels import load_kernels
from mlpd.core.time import DAY_US
from mlpd.monitoring.counting import CountLayout, Counts
from mlpd.monitoring.drift import DriftReport, report
from mlpd.monitoring.reference import ReferenceProfile, bin_index, build_reference
from mlpd.monitoring.thresholds import calibrate, window_drifts
from mlpd.training.split import Timeline, split_rows

KERNELS: Final = "mlpd.monitoring.count_kernel"
OTHERS: Final = "every month against the other eleven"
DEMO: Final = "October to December against the training rows of the demo"

_JOB: Final = "flight-risk"
_PARAMS: Final = {"learning_rate": 0.1, "num_leaves": 31, "min_data_in_leaf": 200, "max_bin": 127}
_ROUNDS: Final = 60
_EVERY: Final = 3
"""Of the reference's rows every third: a smaller model than the job's, in rows, leaves, rounds."""

Floats = NDArray[np.float64]
Rows = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Judged:
    """One day: what it was, and what the report says; `alone` with thresholds of single columns."""

    day: int
    kind: Kind
    failed_share: float
    report: DriftReport
    alone: DriftReport

    @property
    def is_flagged(self) -> bool:
        """Whether a feature or the score drifted, by `warn` or `alert`."""
        return self.report.state != "ok"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "day": str(np.datetime64(self.day, "D")),
            "kind": self.kind,
            "failed_share": round(self.failed_share, 4),
            "rows": self.report.rows,
            "state": self.report.state,
            "drifted": drifted(self.report),
            "alone": drifted(self.alone),
        }


def drifted(found: DriftReport) -> list[str]:
    """Return the names of the drifted features, and `score` if that drifted."""
    score = found.prediction is not None and found.prediction.is_drifted
    return [*found.drifted, *(["score"] if score else [])]


def drift_days(options: Options) -> dict[str, Case]:  # noqa: ARG001 - the year is what it is
    """The share of ordinary days that are called drifted, and the storms that are.

    Ours is the state of the report: any feature, or the score, beyond its threshold; against it are
    thresholds calibrated for each column alone.  Takes some minutes of one processor: 13 models are
    trained, smaller than the job's, for their scores and gains.
    """
    year = load_year()
    kinds = kinds_of_days(year.day, year.failed)
    others = [
        judged
        for reference, days in months_apart(year, kinds)
        for judged in judge_days(year, reference, days, kinds, with_score=True)
    ]
    reference, days = as_demo(year, kinds)
    demo = list(judge_days(year, reference, days, kinds, with_score=True))
    return {OTHERS: case_of(others), DEMO: case_of(demo)}


def months_apart(year: Year, kinds: Mapping[int, Kind]) -> Iterator[tuple[Rows, list[int]]]:
    """Yield for each month the landed flights of all other months, and the month's days."""
    known = year.landed & np.isin(year.day, list(kinds))
    month_of = {day: str(np.datetime64(day, "D"))[:7] for day in kinds}
    for month in dict.fromkeys(month_of.values()):
        days = [day for day in kinds if month_of[day] == month]
        yield known & ~np.isin(year.day, days), days


def as_demo(year: Year, kinds: Mapping[int, Kind]) -> tuple[Rows, list[int]]:
    """Return the rows on which the demo's first model is trained, and the days that it serves."""
    job = parse_document(load_folder(conf_folder())).job(_JOB)
    served_us = month_us(10)
    known = np.flatnonzero(year.landed & (year.t_us < served_us))
    parts = split_rows(
        Timeline.of(year.t_us[known], None),
        valid_share=job.valid_share,
        test_share=job.test_share,
        gap_us=job.gap_us,
    )
    reference = np.zeros(len(year.t_us), np.bool_)
    reference[known[parts["train"]]] = True
    return reference, [day for day in kinds if day * DAY_US >= served_us]


def judge_days(
    year: Year,
    reference: Rows,
    days: Sequence[int],
    kinds: Mapping[int, Kind],
    *,
    with_score: bool,
) -> Iterator[Judged]:
    """Yield what the drift of each of `days` against the rows of `reference` bool [n] is.

    `with_score`: a model is trained on the reference, and its score takes part.
    """
    served = np.isin(year.day, days)
    vectors, live = year.vectors[reference], _as_served(year, reference, served)
    gains, scores, live_scores = _score(year, reference, live) if with_score else (None, None, None)
    of_day = year.day[reference]
    profile = build_reference(
        vectors,
        names=year.names,
        kinds=["categorical" if i in year.categorical else "numeric" for i in range(year.width)],
        scores=scores,
        gains=gains,
        windows=of_day,
    )
    single = _calibrated_alone(profile, vectors, scores, of_day)
    if live_scores is not None:
        live = np.column_stack([live, live_scores])
    kernels: Any = load_kernels(KERNELS)
    layout = CountLayout(profile)
    for day in days:
        counts = Counts(layout)
        counts.add_rows(np.ascontiguousarray(live[year.day[served] == day]), kernels=kernels)
        failed = float(year.failed[year.day == day].mean())
        found, alone_found = report(profile, counts), report(single, counts)
        yield Judged(day, kinds[day], failed, found, alone_found)


def case_of(judged: Sequence[Judged]) -> Case:
    """Return the shares, and every day that was a storm or is called drifted."""
    days, flagged = Counter(one.kind for one in judged), Counter[Kind]()
    by_itself = Counter[Kind]()
    for one in judged:
        flagged[one.kind] += one.is_flagged
        by_itself[one.kind] += one.alone.state != "ok"

    def shares(found: Counter[Kind]) -> Mapping[str, float]:
        return {f"{kind}_share": found[kind] / days[kind] for kind in KINDS if days[kind]}

    case = alone(lambda: shares(flagged), rounds=1, measure="ordinary_share")
    case["against"] = alone(lambda: shares(by_itself), rounds=1, measure="ordinary_share")["ours"]
    case["notes"] = {
        "days": dict(days),
        "flagged": dict(flagged),
        "flagged_alone": dict(by_itself),
        "shown": [one.to_dict() for one in judged if one.kind == "storm" or one.is_flagged],
    }
    return case


def _as_served(year: Year, reference: Rows, served: Rows) -> Floats:
    """Return what a model trained on the reference is asked: its categories are those of there."""
    live = year.vectors[served]
    for index in year.categorical:
        known = np.isin(live[:, index], year.vectors[reference, index])
        live[~known, index] = np.nan
    return live


def _score(year: Year, reference: Rows, live: Floats) -> tuple[list[float], Floats, Floats]:
    """Return split gains, and scores of the reference's rows and of `live`."""
    import lightgbm  # noqa: PLC0415 - costs 0.3 s: other scenarios don't pay

    picked = np.flatnonzero(reference)[::_EVERY]
    data = lightgbm.Dataset(
        year.vectors[picked], year.late[picked], categorical_feature=sorted(year.categorical)
    )
    # One thread: beside other work several wait for each other more than they win.
    params = {"objective": "binary", "num_threads": 1, "verbose": -1, **_PARAMS}
    booster = lightgbm.train(params, data, _ROUNDS)
    gains = booster.feature_importance("gain").tolist()
    scores = [np.asarray(booster.predict(rows)) for rows in (year.vectors[reference], live)]
    return gains, scores[0], scores[1]


def _calibrated_alone(
    profile: ReferenceProfile, vectors: Floats, scores: Floats | None, windows: NDArray[np.int64]
) -> ReferenceProfile:
    """Return the profile with thresholds that don't know of the other columns."""
    columns = []
    for index, column in enumerate(profile.columns):
        values = scores if scores is not None and index == len(profile.features) else None
        values = vectors[:, index] if values is None else values
        drifts = window_drifts(bin_index(column, values), np.array(column.counts), windows)
        threshold = None if drifts is None else calibrate([drifts])[0]
        columns.append(replace(column, threshold=threshold))
    score = columns.pop() if profile.score is not None else None
    return ReferenceProfile(profile.rows, tuple(columns), score)
