"""Verb explain: what each feature contributed to served scores, computed in a child process.

The prediction is over by then, and logged: explaining takes nothing from others but a core, and
when it fails the caller may ask again.
"""

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from mlpd.core.deadlines import check_deadline
from mlpd.core.errors import ConflictError, NotFoundError, OverloadedError, TooLargeError
from mlpd.core.vector import Vectorizer
from mlpd.daemon.process import Child
from mlpd.registry.models import Registry

EXPLAIN_ROWS_MAX = 1_000
"""Rows of one request: about a second for 200 trees of 63 leaves."""
WAITING_MAX = 8
"""Explanations that wait or run; one runs at a time."""
RETRY_AFTER_S = 2.0


class Explain:
    """Explains answers of predictions; one instance per daemon, on the loop."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._slot = asyncio.Semaphore(1)
        self._waiting = 0

    @contextmanager
    def place(self, rows: int) -> Iterator[None]:
        """Hold a place for an explanation of so many rows inside the block.

        To be taken before predicting, so that nothing is served in vain.  Raises TooLargeError, or
        OverloadedError(code="explain_queue_full").
        """
        if rows > EXPLAIN_ROWS_MAX:
            raise TooLargeError(
                f"{rows} rows to explain; the limit is {EXPLAIN_ROWS_MAX}",
                code="too_many_rows",
                hint="Explain fewer at a time, or predict without explain.",
            )
        if self._waiting >= WAITING_MAX:
            raise OverloadedError(
                f"{self._waiting} explanations wait already",
                code="explain_queue_full",
                hint="Try again later, or predict without explain.",
                details={"retry_after_s": RETRY_AFTER_S},
            )
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    async def add_to(self, rows: Sequence[dict[str, Any]], deadline_s: float | None) -> None:
        """Add `raw_score`, `base` and `contributions` by feature to answered rows with vectors.

        base and contributions sum to raw_score, up to rounding.  A row without a vector (a default
        score) gets null for all three.  Takes a second or so: a process that imports LightGBM.
        Raises ConflictError(code="not_explainable") for a version without LightGBM's model.
        """
        by_version: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for row in rows:
            row |= {"raw_score": None, "base": None, "contributions": None}
            if row["vector"] is not None:
                by_version.setdefault((row["model"], row["version"]), []).append(row)
        if not by_version:
            return
        async with self._slot:
            check_deadline(deadline_s, "its turn to be explained came")
            await self._explain(by_version)

    async def _explain(self, by_version: Mapping[tuple[str, int], list[dict[str, Any]]]) -> None:
        parts, names = [], []
        for (model, version), rows in by_version.items():
            text, encoder = await self._files(model, version)
            parts.append(await asyncio.to_thread(_part, text, rows))
            names.append(await asyncio.to_thread(_names, encoder))
        async with Child("explain", {"parts": parts}) as child:
            waiting = iter(zip(by_version.values(), names, strict=True))
            async for message in child.messages():
                if message["kind"] == "contributions":
                    await asyncio.to_thread(_put, *next(waiting), message)

    async def _files(self, model: str, version: int) -> tuple[bytes, bytes]:
        try:
            return (
                await self._registry.load_file(model, version, "model.txt"),
                await self._registry.load_file(model, version, "encoder.json"),
            )
        except NotFoundError:
            raise ConflictError(
                f"{model}@{version} has no LightGBM model to explain it with",
                code="not_explainable",
                hint="Predict without explain.",
            ) from None


def _part(model_text: bytes, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    vectors = np.array([row["vector"] for row in rows], np.float64)
    return {
        "model_text": model_text.decode(),
        "vectors": vectors.tobytes(),
        "width": vectors.shape[1],
    }


def _names(encoder: bytes) -> tuple[str, ...]:
    return Vectorizer.from_dict(json.loads(encoder)).names


def _put(rows: list[dict[str, Any]], names: Sequence[str], found: Mapping[str, Any]) -> None:
    for i, row in enumerate(rows):
        row["raw_score"], row["base"] = found["raw_score"][i], found["base"][i]
        row["contributions"] = dict(zip(names, found["features"][i], strict=True))
