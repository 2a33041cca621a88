"""Metrics read at scrape time: what the verbs count for themselves anyway."""

from collections.abc import Iterable, Mapping

from mlpd.core.limits import AdaptiveLimit
from mlpd.daemon.alerts import Alerts
from mlpd.daemon.audit import Audit
from mlpd.daemon.canaries import Canaries
from mlpd.daemon.dropped import DroppedViews
from mlpd.daemon.expire import Expire
from mlpd.daemon.feedback import Feedback
from mlpd.daemon.ingest import Ingest
from mlpd.daemon.predict import Predict
from mlpd.daemon.predictions import PredictionLog
from mlpd.daemon.retention import Retention
from mlpd.daemon.served_looks import ServedLook
from mlpd.daemon.traces import Traces
from mlpd.monitoring.instruments import Descriptor
from mlpd.monitoring.metrics import Collected, Collector
from mlpd.serving.shadow import ShadowRunner
from mlpd.serving.statistics import ModelStatistics
from mlpd.serving.table import ModelTable
from mlpd.storage.environment import Environment
from mlpd.storage.writer import Writer


def ingest_collector(ingest: Ingest) -> Collector:
    """Return a collector of rows by source and fate."""
    descriptor = Descriptor(
        "mlpd_ingest_rows_total", "counter", "Event rows by fate.", ("source", "result")
    )

    violations = Descriptor(
        *("mlpd_ingest_violations_total", "counter", "Refused rows by what was wrong."),
        ("source", "code"),
    )

    def collect() -> Iterable[Collected]:
        fates: dict[str, Mapping[str, int]] = {
            "accepted": ingest.rows_by_source,
            "rejected": ingest.rejected_by_source,
            "clamped": ingest.clamped_by_source,
            "duplicate": ingest.duplicates_by_source,
        }
        samples = [
            ((source, fate), float(count))
            for fate, counts in fates.items()
            for source, count in list(counts.items())
        ]
        refused = [(key, float(count)) for key, count in ingest.violations.rows().items()]
        return [Collected(descriptor, samples), Collected(violations, refused)]

    return collect


def limit_collector(limits: Mapping[str, AdaptiveLimit]) -> Collector:
    """Return a collector of adaptive limits by the kind of request."""

    def collect() -> Iterable[Collected]:
        refused = {kind: limit.refused for kind, limit in limits.items()}
        now = {
            "mlpd_requests_limit": ("Requests that may be under way.", "limit"),
            "mlpd_requests_in_flight": ("Requests under way.", "in_flight"),
        }
        return [
            _by("mlpd_requests_refused_total", "Requests over the limit.", "kind", refused),
            *(
                Collected(
                    Descriptor(name, "gauge", text, ("kind",)),
                    [((kind,), float(getattr(limit, field))) for kind, limit in limits.items()],
                )
                for name, (text, field) in now.items()
            ),
        ]

    return collect


def fallback_collector(predict: Predict) -> Collector:
    """Return a collector of rows that another model, or none, answered for an arm."""

    def collect() -> Iterable[Collected]:
        fates = {"model": predict.fell_back, "default": predict.defaulted}
        samples = [
            ((route, fate), float(count))
            for fate, counts in fates.items()
            for route, count in list(counts.items())
        ]
        name = "mlpd_fallback_rows_total"
        text = "Rows whose arm failed, by what answered."
        return [Collected(Descriptor(name, "counter", text, ("route", "result")), samples)]

    return collect


def canary_collector(canaries: Canaries) -> Collector:
    """Return a collector of canaries: the share of running ones, and how all have ended."""
    share = Descriptor(
        "mlpd_canary_share", "gauge", "Share of a running canary's arm.", ("route", "arm")
    )

    def collect() -> Iterable[Collected]:
        running = canaries.describe()
        shares = [((name, found["arm"]), float(found["share"])) for name, found in running.items()]
        text = "Canaries that ended since the start, by how."
        ended = _by("mlpd_canaries_ended_total", text, "state", canaries.ended)
        return [Collected(share, shares), ended]

    return collect


def model_collector(models: ModelTable) -> Collector:
    """Return a collector of the models in memory."""

    def collect() -> Iterable[Collected]:
        loaded = sum(map(len, models.models().values()))
        return [
            _gauge("mlpd_models_loaded", "Versions in memory.", loaded),
            _gauge("mlpd_models_bytes", "What they take.", models.memory_bytes, unit="bytes"),
            _counter("mlpd_models_evictions_total", "Versions evicted.", models.evictions),
        ]

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
        logged = {"logged": log.logged, "dropped": log.dropped, "left_out": log.left_out}
        labels = {**feedback.counts}
        labels["rejected"] += log.labels_refused
        kinds = ("executed", "dropped", "failed")
        counters = shadows.counters()
        return [
            _by("mlpd_feedback_labels_total", "Labels by fate.", "result", labels),
            _by("mlpd_prediction_log_rows_total", "Served rows by fate.", "result", logged),
            _by(
                "mlpd_shadow_rows_total",
                "Rows for shadows by fate.",
                "result",
                {kind: counters[kind] for kind in kinds},
            ),
            _by("mlpd_consistency_rows_total", "Audited rows by result.", "result", audit.rows),
            _counter(
                *("mlpd_consistency_cpu_seconds_total", "Processor time of continuous audits."),
                audit.cpu_s,
                unit="seconds",
            ),
        ]

    return collect


def removal_collector(
    retention: Retention, feedback: Feedback, dropped: DroppedViews, expire: Expire
) -> Collector:
    """Return a collector of what was removed: too old, too much, of views that are gone."""

    def collect() -> Iterable[Collected]:
        removed = {
            **retention.removed,
            "events": expire.removed,
            "orphans_over_limit": feedback.orphans_dropped,
            "rows_of_dropped_views": dropped.removed,
        }
        name = "mlpd_removed_rows_total"
        return [_by(name, "Rows removed, by what they were.", "kind", removed)]

    return collect


def alert_collector(alerts: Alerts) -> Collector:
    """Return a collector of alerts by name and state, of messages by sink and result."""
    held = Descriptor("mlpd_alerts", "gauge", "Alerts that are not ok.", ("alertname", "state"))
    told = Descriptor(
        *("mlpd_alert_messages_total", "counter", "Messages of alerts by fate."),
        ("sink", "result"),
    )

    def collect() -> Iterable[Collected]:
        return [
            Collected(held, [(key, float(n)) for key, n in alerts.counts().items()]),
            Collected(told, [(key, float(n)) for key, n in alerts.notifications().items()]),
            _counter(
                "mlpd_alert_look_failures_total",
                "Looks for alerts that failed.",
                alerts.failed_looks,
            ),
        ]

    return collect


def trace_collector(traces: Traces) -> Collector:
    """Return a collector of traced requests by what became of their spans."""

    def collect() -> Iterable[Collected]:
        name = "mlpd_traced_requests_total"
        text = "Requests of sampled traces, by what became of their spans; failed counts attempts."
        return [_by(name, text, "result", traces.counts)]

    return collect


def triton_collector(models: ModelTable) -> Collector:
    """Return a collector of inferences by Triton's names, from what /v2/models/stats shows."""

    def collect() -> Iterable[Collected]:
        loaded = [
            ((name, str(number)), _triton_values(served.session.statistics))
            for name, versions in models.models().items()
            for number, served in versions.items()
        ]
        return [
            Collected(
                Descriptor(name, "mirrored", text, ("model", "version")),
                [(key, values[name]) for key, values in loaded],
            )
            for name, text in _TRITON.items()
        ]

    return collect


_TRITON = {
    "nv_inference_request_success": "Inference requests answered.",
    "nv_inference_request_failure": "Inference requests that failed.",
    "nv_inference_count": "Rows inferred.",
    "nv_inference_exec_count": "Runs of the graph.",
    "nv_inference_request_duration_us": "Time of answered requests, summed.",
    "nv_inference_queue_duration_us": "Time that requests waited, summed.",
    "nv_inference_compute_infer_duration_us": "Time in the graph, summed.",
}


def _triton_values(statistics: ModelStatistics) -> dict[str, float]:
    batches = list(statistics.batches.values())
    return {
        "nv_inference_request_success": float(statistics.success_count),
        "nv_inference_request_failure": float(statistics.fail_count),
        "nv_inference_count": float(sum(batch.rows for batch in batches)),
        "nv_inference_exec_count": float(sum(batch.executions for batch in batches)),
        "nv_inference_request_duration_us": statistics.success_ns / 1e3,
        "nv_inference_queue_duration_us": sum(batch.queue_ns for batch in batches) / 1e3,
        "nv_inference_compute_infer_duration_us": sum(batch.infer_ns for batch in batches) / 1e3,
    }


def drift_collector(look: ServedLook) -> Collector:
    """Return a collector of the last window's drift, by version and feature."""
    descriptor = Descriptor(
        *("mlpd_feature_drift_psi", "gauge", "Adjusted PSI of the last window against training."),
        ("model", "version", "feature"),
    )

    def collect() -> Iterable[Collected]:
        samples = [
            ((model, str(version), column.name), column.psi_adjusted)
            for (model, version), report in look.last.items()
            for column in report.features
        ]
        return [Collected(descriptor, samples)]

    return collect


def _counter(name: str, text: str, value: float, unit: str = "") -> Collected:
    return Collected(Descriptor(name, "counter", text, unit=unit), [((), float(value))])


def _gauge(name: str, text: str, value: float, unit: str = "") -> Collected:
    return Collected(Descriptor(name, "gauge", text, unit=unit), [((), float(value))])


def _by(name: str, text: str, label: str, counts: Mapping[str, float]) -> Collected:
    samples = [((key,), float(value)) for key, value in counts.items()]
    return Collected(Descriptor(name, "counter", text, (label,)), samples)
