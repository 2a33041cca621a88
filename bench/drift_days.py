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

from bench.flights_year import KINDS, ROWS_MIN, Kind, Year, kinds_of_days, load_year
from bench.options import Options
from bench.turns import Case, spreads
from mlpd.cli.definitions import conf_folder, load_folder
from mlpd.cli.demo.timeline import month_us
from mlpd.core.document import parse_document
from mlpd.core.kernels import load_kernels
from mlpd.core.time import DAY_US, HOUR_US
from mlpd.monitoring.counting import CountLayout, Counts
from mlpd.monitoring.drift import DriftReport, report
from mlpd.monitoring.reference import ReferenceProfile, bin_index, build_reference
from mlpd.monitoring.thresholds import WIDTHS_US, calibrate, number_windows, window_drifts
from mlpd.training.split import Timeline, split_rows

KERNELS: Final = "mlpd.monitoring.count_kernel"
OTHERS: Final = "every month against the other eleven"
WIDTHS: Final = "windows of other widths"
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
    others: list[Judged] = []
    widths: list[tuple[int, bool, bool]] = []
    for reference, days in months_apart(year, kinds):
        fold = build_fold(year, reference, days, with_score=True)
        others += judge_days(year, fold, kinds)
        widths += judge_widths(fold)
    fold = build_fold(year, *as_demo(year, kinds), with_score=True)
    demo = list(judge_days(year, fold, kinds))
    return {OTHERS: case_of(others), DEMO: case_of(demo), **cases_of_widths(widths)}


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


@dataclass(frozen=True, slots=True)
class Fold:
    """A profile, and what was served on some days: rows [n] in order of time, the score last.

    `alone` is the profile with thresholds of days that don't know of the other columns.
    """

    profile: ReferenceProfile
    alone: ReferenceProfile
    days: Sequence[int]
    rows: Floats
    t_us: NDArray[np.int64]

    def windows(self, width_us: int) -> Iterator[tuple[int, Counts]]:
        """Yield start in us and counts of each window of 100 rows that lies within the days."""
        kernels: Any = load_kernels(KERNELS)
        layout = CountLayout(self.profile)
        days, number = set(self.days), self.t_us // width_us
        windows, rows = np.unique(number, return_counts=True)
        for window in windows[rows >= ROWS_MIN].tolist():
            first, last = window * width_us // DAY_US, ((window + 1) * width_us - 1) // DAY_US
            if {first, last} <= days:
                counts = Counts(layout)
                of_window = np.ascontiguousarray(self.rows[number == window])
                counts.add_rows(of_window, kernels=kernels)
                yield window * width_us, counts


def build_fold(year: Year, reference: Rows, days: Sequence[int], *, with_score: bool) -> Fold:
    """Return the fold of `days` against the rows of `reference` bool [n].

    `with_score`: a model is trained on the reference, and its score takes part.
    """
    served = np.isin(year.day, days)
    vectors, live = year.vectors[reference], _as_served(year, reference, served)
    gains, scores, live_scores = _score(year, reference, live) if with_score else (None, None, None)
    t_us = year.t_us[reference]
    profile = build_reference(
        vectors,
        names=year.names,
        kinds=["categorical" if i in year.categorical else "numeric" for i in range(year.width)],
        scores=scores,
        gains=gains,
        t_us=t_us,
    )
    alone = _calibrated_alone(profile, vectors, scores, t_us)
    rows = live if live_scores is None else np.column_stack([live, live_scores])
    return Fold(profile, alone, days, rows, year.t_us[served])


def judge_days(year: Year, fold: Fold, kinds: Mapping[int, Kind]) -> Iterator[Judged]:
    """Yield what the drift of each day of a fold is."""
    for start_us, counts in fold.windows(DAY_US):
        day = start_us // DAY_US
        failed = float(year.failed[year.day == day].mean())
        found, alone_found = report(fold.profile, counts), report(fold.alone, counts)
        yield Judged(day, kinds[day], failed, found, alone_found)


def judge_widths(fold: Fold) -> Iterator[tuple[int, bool, bool]]:
    """Yield of windows of other widths: the width, and whether each is flagged.

    By thresholds of its own width, and by those of days.
    """
    for width_us in WIDTHS_US:
        for _, counts in fold.windows(width_us) if width_us != DAY_US else ():
            own = report(fold.profile, counts, width_us=width_us)
            yield width_us, own.state != "ok", report(fold.profile, counts).state != "ok"


def case_of(judged: Sequence[Judged]) -> Case:
    """Return the shares, and every day that was a storm or is called drifted."""
    days, flagged = Counter(one.kind for one in judged), Counter[Kind]()
    by_itself = Counter[Kind]()
    for one in judged:
        flagged[one.kind] += one.is_flagged
        by_itself[one.kind] += one.alone.state != "ok"

    def shares(found: Counter[Kind]) -> Mapping[str, float]:
        return {f"{kind}_share": found[kind] / days[kind] for kind in KINDS if days[kind]}

    notes = {
        "days": dict(days),
        "flagged": dict(flagged),
        "flagged_alone": dict(by_itself),
        "shown": [one.to_dict() for one in judged if one.kind == "storm" or one.is_flagged],
    }
    return _case("ordinary_share", shares(flagged), shares(by_itself), notes)


def cases_of_widths(judged: Sequence[tuple[int, bool, bool]]) -> dict[str, Case]:
    """Return for each width the share of windows that are flagged, and by thresholds of days."""
    cases = {}
    for width_us in dict.fromkeys(width for width, _, _ in judged):
        flags = np.array([flags for width, *flags in judged if width == width_us])
        own, by_days = ({"flagged_share": share} for share in flags.mean(axis=0).tolist())
        counts = zip(("flagged", "flagged_by_days"), flags.sum(axis=0).tolist(), strict=True)
        notes = {"windows": len(flags), **dict(counts)}
        cases[f"{WIDTHS}, {width_us // HOUR_US} h"] = _case("flagged_share", own, by_days, notes)
    return cases


def _case(
    measure: str, ours: Mapping[str, float], against: Mapping[str, float], notes: Mapping[str, Any]
) -> Case:
    """Return shares that are the same every time."""
    sides = {"ours": spreads([ours]), "against": spreads([against])}
    return {"measure": measure, **sides, "rounds": 1, "notes": notes}


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
    profile: ReferenceProfile, vectors: Floats, scores: Floats | None, t_us: NDArray[np.int64]
) -> ReferenceProfile:
    """Return the profile with thresholds of days that don't know of the other columns."""
    number, columns = number_windows(t_us, DAY_US), []
    for index, column in enumerate(profile.columns):
        values = scores if scores is not None and index == len(profile.features) else None
        values = vectors[:, index] if values is None else values
        drifts = window_drifts(bin_index(column, values), np.array(column.counts), number)
        thresholds = tuple((DAY_US, threshold) for threshold in calibrate([drifts]))
        columns.append(replace(column, thresholds=thresholds))
    score = columns.pop() if profile.score is not None else None
    return ReferenceProfile(profile.rows, tuple(columns), score)
