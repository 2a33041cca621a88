"""Metrics read at scrape time: what the verbs count for themselves anyway."""

from collections.abc import Iterable, Mapping

from mlpd.daemon.audit import Audit
from mlpd.daemon.dropped import DroppedViews
from mlpd.daemon.feedback import Feedback
from mlpd.daemon.ingest import Ingest
from mlpd.daemon.predictions import PredictionLog
from mlpd.daemon.retention import Retention
from mlpd.monitoring.instruments import Descriptor
from mlpd.monitoring.metrics import Collected, Collector
from mlpd.serving.shadow import ShadowRunner
from mlpd.storage.environment import Environment
from mlpd.storage.writer import Writer


def ingest_collector(ingest: Ingest) -> Collector:
    """Return a collector of rows by source and fate."""
    descriptor = Descriptor(
        "mlpd_ingest_rows_total", "counter", "Event rows by fate.", ("source", "result")
    )

    def collect() -> Iterable[Collected]:
        fates: dict[str, Mapping[str, int]] = {
            "accepted": ingest.rows_by_source,
            "rejected": ingest.rejected_by_source,
            "clamped": ingest.clamped_by_source,
        }
        samples = [
            ((source, fate), float(count))
            for fate, counts in fates.items()
            for source, count in list(counts.items())
        ]
        return [Collected(descriptor, samples)]

    return collect


def storage_collector(environment: Environment, writer: Writer) -> Collector:
    """Return a collector of the writer's groups and queue, and of LMDB's use."""

    def collect() -> Iterable[Collected]:
        stats, usage = writer.stats, environment.usage()
        with environment.snapshot() as snapshot:
            sequence = snapshot.sequence
        return [
            _counter("mlpd_storage_groups_total", "Group commits.", stats.groups),
            _counter("mlpd_storage_operations_total", "Writes.", stats.operations),
            _counter("mlpd_storage_failures_total", "Failed groups.", stats.storage_failures),
            _counter("mlpd_storage_rejected_total", "Writes refused: full queue.", stats.rejected),
            _counter(
                "mlpd_storage_commit_seconds_total",
                "Time spent in groups.",
                stats.group_us_total / 1e6,
                unit="seconds",
            ),
            _gauge("mlpd_storage_queued_writes", "Writes waiting.", writer.queued_entries),
            _gauge("mlpd_storage_used_bytes", "LMDB in use.", usage.used_bytes, unit="bytes"),
            _gauge("mlpd_storage_map_bytes", "LMDB at most.", usage.map_bytes, unit="bytes"),
            _gauge("mlpd_log_sequence", "Newest sequence of the log.", sequence),
        ]

    return collect


def outcome_collector(
    feedback: Feedback, log: PredictionLog, shadows: ShadowRunner, audit: Audit
) -> Collector:
    """Return a collector of labels, the prediction log, shadows and the consistency audit."""

    def collect() -> Iterable[Collected]:
        logged = {"logged": log.logged, "dropped": log.dropped}
        kinds = ("executed", "dropped", "failed")
        counters = shadows.counters()
        return [
            _by("mlpd_feedback_labels_total", "Labels by fate.", "result", feedback.counts),
            _by("mlpd_prediction_log_rows_total", "Served rows by fate.", "result", logged),
            _by(
                "mlpd_shadow_rows_total",
                "Rows for shadows by fate.",
                "result",
                {kind: counters[kind] for kind in kinds},
            ),
            _by("mlpd_consistency_rows_total", "Audited rows by result.", "result", audit.rows),
        ]

    return collect


def removal_collector(retention: Retention, feedback: Feedback, dropped: DroppedViews) -> Collector:
    """Return a collector of what was removed: too old, too much, of views that are gone."""

    def collect() -> Iterable[Collected]:
        removed = {
            **retention.removed,
            "orphans_over_limit": feedback.orphans_dropped,
            "rows_of_dropped_views": dropped.removed,
        }
        name = "mlpd_removed_rows_total"
        return [_by(name, "Rows removed, by what they were.", "what", removed)]

    return collect


def _counter(name: str, text: str, value: float, unit: str = "") -> Collected:
    return Collected(Descriptor(name, "counter", text, unit=unit), [((), float(value))])


def _gauge(name: str, text: str, value: float, unit: str = "") -> Collected:
    return Collected(Descriptor(name, "gauge", text, unit=unit), [((), float(value))])


def _by(name: str, text: str, label: str, counts: Mapping[str, float]) -> Collected:
    samples = [((key,), float(value)) for key, value in counts.items()]
    return Collected(Descriptor(name, "counter", text, (label,)), samples)
