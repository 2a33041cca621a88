"""All of a daemon that writes to disk, without the daemon: events, features, segments, models."""

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mlpd.core.config import PluginsConfig
from mlpd.core.names import TimeUs
from mlpd.core.time import DAY_US, MINUTE_US, system_clock
from mlpd.daemon.definitions import DefinitionsVerb, EventBlock
from mlpd.daemon.dropped import DroppedViews
from mlpd.daemon.erase import Erase
from mlpd.daemon.erase_child import rewrite
from mlpd.daemon.expire import Expire
from mlpd.daemon.expire_child import rewrite as expire_rewrite
from mlpd.daemon.ingest import Ingest, Ingested
from mlpd.daemon.offline import Offline
from mlpd.daemon.ownership import Ownership
from mlpd.daemon.pins import Pins
from mlpd.daemon.prediction_files import PredictionFiles
from mlpd.daemon.predictions import PredictionLog
from mlpd.daemon.read import Read
from mlpd.daemon.state import CatalogState
from mlpd.features.catalog import Catalog, ViewPlan
from mlpd.features.ingest import apply_batch, parse_batch
from mlpd.features.kernels import load_feature_kernels
from mlpd.features.stamps import Stamps
from mlpd.monitoring.freshness import Freshness
from mlpd.monitoring.metrics import Registry as Metrics
from mlpd.monitoring.violations import Violations
from mlpd.registry.models import Registry
from mlpd.registry.records import Cause
from mlpd.storage.compact import compact
from mlpd.storage.compactor import CompactionPolicy, Compactor
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory, make_dirs
from mlpd.storage.map_store import FileMapStore
from mlpd.storage.merge import merge
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

Tell = Callable[[dict[str, Any]], None]
"""Takes what was acknowledged, the moment it was."""

BY = Cause("tester")
MAP_BYTES = 256 << 20
USERS = 7


def user_of(n: int) -> str:
    """Return the user of event `n`: long enough that no time or float holds its name by chance."""
    return f"user-{n % USERS}"


BLOCK_ROWS = 100
"""Rows of a block when a new view is built: small, so that it takes several transactions."""

DOCUMENT: dict[str, Any] = {
    "format": 1,
    "entities": {"user": {"keys": {"user": "string"}}},
    "sources": {
        "clicks": {
            "timestamp": "at",
            "schema": {"user": "string", "x": "float64", "n": "int64", "text": "string"},
        }
    },
    "views": {
        "load": {
            "kind": "window",
            "entity": "user",
            "source": "clicks",
            "windows": ["6h", "30d"],
            "aggregates": [
                {"name": "count", "function": "count", "input": None},
                {"name": "sum", "function": "sum", "input": "x"},
                {"name": "mean", "function": "mean", "input": "x"},
                {"name": "max", "function": "max", "input": "n"},
            ],
        },
        "last": {
            "kind": "latest",
            "entity": "user",
            "source": "clicks",
            "features": ["x", "n", "text"],
        },
    },
    "services": {
        "s": {
            "features": [
                *(f"load.{a}_{w}" for a in ("count", "sum", "mean", "max") for w in ("6h", "30d")),
                *(f"last.{f}" for f in ("x", "n", "text")),
            ]
        }
    },
}

LATER: dict[str, Any] = {
    **DOCUMENT,
    "views": {**DOCUMENT["views"], "late": {**DOCUMENT["views"]["load"], "windows": ["2d"]}},
    "services": {
        **DOCUMENT["services"],
        "later": {"features": ["late.count_2d", "late.sum_2d", "late.mean_2d"]},
    },
}
"""The same and a view that is built from the log when it comes."""

ERASABLE: dict[str, Any] = {
    **DOCUMENT,
    "entities": {**DOCUMENT["entities"], "note": {"keys": {"text": "string"}}},
    "views": {
        **DOCUMENT["views"],
        "noted": {
            "kind": "latest",
            "entity": "note",
            "source": "clicks",
            "features": ["x", "user"],
        },
    },
}
"""The same and a view of another entity, which an erasure builds anew."""


def expiring(now_us: int) -> dict[str, Any]:
    """Return latest values of a source that lets go what is older than 18:00 two days ago (UTC).

    A file holds a day and is written anew if half of it goes: a cut that went by the time of day
    would touch another number of files before noon than after it.
    """
    retention_us = now_us % DAY_US + DAY_US + DAY_US // 4
    return {
        **DOCUMENT,
        "sources": {"clicks": {**DOCUMENT["sources"]["clicks"], "retention": f"{retention_us}us"}},
        "views": {"last": DOCUMENT["views"]["last"]},
        "services": {"s": {"features": [f"last.{f}" for f in ("x", "n", "text")]}},
    }


LINEAGE: dict[str, Any] = {
    "service": "s",
    "service_hash": "ab" * 16,
    "definitions_hash": "cd" * 16,
    "spine": {"source": "clicks", "time": "at", "filter": None},
    "label": "x > 1",
    "mode": "as_known",
    "as_of_us": 1_380_585_600_000_000,
    "as_of_sequence": 1,
    "rows": 3,
    "row_set_digest": "sha256:" + "0" * 64,
    "columns": ["x"],
    "dtypes": {"x": "float64"},
    "categorical": [],
    "split": {"train": 2, "valid": 1, "test": 0},
    "trainer": "lightgbm",
    "params": {"num_threads": 2},
    "best_iteration": 41,
    "tree_digest": "sha256:" + "1" * 64,
    "metrics": {"auc": 0.75},
    "packages": {"lightgbm": "4.7.0"},
}


def row_of(n: int, start_us: int) -> dict[str, Any]:
    """Return event number `n`: everything in it follows from its number."""
    text = hashlib.sha256(b"%d" % n).hexdigest() * (n % 5)
    at = start_us - (n * 7919) % (3 * DAY_US // MINUTE_US) * MINUTE_US
    return {"at": at, "user": user_of(n), "x": n * 0.37, "n": n, "text": text}


class InProcess(Compactor):
    """Compacts in this process, so that whatever happens to it happens to compaction."""

    async def _run_child(self, through: int) -> bytes:
        rows_max = self._policy.rows_max
        segments = self._data.segments
        call = partial(compact, self._environment, segments, through=through, rows_max=rows_max)
        manifest = await asyncio.to_thread(call)
        return manifest.encode()

    async def _run_merge(self, first: int, last: int) -> bytes:
        manifest = await asyncio.to_thread(
            merge, self._environment, self._data.segments, first, last
        )
        return manifest.encode()


class InProcessDefinitions(DefinitionsVerb):
    """Reads history for a new view in this process."""

    async def _replay(
        self, catalog: Catalog, source: str, views: Sequence[ViewPlan], through: int
    ) -> None:
        offline = Offline(self._paths, self._environment, catalog, through)
        schema = catalog.definitions.source(source).schema
        events = await asyncio.to_thread(offline.events, source, tuple(schema))
        for start in range(0, len(events.stamps.sequences), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            columns = {name: column.take(part) for name, column in events.columns.items()}
            stamps = Stamps(*(stamp[part] for stamp in events.stamps))
            block = EventBlock(columns, stamps)
            await self._writer.write(partial(apply_block, views=views, block=block))


class InProcessErase(Erase):
    """Writes segments anew in this process."""

    async def _run_child(self, request: dict[str, Any]) -> dict[str, Any]:
        return await asyncio.to_thread(rewrite, self._environment, self._paths, request)


class InProcessExpire(Expire):
    """Writes segments anew in this process, two days ahead: all that is there is old by then."""

    async def _run_child(self, request: dict[str, Any]) -> list[bytes]:
        return await asyncio.to_thread(expire_rewrite, self._environment, self._paths, request)


def in_two_days() -> TimeUs:
    return TimeUs(system_clock() + 2 * DAY_US)


def apply_block(txn: WriteTransaction, *, views: Sequence[ViewPlan], block: EventBlock) -> None:
    apply_batch(txn, views, block.columns, block.stamps, txn.newest_known_us)


class Store:
    """An opened data directory; opening does what the daemon's start does."""

    def __init__(self, root: Path, *, in_process: bool = True, rows_max: int = 500_000) -> None:
        self.data = DataDirectory(root)
        make_dirs(root)
        self.environment = Environment.open(self.data.lmdb, clock=system_clock, map_bytes=MAP_BYTES)
        self.writer = Writer(self.environment)
        try:
            self._build(InProcess if in_process else Compactor, rows_max)
        except BaseException:
            self.close()
            raise

    def _build(self, compactor: type[Compactor], rows_max: int) -> None:
        kernels = load_feature_kernels()
        self.state = CatalogState(kernels, self.data.cache / "kernels")
        with self.environment.snapshot() as snapshot:
            self.state.load(snapshot)
        self.registry = Registry.open(self.environment, self.writer, self.data.registry)
        policy = CompactionPolicy(rows_max=rows_max)
        self.compactor = compactor(self.environment, self.writer, self.data, policy=policy)
        dropped = DroppedViews(self.environment, self.writer, self.state)
        pins = Pins(self.environment, self.registry)
        self.ownership = Ownership(FileMapStore(self.data.root), self.writer, self.state)
        self.definitions = InProcessDefinitions(
            *(self.environment, self.writer, self.state, self.compactor, dropped, pins),
            *(PluginsConfig(), self.ownership, self.data),
        )
        log = PredictionLog(self.writer, 1)
        files = PredictionFiles(
            *(self.environment, self.writer, log, self.compactor, self.data), 1_000, system_clock
        )
        self.erase = InProcessErase(
            *(self.environment, self.writer, self.state, self.definitions, self.compactor),
            *(dropped, log, files, self.data, system_clock),
        )
        self.expire = InProcessExpire(
            *(self.environment, self.writer, self.state, self.definitions, self.compactor),
            *(PredictionLog(self.writer, 1), self.data, in_two_days),
        )
        self.ingest = Ingest(
            self.writer, self.state, Freshness(Metrics()), Violations(), self.ownership
        )
        self.read = Read(self.environment, self.state, self.ownership)

    def close(self) -> None:
        self.writer.close()
        self.environment.close()

    async def apply(self, tell: Tell, document: dict[str, Any] = DOCUMENT) -> None:
        await self.definitions.apply(document)
        tell({"applied": self.state.catalog.version})

    async def send(self, numbers: list[int], start_us: int, tell: Tell) -> Ingested:
        """Send events as one batch under a key of its own and tell that they are acknowledged."""
        source = self.state.catalog.definitions.source("clicks")
        rows = [row_of(n, start_us) for n in numbers]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        batch = parse_batch(source, columns, now_us=system_clock())
        done = await self.ingest.ingest([batch], f"batch {numbers[0]}")
        tell({"sent": numbers, "sequence": done.sequence})
        return done

    async def register(self, seed: int, tell: Tell) -> None:
        """Publish a model version and make it champion."""
        files: dict[str, bytes | Path] = {"model.onnx": b"model %d" % seed * 300}
        version = await self.registry.register("clf", files, {**LINEAGE, "seed": seed}, BY)
        tell({"registered": version.number})
        await self.registry.move_alias("clf", "champion", version.number, BY, expected="any")
        tell({"champion": version.number})


@contextmanager
def opened(root: Path, **options: Any) -> Iterator[Store]:
    store = Store(root, **options)
    try:
        yield store
    finally:
        store.close()


def teller(path: str) -> Tell:
    """Return what appends to a file of lines; one write per line."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    return lambda fact: (os.write(descriptor, json.dumps(fact).encode() + b"\n"), None)[1]


def batches(first: int, count: int, most: int = 30) -> Iterable[list[int]]:
    """Yield `count` batches of 1 to `most` events, numbered from `first` on."""
    for i in range(count):
        size = 1 + (first + i * 11) % most
        yield list(range(first, first + size))
        first += size
