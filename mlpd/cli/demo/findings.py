"""What a demo found, gathered from the daemon, and its one JSON object."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from mlpd.cli.demo.replay import Totals
from mlpd.cli.demo.steps import CHAMPION, EXPERIMENT, MODEL, ROUTE, Backfill
from mlpd.client import Client

_MONTH_CHARS: Final = len("2013-10")


@dataclass(frozen=True, slots=True)
class Trained:
    """Results of the training runs; `challenger` is None if no second model was trained."""

    champion: Mapping[str, Any]
    ablation: Mapping[str, Any]
    challenger: Mapping[str, Any] | None = None

    def parity(self) -> dict[str, int]:
        """Return the rows compared bit for bit with LightGBM, over all models, and the equal."""
        runs = [run for run in (self.champion, self.ablation, self.challenger) if run is not None]
        return {name: sum(run["parity"][name] for run in runs) for name in ("rows", "bit_equal")}


@dataclass(frozen=True, slots=True)
class Observed:
    """What the daemon says about what it served; asked after the replay.

    `cohorts`: live performance of the route by month and arm, labelled ones alone.
    """

    cohorts: list[dict[str, Any]]
    drift: list[dict[str, Any]]
    shadow: Mapping[str, Any] | None
    experiment: Mapping[str, Any] | None

    def live_auc(self) -> dict[str, dict[str, float | None]]:
        """Return the AUC by month and arm."""
        found: dict[str, dict[str, float | None]] = {}
        for cohort in self.cohorts:
            auc = cohort["performance"]["auc"]
            found.setdefault(cohort["period"], {})[cohort["arm"]] = auc
        return found

    def drifted(self) -> dict[str, list[str]]:
        """Return the names of the drifted features by the day on which their week begins."""
        return {window["start"][:10]: list(window["drifted"]) for window in self.drift}


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that the report shows.

    `latency_ms`: of single-row requests, ascending.  `memory_bytes`: the most that all processes
    took together at one time, 0 where unknown.
    """

    imported: Backfill
    replayed: Totals
    replay_s: float
    trained: Trained
    observed: Observed
    audit: Mapping[str, Any]
    latency_ms: list[float]
    duration_s: float
    memory_bytes: int
    data_dir: str
    url: str

    @property
    def events(self) -> int:
        """All events sent."""
        return self.imported.events + self.replayed.events

    def latency_at_ms(self, share: float) -> float:
        """Return the latency that `share` of the requests stay within."""
        index = min(int(share * len(self.latency_ms)), len(self.latency_ms) - 1)
        return self.latency_ms[index]

    def to_dict(self) -> dict[str, Any]:
        """Return the object that --json prints.

        `events_per_s` is the durable import's; `predictions_per_s` the replay's, its events and
        labels included.
        """
        audit = self.audit
        return {
            "events_ingested": self.events,
            "events_per_s": round(self.imported.events / self.imported.duration_s),
            "predictions": self.replayed.predictions,
            "predictions_per_s": round(self.replayed.predictions / self.replay_s),
            "predict_p50_ms": round(self.latency_at_ms(0.5), 3),
            "predict_p99_ms": round(self.latency_at_ms(0.99), 3),
            "offline_auc": self.trained.champion["metrics"]["auc"],
            "ablation_auc": self.trained.ablation["metrics"]["auc"],
            "live_auc": self.observed.live_auc(),
            "consistency": {
                name: audit[name] for name in ("rows_compared", "values_compared", "mismatches")
            },
            "parity": self.trained.parity(),
            "shadow": shadow_form(self.observed.shadow),
            "experiment": experiment_form(self.observed.experiment),
            "drift": self.observed.drifted(),
            "duration_s": round(self.duration_s, 1),
            "data_dir": self.data_dir,
            "url": self.url,
        }


def observe(client: Client, start_us: int, end_us: int) -> Observed:
    """Ask the daemon what it saw from start to end, exclusive."""
    cohorts = [
        cohort
        for cohort in client.performance(MODEL)["cohorts"]
        if cohort["route"] == ROUTE and cohort["labelled"] and len(cohort["period"]) == _MONTH_CHARS
    ]
    drift = client.drift(MODEL, version=CHAMPION, start=start_us, end=end_us, step="7d")
    shadows = [pair for pair in client.shadows()["shadows"] if pair["route"] == ROUTE]
    names = client.experiments.list()["experiments"]
    return Observed(
        cohorts=sorted(cohorts, key=lambda cohort: (cohort["period"], cohort["arm"])),
        drift=drift["windows"],
        shadow=shadows[0] if shadows else None,
        experiment=client.experiments.get(EXPERIMENT) if EXPERIMENT in names else None,
    )


def shadow_form(pair: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the paired difference of the shadow's scores to the champion's."""
    if pair is None:
        return None
    return {
        "primary": pair["primary"],
        "shadow": pair["shadow"],
        "rows": pair["n"],
        "mean_difference": pair["mean"],
        "mean_interval": pair["mean_interval"],
        "sd": pair["sd"],
        "disagreement_rate": pair["disagreement_rate"],
    }


def experiment_form(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return lift and confidence sequence by metric, and the sample-ratio check."""
    if found is None:
        return None
    result = found["result"]
    return {
        "name": found["spec"]["name"],
        "units": result["units"],
        "lift": {
            comparison["metric"]: {
                "champion": comparison["control_value"],
                "challenger": comparison["value"],
                "difference": comparison["difference"],
                "relative": comparison["relative"],
                "confidence_sequence": [comparison["low"], comparison["high"]],
                "verdict": comparison["verdict"],
            }
            for comparison in result["comparisons"]
        },
        "srm": result["sample_ratio"],
    }
