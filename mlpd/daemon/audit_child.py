"""Child entry `audit`: recompute what was served, from the log, and compare bit for bit."""

from collections.abc import Iterator, Mapping
from resource import RUSAGE_SELF, getrusage
from typing import Any

import numpy as np

from mlpd.core.hashing import SLOTS
from mlpd.core.specs import Closure
from mlpd.core.time import format_time
from mlpd.core.vector import Vectorizer
from mlpd.daemon.audit_logs import AuditedRows, Logs, open_logs
from mlpd.daemon.child import Send
from mlpd.daemon.offline import Offline, open_offline
from mlpd.daemon.predictions import (
    Prediction,
    decode_prediction,
    scan_predictions,
)
from mlpd.daemon.served_child import read_predictions
from mlpd.daemon.served_left import listed_keys, load_left
from mlpd.features.tombstones import DELETED
from mlpd.monitoring.consistency import Comparison, Mismatch, compare
from mlpd.storage.segments import EVENT_TIME, KNOWN_TIME, SEQUENCE
from mlpd.storage.tables import Table

_TIMES = {"event_time": EVENT_TIME, "known_time": KNOWN_TIME}
_GOLDEN = 0.6180339887498949
_LOAD_ROWS = 2_000
"""Predictions from one snapshot: a few milliseconds, so that none grows old."""
BATCH_ROWS = 100_000
"""Predictions recomputed together: their vectors of 50 features take 40 MB."""


EXAMPLES_MAX = 100
EXPLAINED_MAX = 10
"""Differing values whose events are looked up: each reads its source once more."""
EVENTS_SHOWN = 5


def run(request: dict[str, Any], send: Send) -> dict[str, Any]:
    """Compare logged predictions with their recomputation.

    `limit` of them (None: all); or with `window` ([from, to) of arrival in us, `rows_max`, `turn`)
    a sample of those that were logged in it.  `versions` maps `model@version` to {"encoder",
    "service", "service_hash", "definitions"}, the last null where this version of the service
    runs.  Rows of unknown versions, of a time whose history is no longer kept, and of entities that
    nobody tells of any more are `unavailable`.  `others`: null to leave out rows for which logs of
    other shards are needed: `elsewhere` has their number, and per shard the sources.  With these
    logs, from `Gathering.fetch_logs`, such rows alone are compared.
    """
    totals: list[Comparison] = []
    unavailable, explained = 0, list[dict[str, Any]]()
    left, needs = 0, dict[str, set[str]]()
    with open_offline(request) as offline:
        logs = open_logs(offline, request["others"])
        served, rows = _rows(offline, request)
        for reference, batch in _batches(offline, rows, request["limit"]):
            version = request["versions"].get(reference)
            found = None if version is None else _find(logs, version)
            if found is None:
                unavailable += len(batch) if request["others"] is None else 0
                continue
            asked = AuditedRows(*found, batch)
            elsewhere = asked.elsewhere()
            if request["others"] is None:
                left += int(elsewhere.sum())
                for shard, sources in asked.needs(elsewhere).items():
                    needs.setdefault(shard, set()).update(sources)
                asked = asked.take(~elsewhere)
            else:
                asked = asked.take(elsewhere)
                asked = asked.take(~asked.is_newer())
            kept = asked.take(asked.kept())
            compared = [audit(kept, Vectorizer.from_dict(version["encoder"]))] if kept.rows else []
            unavailable += len(asked.rows) - sum(total.rows for total in compared)
            totals += compared
            for total in compared:
                explained += _explain(found[1], kept, total, EXPLAINED_MAX - len(explained))
            send({"kind": "progress", "rows": sum(total.rows for total in totals)})
    usage = getrusage(RUSAGE_SELF)
    return {
        "served": served,
        "rows_compared": sum(total.rows for total in totals),
        "values_compared": sum(total.values for total in totals),
        "mismatched_rows": sum(total.mismatched_rows for total in totals),
        "mismatches": sum(total.mismatched_values for total in totals),
        "unavailable": unavailable,
        "elsewhere": {"rows": left, "logs": {name: sorted(found) for name, found in needs.items()}},
        "by_feature": _sum(total.by_feature for total in totals),
        "examples": [*explained, *_others(totals, explained)][:EXAMPLES_MAX],
        "cpu_s": usage.ru_utime + usage.ru_stime,
    }


def _others(totals: list[Comparison], explained: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the differences that no events were looked up for."""
    known = {(found["prediction_id"], found["feature"]) for found in explained}
    return [
        _example(found, None)
        for total in totals
        for found in total.mismatches
        if (found.prediction_id, found.feature) not in known
    ]


def _example(found: Mismatch, events: list[dict[str, Any]] | None) -> dict[str, Any]:
    return {
        "prediction_id": found.prediction_id,
        "feature": found.feature,
        "served": repr(found.logged),
        "recomputed": repr(found.recomputed),
        "events": events,
    }


def _explain(
    closure: Closure, audited: AuditedRows, total: Comparison, count: int
) -> list[dict[str, Any]]:
    """Return the first differences with the newest events that their features could see."""
    places = {row.prediction_id: place for place, row in enumerate(audited.rows)}
    return [
        _example(
            found, _events_behind(closure, found.feature, audited, places[found.prediction_id])
        )
        for found in total.mismatches[: max(0, count)]
    ]


def _events_behind(
    closure: Closure, feature: str, audited: AuditedRows, place: int
) -> list[dict[str, Any]]:
    """Return the newest events of the entity that a row saw, newest first.

    Of the view that the feature is of; of all that the service reads, where it is a transform.
    """
    import polars as pl  # noqa: PLC0415 - in the child alone

    owner, prediction = feature.partition(".")[0], audited.rows[place]
    names = [owner] if owner in closure.view_features else list(closure.view_features)
    found = []
    for name in names:
        log, sequence = audited.log_of(place, name)
        definitions = log.catalog.definitions
        view = definitions.view(name)
        frame = log.frame(view.source, definitions.source(view.source).schema)
        seen = (pl.col(SEQUENCE) <= sequence) & (pl.col(EVENT_TIME) <= prediction.t_us)
        for key in definitions.entities[view.entity].columns:
            seen &= pl.col(key) == prediction.given[key]
        rows = frame.filter(seen).sort(EVENT_TIME, SEQUENCE).tail(EVENTS_SHOWN).to_dicts()
        found += [_describe(view.source, row) for row in rows]
    return found[::-1]


def _describe(source: str, row: dict[str, Any]) -> dict[str, Any]:
    deleted = row.pop(DELETED)
    times = {name: format_time(row.pop(column)) for name, column in _TIMES.items()}
    sequence = row.pop(SEQUENCE)
    values = {name: value if _is_plain(value) else str(value) for name, value in row.items()}
    return {
        "source": source,
        "sequence": sequence,
        **times,
        "deleted": bool(deleted),
        "values": values,
    }


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _find(logs: Logs, version: Mapping[str, Any]) -> tuple[Logs, Closure] | None:
    """Return the version of the service that a model reads, and the logs through what has it.

    None if the definitions that came with the model don't make it any more.
    """
    asked, offline = (version["service"], version["service_hash"]), logs.own
    if version["definitions"] is not None:
        offline = offline.with_definitions(version["definitions"])
    closure = offline.catalog.find_closure(*asked)
    if closure is None:
        return None
    return logs.through(offline.catalog.pinned.get(closure.hash, offline.catalog)), closure


def audit(asked: AuditedRows, vectorizer: Vectorizer) -> Comparison:
    """Return how the logged vectors compare with those of the logs as of what the rows saw."""
    recomputed = vectorizer.vectorize(asked.recompute().columns)
    logged = np.stack([p.vector for p in asked.rows])
    rows = np.flatnonzero(asked.kept())  # history may have gone under the join
    ids = [asked.rows[row].prediction_id for row in rows.tolist()]
    return compare(ids, vectorizer.names, logged[rows], recomputed[rows])


def _rows(offline: Offline, request: Mapping[str, Any]) -> tuple[int | None, Iterator[Prediction]]:
    """Return how many rows the window has (None: without one), and the rows to compare."""
    window = request["window"]
    if window is None:
        return None, _logged(offline)
    keys = _served_keys(offline, window["from_us"], window["to_us"])
    picked = pick(keys, window["rows_max"], window["turn"])
    return len(keys), _load(offline, picked)


def _served_keys(offline: Offline, from_us: int, to_us: int) -> list[bytes]:
    """Return the keys of what was logged in [from, to), by arrival."""
    start, stop = (time_us.to_bytes(8, "big") for time_us in (from_us, to_us))
    with offline.environment.snapshot() as snapshot:
        left = load_left(snapshot)
        listed = snapshot.scan(Table.SERVED, start, stop)
        return [key for position, keys in listed for key in listed_keys(position, keys, left)]


def pick(keys: list[bytes], rows_max: int, turn: int) -> list[bytes]:
    """Return up to `rows_max` keys, whole units together, other ones with every turn.

    A key begins with the slot that its unit hashes to; each turn begins at another slot, a golden
    section further, so that in the long run no unit is passed over.
    """
    first = int(turn * _GOLDEN * SLOTS) % SLOTS

    def place(key: bytes) -> tuple[int, bytes]:
        return (int.from_bytes(key[:2], "big") - first) % SLOTS, key

    return sorted(keys, key=place)[:rows_max]


def _load(offline: Offline, keys: list[bytes]) -> Iterator[Prediction]:
    """Yield the predictions that are still there: of LMDB, then those that moved into files."""
    moved: set[str] = set()
    for start in range(0, len(keys), _LOAD_ROWS):
        part = keys[start : start + _LOAD_ROWS]
        with offline.environment.snapshot() as snapshot:
            values = snapshot.get_many(Table.PREDICTIONS, part)
        found = [
            decode_prediction(k, v) for k, v in zip(part, values, strict=True) if v is not None
        ]
        moved.update(p.prediction_id for p in found if p.moved)
        yield from (p for p in found if not p.moved)
    if moved:
        for predictions in read_predictions(offline.environment, offline.paths):
            yield from (p for p in predictions if p.prediction_id in moved)


def _batches(
    offline: Offline, rows: Iterator[Prediction], limit: int | None
) -> Iterator[tuple[str, list[Prediction]]]:
    """Yield (model@version, predictions) with at most `BATCH_ROWS` each."""
    waiting: dict[str, list[Prediction]] = {}
    seen = 0
    for prediction in rows:
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


def _logged(offline: Offline) -> Iterator[Prediction]:
    """Yield what LMDB has whole, by key, then what lies in files.

    Vectors move from the former to the latter meanwhile.  LMDB is read first, so none is missed;
    what was seen there is passed over in the files, so none comes twice.
    """
    seen: set[str] = set()
    for rows in scan_predictions(offline.environment):
        for prediction, _ in rows:
            if not prediction.moved:
                seen.add(prediction.prediction_id)
                yield prediction
    for predictions in read_predictions(offline.environment, offline.paths):
        yield from (p for p in predictions if p.prediction_id not in seen)


def _sum(parts: Iterator[Mapping[str, int]] | Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for name, count in part.items():
            total[name] = total.get(name, 0) + count
    return total
