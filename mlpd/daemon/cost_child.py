"""Child entry `cost`: what it would take to build views from the log, measured on a sample.

Time is measured on consecutive events, applied as a backfill does to entities that are there; disk
on all events of some entities, since it depends on what their windows hold.  In scratch stores.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import decode_columns, encode_columns
from mlpd.core.time import system_clock
from mlpd.daemon.child import Send
from mlpd.daemon.offline import Offline, open_offline
from mlpd.features.entities import entity_codes
from mlpd.features.ingest import apply_batch
from mlpd.features.offline import Events
from mlpd.features.view import ViewPlan
from mlpd.storage.environment import Environment
from mlpd.storage.writer import Writer

SAMPLE_ROWS = 20_000
"""Events that are applied for each measurement: one block of a backfill."""

Rows = NDArray[np.int64]


def run(request: dict[str, Any], send: Send) -> dict[str, dict[str, Any]]:
    """Return by view of `views`: `events`, `entities`, `seconds` and `bytes`.

    `seconds` covers reading the source once, for the first of its views, and applying.
    """
    found: dict[str, dict[str, Any]] = {}
    with open_offline(request) as offline:
        plans = [offline.catalog.views[name] for name in request["views"]]
        for source in sorted({plan.view.source for plan in plans}):
            events, reading_s = _load(offline, source)
            for plan in plans:
                if plan.view.source == source:
                    send({"kind": "progress", "view": plan.view.name})
                    found[plan.view.name] = _cost(plan, events, reading_s)
                    reading_s = 0.0
    return found


def _load(offline: Offline, source: str) -> tuple[Events, float]:
    started = time.perf_counter()
    schema = offline.catalog.definitions.source(source).schema
    events = offline.events(source, tuple(schema))
    order = np.argsort(events.stamps.sequences)
    columns = {name: column.take(order) for name, column in events.columns.items()}
    return Events(columns, events.stamps.take(order)), time.perf_counter() - started


def _cost(plan: ViewPlan, events: Events, reading_s: float) -> dict[str, Any]:
    total = len(events.stamps.sequences)
    entities, codes = entity_codes(plan.entity, events.columns)
    middle = max(0, total - SAMPLE_ROWS) // 2
    _, before = np.unique(codes[:middle][::-1], return_index=True)
    before = np.sort(middle - 1 - before)[-SAMPLE_ROWS:]  # the newest of each entity
    timed = np.arange(middle, min(total, middle + SAMPLE_ROWS))
    chosen, whole = _whole_entities(codes, len(entities))
    with _scratch() as store:
        _apply(store, plan, events, before)
        started = time.perf_counter()
        _apply(store, plan, events, timed)
        seconds = time.perf_counter() - started
    with _scratch() as store:
        empty_bytes = store.environment.usage().used_bytes
        _apply(store, plan, events, whole)
        size_bytes = store.environment.usage().used_bytes - empty_bytes
    return {
        "events": total,
        "entities": len(entities),
        "seconds": reading_s + seconds * total / max(1, len(timed)),
        "bytes": round(size_bytes * len(entities) / max(1, chosen)),
    }


def _whole_entities(codes: Rows, entities: int) -> tuple[int, Rows]:
    """Return how many entities were chosen by lot, and the rows of all their events.

    As many as have `SAMPLE_ROWS` together, at least one; of a single one with more, its newest.
    """
    counts = np.bincount(codes[codes >= 0], minlength=entities)
    lot = np.random.default_rng(entities).permutation(entities)
    chosen = lot[: max(1, int(np.searchsorted(np.cumsum(counts[lot]), SAMPLE_ROWS, "right")))]
    is_chosen = np.zeros(entities + 1, np.bool_)  # the last one is that of rows without a key
    is_chosen[chosen] = True
    return len(chosen), np.flatnonzero(is_chosen[codes])[-SAMPLE_ROWS:]


class _Store(NamedTuple):
    environment: Environment
    writer: Writer


def _apply(store: _Store, plan: ViewPlan, events: Events, rows: Rows) -> None:
    """Apply some events and commit, by the way that blocks of a backfill take."""
    message = encode_columns({name: column.take(rows) for name, column in events.columns.items()})
    store.writer.write_blocking(
        partial(
            apply_batch,
            views=[plan],
            columns=decode_columns(message),
            stamps=events.stamps.take(rows),
            newest_known_us=int(events.stamps.known_us.max(initial=0)),
        )
    )


@contextmanager
def _scratch() -> Iterator[_Store]:
    with (
        tempfile.TemporaryDirectory(prefix="mlpd-cost-") as directory,
        Environment.open(directory, clock=system_clock) as environment,
    ):
        writer = Writer(environment)
        try:
            yield _Store(environment, writer)
        finally:
            writer.close()
