"""Looks at models: drift and data quality of what they see, and how well they do."""

import asyncio
import logging
from collections.abc import Iterator

from mlpd.core.config import AlertsConfig
from mlpd.core.errors import MlpdError
from mlpd.core.time import DAY_US
from mlpd.daemon.looks import Window
from mlpd.daemon.monitor import Monitor
from mlpd.monitoring.alerts import ALERTNAME, SEVERITY, Measurement
from mlpd.monitoring.drift import P_MAX, ColumnDrift, DriftReport
from mlpd.monitoring.thresholds import ALERT_PSI, ROWS_MIN, WARN_PSI
from mlpd.registry.lineage import Lineage
from mlpd.registry.models import Registry

LABELLED_MIN = 100
"""A day of predictions is judged once it is mature and has so many labels."""

DAYS_BACK_MAX = 60
"""Older days, such as those of a replay, are history."""

_SEVERITIES = (("warning", WARN_PSI), ("critical", ALERT_PSI))
_log = logging.getLogger("mlpd.alerts")


class Boundaries:
    """Tells when a window of the wall clock closes; windows begin at multiples of their width.

    Those that passed while nobody asked, or that a clock jumped over, are not made up for; after a
    jump back they go on from where the clock is.
    """

    def __init__(self, width_us: int, now_us: int) -> None:
        self._width_us = width_us
        self._end_us = now_us - now_us % width_us

    def closed(self, now_us: int) -> tuple[int, int] | None:
        """Return (start, end) in us of the last window if it closed since the last call."""
        end_us = now_us - now_us % self._width_us
        before_us, self._end_us = self._end_us, end_us
        if end_us < before_us:
            _log.warning("the clock jumped back: windows go on from here")
        return (end_us - self._width_us, end_us) if end_us > before_us else None


class ServedLook:
    """Drift, data quality and performance of what is served, one window for all of them."""

    names = frozenset({"FeatureDrift", "PredictionDrift", "FeatureQuality", "Performance"})

    def __init__(
        self, monitor: Monitor, registry: Registry, config: AlertsConfig, now_us: int
    ) -> None:
        self._monitor = monitor
        self._config = config
        self._boundaries = Boundaries(config.drift_window_us, now_us)
        self._performance = _Performance(monitor, registry, config.performance_drop)
        self.last: dict[tuple[str, int], DriftReport] = {}
        """By (model, version) the drift of the last window, where it had rows enough."""
        self.window: tuple[int, int] | None = None
        """Start and end of that window in us."""

    async def look(self, now_us: int) -> Window | None:
        """Return the last window of the wall clock, once it closed."""
        window = self._boundaries.closed(now_us)
        if window is None:
            return None
        self.window = start_us, end_us = window
        performance = await self._performance.measure(now_us)
        found = dict(await self._monitor.drift_between(start_us, end_us))
        self.last = {key: report for key, report in found.items() if report.rows >= ROWS_MIN}
        # 240 measurements of a version with 40 features take 2 ms.
        measured = await asyncio.to_thread(self._of_models, self.last)
        return Window(start_us, [*performance, *measured])

    def _of_models(self, reports: dict[tuple[str, int], DriftReport]) -> list[Measurement]:
        return [
            measured
            for (model, version), report in reports.items()
            for measured in self._of_model(model, version, report)
        ]

    def _of_model(self, model: str, version: int, report: DriftReport) -> Iterator[Measurement]:
        labels = {"model": model, "version": str(version)}
        group = f"model {model}"
        for column in report.features:
            of = {**labels, "feature": column.name}
            for severity, least in _SEVERITIES:
                yield _drift("FeatureDrift", of, group, column, severity, least)
            yield from self._quality(of, group, column)
        if report.prediction is not None:
            for severity, least in _SEVERITIES:
                yield _drift("PredictionDrift", labels, group, report.prediction, severity, least)

    def problems(self, column: ColumnDrift) -> Iterator[tuple[str, float, float, float]]:
        """Yield (problem, share, share in training, threshold) of a feature."""
        shares = {
            "missing": (column.missing_share, column.reference_missing_share),
            "out_of_range": (column.out_of_range_share, 0.0),
            "unseen": (column.new_share, 0.0),
            "infinite": (column.infinite_share, 0.0),
        }
        config = self._config
        for problem, (share, usual) in shares.items():
            relative = min(1.0, config.quality_factor * usual)
            yield problem, share, usual, max(config.quality_share, relative)

    def _quality(
        self, labels: dict[str, str], group: str, column: ColumnDrift
    ) -> Iterator[Measurement]:
        for problem, share, usual, threshold in self.problems(column):
            yield Measurement(
                {ALERTNAME: "FeatureQuality", **labels, "problem": problem},
                group,
                share,
                threshold,
                f"{share:.1%} of the rows are {problem.replace('_', ' ')}, {usual:.1%} in training",
            )


def _drift(
    name: str,
    labels: dict[str, str],
    group: str,
    column: ColumnDrift,
    severity: str,
    least: float,
) -> Measurement:
    shown = column.psi_adjusted if column.p_adjusted <= P_MAX else 0.0
    return Measurement(
        {ALERTNAME: name, SEVERITY: severity, **labels},
        group,
        shown,
        max(least, column.threshold or 0.0),
        f"psi {column.psi_adjusted:.3f} against training, adjusted p {column.p_adjusted:.2g}",
    )


class _Performance:
    """How far the AUC of the newest day with enough labels lies below training's."""

    def __init__(self, monitor: Monitor, registry: Registry, drop: float) -> None:
        self._monitor = monitor
        self._registry = registry
        self._drop = drop
        self._trained: dict[tuple[str, int], float | None] = {}

    async def measure(self, now_us: int) -> list[Measurement]:
        """Return the drop of each version that has such a day."""
        oldest_us = now_us - DAYS_BACK_MAX * DAY_US
        found = []
        for (model, version), report in await self._monitor.newest_days(
            oldest_us, labelled_min=LABELLED_MIN
        ):
            trained, auc = await self._trained_auc(model, version), report.performance.auc
            if trained is not None and auc is not None:
                text = (
                    f"AUC {auc:.4f} over the {report.labelled} labels of the newest mature day, "
                    f"{trained:.4f} in training"
                )
                labels = {ALERTNAME: "Performance", "model": model, "version": str(version)}
                found.append(Measurement(labels, f"model {model}", trained - auc, self._drop, text))
        return found

    async def _trained_auc(self, model: str, version: int) -> float | None:
        key = model, version
        if key not in self._trained:
            try:
                lineage = await self._registry.load_lineage(model, version)
            except MlpdError:
                return None  # quarantined or damaged: the registry says so itself
            found = lineage.metrics.get("auc") if isinstance(lineage, Lineage) else None
            self._trained[key] = found if isinstance(found, float) else None
        return self._trained[key]
