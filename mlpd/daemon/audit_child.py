"""Child entry `audit`: recompute what was served, from the log, and compare bit for bit."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mlpd.core.columns import Column
from mlpd.core.convert import column_of
from mlpd.core.specs import Closure
from mlpd.core.vector import Vectorizer
from mlpd.daemon.child import Send
from mlpd.daemon.offline import Offline, open_offline
from mlpd.daemon.predictions import Prediction, scan_predictions
from mlpd.features.offline import Spine, join_history
from mlpd.monitoring.consistency import Comparison, compare

BATCH_ROWS = 100_000
"""Predictions recomputed together: their vectors of 50 features take 40 MB."""


def run(request: dict[str, Any], send: Send) -> dict[str, Any]:
    """Compare up to `limit` logged predictions (None: all) with their recomputation.

    `versions` maps `model@version` to {"encoder", "service", "service_hash"}.  Rows of another
    definition of the service, or of an unknown version, are `unavailable`.
    """
    totals: list[Comparison] = []
    unavailable = 0
    with open_offline(request) as offline:
        for reference, batch in _batches(offline, request["limit"]):
            version = request["versions"].get(reference)
            closure = offline.catalog.closures.get(version["service"]) if version else None
            if version is None or closure is None or closure.hash != version["service_hash"]:
                unavailable += len(batch)
                continue
            vectorizer = Vectorizer.from_dict(version["encoder"])
            totals.append(audit(offline, closure, vectorizer, batch))
            send({"kind": "progress", "rows": sum(total.rows for total in totals)})
    return {
        "rows_compared": sum(total.rows for total in totals),
        "values_compared": sum(total.values for total in totals),
        "mismatched_rows": sum(total.mismatched_rows for total in totals),
        "mismatches": sum(total.mismatched_values for total in totals),
        "unavailable": unavailable,
        "by_feature": _sum(total.by_feature for total in totals),
        "examples": [
            {
                "prediction_id": found.prediction_id,
                "feature": found.feature,
                "served": repr(found.logged),
                "recomputed": repr(found.recomputed),
            }
            for total in totals
            for found in total.mismatches
        ][:100],
    }


def audit(
    offline: Offline, closure: Closure, vectorizer: Vectorizer, batch: list[Prediction]
) -> Comparison:
    """Return how the logged vectors compare with those of the log as of their sequences."""
    given: Mapping[str, Column] = {
        name: column_of(dtype, [p.given[name] for p in batch], name)
        for name, dtype in {**closure.key_columns, **closure.service.request}.items()
    }
    t_us = np.array([p.t_us for p in batch], np.int64)
    sequences = np.array([p.sequence for p in batch], np.int64)
    spine = Spine(given, t_us, sequences)
    frame = join_history(offline.catalog, closure, spine, offline.events, mode="as_of_sequence")
    recomputed = vectorizer.vectorize(frame.columns)
    logged = np.stack([p.vector for p in batch])
    return compare([p.prediction_id for p in batch], vectorizer.names, logged, recomputed)


def _batches(offline: Offline, limit: int | None) -> Iterator[tuple[str, list[Prediction]]]:
    """Yield (model@version, predictions) with at most `BATCH_ROWS` each."""
    waiting: dict[str, list[Prediction]] = {}
    seen = 0
    for rows in scan_predictions(offline.environment):
        for prediction, _ in rows:
            if limit is not None and seen >= limit:
                break
            if prediction.sequence > offline.through:
                continue
            seen += 1
            reference = f"{prediction.model}@{prediction.version}"
            batch = waiting.setdefault(reference, [])
            batch.append(prediction)
            if len(batch) == BATCH_ROWS:
                yield reference, waiting.pop(reference)
    yield from waiting.items()


def _sum(parts: Iterator[Mapping[str, int]] | Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for name, count in part.items():
            total[name] = total.get(name, 0) + count
    return total
