"""Verb audit: is what was served what the log says?  Recomputed in a child, bit for bit.

On demand for all that is logged, and continuously: a sample of what was served since the last time,
as often as its share of a processor allows.
"""

import asyncio
import json
import logging
import secrets
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mlpd.core.config import MonitoringConfig
from mlpd.core.errors import MlpdError
from mlpd.core.time import Clock, format_time
from mlpd.daemon.gathering import Gathering
from mlpd.daemon.offline import offline_request
from mlpd.daemon.parts import Parts
from mlpd.daemon.peers import together
from mlpd.daemon.predictions import PredictionLog
from mlpd.daemon.process import Child
from mlpd.daemon.state import CatalogState
from mlpd.features.catalog import Catalog
from mlpd.monitoring.consistency import MISMATCHES_MAX
from mlpd.registry.models import Registry
from mlpd.registry.origin import Origin
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.tables import Table
from mlpd.storage.writer import Writer

RUN_S = 900.0
"""What audits of other members may take."""
_NICE = 15
_SUMS = (
    *("rows_compared", "values_compared", "mismatched_rows", "mismatches"),
    *("unavailable", "cpu_s"),
)
_log = logging.getLogger("mlpd.audit")


class Audit:
    """Runs the consistency audit and keeps what the last one found; one at a time."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        state: CatalogState,
        registry: Registry,
        log: PredictionLog,
        paths: DataDirectory,
        config: MonitoringConfig,
        parts: Parts,
        gathering: Gathering,
        clock: Clock,
    ) -> None:
        self._parts = parts
        self._gathering = gathering
        parts.offer("audit", self._give_last)
        parts.offer("audit_run", lambda asked: self.run(asked["limit"]), limit=int | None)
        self._config = config
        self._environment = environment
        self._writer = writer
        self._state = state
        self._registry = registry
        self._log = log
        self._paths = paths
        self._clock = clock
        self._lock = asyncio.Lock()
        self._last: dict[str, Any] | None = None
        self._task: asyncio.Task[None] | None = None
        self._turn = 0
        self._until_us = 0
        self.cpu_s = 0.0
        """Processor time that continuous audits took since the start."""
        self.rows = {"match": 0, "mismatch": 0, "unavailable": 0}

    def last(self) -> dict[str, Any] | None:
        """Return what the last audit since the start found, or None."""
        return self._last

    async def last_of_all(self) -> dict[str, Any] | None:
        """Return what the last audits of all members found, added up; None before the first."""
        others = await self._parts.others("audit", {})
        found = [part for part in (self._last, *others) if part is not None]
        return merge_audits(found) if found else None

    async def run_on_all(self, limit: int | None = None) -> dict[str, Any]:
        """Recompute logged predictions of all members, up to `limit` of each, at once."""
        asked = self._parts.others("audit_run", {"limit": limit}, timeout_s=RUN_S)
        found = await together(self._runs(limit), asked)
        return merge_audits([audit for part in found for audit in part])

    async def _runs(self, limit: int | None) -> list[dict[str, Any]]:
        return [await self.run(limit)]

    def start(self) -> None:
        """Begin to audit what is served from now on."""
        self._until_us = self._clock()
        self._task = asyncio.create_task(self._audit_forever())

    async def stop(self) -> None:
        """Stop; an audit under way ends with its child."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def run_window(self) -> dict[str, Any] | None:
        """Audit a sample of what was logged since the last window; None if nothing was.

        At most `audit_rows` rows, of whole units, others in every window.
        """
        self._log.flush()
        to_us = await self._writer.write(lambda txn: txn.known_us + 1)  # it and what was flushed
        from_us, self._until_us = self._until_us, to_us
        if not self._has_served(from_us, to_us):
            return None
        window = {
            "from_us": from_us,
            "to_us": to_us,
            "rows_max": self._config.audit_rows,
            "turn": self._turn,
        }
        self._turn += 1
        found = await self._run({"limit": None, "window": window})
        self.cpu_s += found["cpu_s"]
        return found

    async def run(self, limit: int | None = None) -> dict[str, Any]:
        """Recompute up to `limit` logged predictions (None: all) and compare every value."""
        return await self._run({"limit": limit, "window": None})

    async def _give_last(self, _: Mapping[str, Any]) -> dict[str, Any] | None:
        return self._last

    async def _run(self, asked: dict[str, Any]) -> dict[str, Any]:
        async with self._lock:
            self._log.flush()
            await self._writer.write(lambda _: None)  # what was flushed is stored now
            with self._environment.snapshot() as snapshot:
                through = snapshot.sequence
                catalog = self._state.read_catalog(snapshot)
            request = {
                **offline_request(self._paths, catalog, through),
                **asked,
                "versions": await self._versions(catalog),
                "others": None,
            }
            found = await _compare(request)
            elsewhere, window = found.pop("elsewhere"), asked["window"]
            if window is not None:
                found["unavailable"] += elsewhere["rows"]
            elif elsewhere["rows"]:
                more = await self._compare_elsewhere(catalog, request, elsewhere["logs"])
                found = _add(found, more)
            self._last = {
                **found,
                "window": window and [format_time(window[at]) for at in ("from_us", "to_us")],
                "at": format_time(self._clock()),
            }
            self.rows["mismatch"] += found["mismatched_rows"]
            self.rows["match"] += found["rows_compared"] - found["mismatched_rows"]
            self.rows["unavailable"] += found["unavailable"]
            return self._last

    async def _compare_elsewhere(
        self, catalog: Catalog, request: Mapping[str, Any], logs: Mapping[str, Sequence[str]]
    ) -> dict[str, Any]:
        """Compare the rows that brought values of other shards, with what their logs say."""
        folder = self._paths.joins / f"audit-{secrets.token_hex(8)}"
        try:
            others = await self._gathering.fetch_logs(catalog, logs, folder)
            return await _compare({**request, "others": others})
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def _has_served(self, from_us: int, to_us: int) -> bool:
        start, stop = (time_us.to_bytes(8, "big") for time_us in (from_us, to_us))
        with self._environment.snapshot() as snapshot:
            return next(iter(snapshot.scan(Table.SERVED, start, stop)), None) is not None

    async def _audit_forever(self) -> None:
        """Audit once an interval, and more seldom where that took more than its share."""
        pause_s = every_s = self._config.audit_us / 1e6
        while True:
            await asyncio.sleep(pause_s)
            pause_s = every_s
            try:
                found = await self.run_window()
            except Exception:  # noqa: BLE001 - the next window is audited all the same
                _log.exception("what was served could not be audited")
                continue
            if found is not None:
                pause_s = max(every_s, found["cpu_s"] / self._config.audit_cpu_share)
            if found is not None and found["mismatches"]:
                _log.error("served features differ from the log: %s", found["by_feature"])

    async def _versions(self, catalog: Catalog) -> dict[str, Any]:
        """Return encoder and service of every version that can be read.

        With the definitions that it was trained on, where its version of the service doesn't run.
        """
        found = {}
        for model in self._registry.models():
            for version in self._registry.versions(model.name):
                if version.is_deleted:
                    continue
                try:
                    encoder = await self._registry.load_file(
                        model.name, version.number, "encoder.json"
                    )
                    lineage = await self._registry.load_lineage(model.name, version.number)
                except MlpdError:
                    continue  # quarantined or damaged: its rows count as unavailable
                if isinstance(lineage, Origin):
                    continue  # has no features to recompute
                running = catalog.find_closure(lineage.service, lineage.service_hash)
                found[version.reference] = {
                    "encoder": json.loads(encoder),
                    "service": lineage.service,
                    "service_hash": lineage.service_hash,
                    "definitions": None if running else lineage.definitions,
                }
        return found


async def _compare(request: Mapping[str, Any]) -> dict[str, Any]:
    async with Child("audit", request, nice=_NICE) as child:
        found: dict[str, Any] = await child.result()
        return found


def _add(found: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two comparisons of other rows found."""
    return {
        **found,
        **{name: found[name] + more[name] for name in _SUMS},
        "by_feature": dict(Counter(found["by_feature"]) + Counter(more["by_feature"])),
        "examples": [*found["examples"], *more["examples"]][:MISMATCHES_MAX],
    }


def merge_audits(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return several audits as one: counts are sums, the window is all of theirs, `at` the last."""
    windows = [audit["window"] for audit in found if audit["window"]]
    by_feature: Counter[str] = Counter()
    for audit in found:
        by_feature.update(audit["by_feature"])
    served = [audit["served"] for audit in found]
    examples = [example for audit in found for example in audit["examples"]]
    starts, ends = ([window[end] for window in windows] for end in (0, 1))
    return {
        **found[0],
        **{name: sum(audit[name] for audit in found) for name in _SUMS},
        "served": None if None in served else sum(served),
        "by_feature": dict(by_feature),
        "examples": examples[:MISMATCHES_MAX],
        "window": [min(starts), max(ends)] if len(windows) == len(found) else None,
        "at": max(audit["at"] for audit in found),
    }
