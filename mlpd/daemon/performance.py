"""Verb performance: a model's labelled predictions judged in a child, by day and by slice."""

import asyncio
import json
import time
from typing import Any

from mlpd.core.errors import MlpdError, NotFoundError, ValidationError
from mlpd.core.time import MAX_TIME_US, MIN_TIME_US, Clock, format_time
from mlpd.daemon.predictions import PredictionLog
from mlpd.daemon.process import Child
from mlpd.registry.models import Registry
from mlpd.registry.records import ModelVersion
from mlpd.storage.files import DataDirectory
from mlpd.storage.writer import Writer

CALIBRATION_FILE = "calibration.json"


class Analysis:
    """Joins predictions and labels; one child at a time, others wait."""

    def __init__(
        self,
        writer: Writer,
        registry: Registry,
        log: PredictionLog,
        paths: DataDirectory,
        clock: Clock,
    ) -> None:
        self._writer = writer
        self._registry = registry
        self._log = log
        self._paths = paths
        self._clock = clock
        self._lock = asyncio.Lock()

    async def run(
        self,
        model: str,
        *,
        by: str | None = None,
        start_us: int | None = None,
        end_us: int | None = None,
    ) -> dict[str, Any]:
        """Return realized and estimated performance of predictions made in [start, end).

        `by`: a key, request field or feature to slice by.  Reads the whole prediction log: 5 us a
        row of it in the child.  Raises NotFoundError(code="unknown_model"), ValidationError(code=
        "unknown_slice") where no row of any version has it.
        """
        start_us = MIN_TIME_US if start_us is None else start_us
        end_us = MAX_TIME_US if end_us is None else end_us
        if start_us >= end_us:
            raise ValidationError("'start' must lie before 'end'", code="empty_window")
        if model not in {known.name for known in self._registry.models()}:
            raise NotFoundError(f"unknown model {model!r}", code="unknown_model")
        started = time.monotonic()
        async with self._lock:
            self._log.flush()
            await self._writer.write(lambda _: None)  # what was flushed is stored now
            request = {
                "directory": str(self._paths.root),
                "model": model,
                "start_us": start_us,
                "end_us": end_us,
                "now_us": self._clock(),
                "versions": await self._versions(model, by),
            }
            async with Child("performance", request) as child:
                found: dict[str, Any] = await child.result()
        if by is not None and found["versions"] and not any(v["slices"] for v in found["versions"]):
            raise ValidationError(
                f"{model!r} can't be sliced by {by!r}: no row has it",
                code="unknown_slice",
                hint="Name an entity key, a request field or a feature of the model's service.",
            )
        took_s = time.monotonic() - started
        at = format_time(self._clock())
        return {"model": model, "at": at, "took_s": took_s, "by": by, **found}

    async def _versions(self, model: str, by: str | None) -> dict[str, Any]:
        """Return by number what the child needs of each version that can be read."""
        return {
            str(version.number): {
                "calibration": await self._load(version, CALIBRATION_FILE),
                "slice": None if by is None else await self._slice(version, by),
            }
            for version in self._registry.versions(model)
            if not version.is_deleted
        }

    async def _slice(self, version: ModelVersion, by: str) -> dict[str, Any] | None:
        encoder = await self._load(version, "encoder.json")
        profile = await self._load(version, "profile.json")
        if encoder is None or profile is None:
            return None
        return {"name": by, "encoder": encoder, "profile": profile}

    async def _load(self, version: ModelVersion, file: str) -> Any:
        """Return a JSON file of a version; None if it has none or is quarantined or damaged."""
        try:
            data = await self._registry.load_file(version.name, version.number, file)
        except MlpdError:
            return None
        return json.loads(data)
