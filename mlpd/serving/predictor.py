"""One served version: session, batcher and counters behind `await served.predict(vectors)`."""

import time
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.serving.batcher import Batcher
from mlpd.serving.jobs import USUAL_PRIORITY
from mlpd.serving.package import ModelPackage, Tensors, rows_of
from mlpd.serving.sessions import Scores, Session


class ServedModel:
    """A loaded version that answers requests; all methods belong to the loop.

    Whoever holds it may use it: a version that was swapped out serves its last requests to the end.
    """

    __slots__ = ("__weakref__", "_batcher", "_trained", "session")

    def __init__(self, session: Session, batcher: Batcher) -> None:
        self.session: Final = session
        self._batcher: Final = batcher
        self._trained: Final = session.package.trained

    @property
    def package(self) -> ModelPackage:
        """What was loaded."""
        return self.session.package

    async def predict(
        self,
        vectors: NDArray[np.float64],
        *,
        deadline_s: float | None = None,
        priority: int = USUAL_PRIORITY,
    ) -> Scores:
        """Return raw scores and scores [n, K] of float64 [n, F]; deadline as `time.monotonic()`.

        Raises ValidationError for another shape or a user's ONNX file, and as `Batcher.predict`.
        """
        started_ns = time.perf_counter_ns()
        try:
            self._require(trained=True)
            scores = await self._batcher.predict(
                self.session, vectors, deadline_s=deadline_s, priority=priority
            )
        except Exception:
            self.session.statistics.record_failure(total_ns=time.perf_counter_ns() - started_ns)
            raise
        self._record_success(started_ns)
        return scores

    async def infer(
        self,
        inputs: Tensors,
        *,
        deadline_s: float | None = None,
        priority: int = USUAL_PRIORITY,
    ) -> dict[str, NDArray[Any]]:
        """Return the outputs of a user's ONNX file by name; raises as `Batcher.predict_named`."""
        started_ns = time.perf_counter_ns()
        try:
            self._require(trained=False)
            outputs = await self._batcher.predict_named(
                self.session, inputs, rows_of(inputs), deadline_s=deadline_s, priority=priority
            )
        except Exception:
            self.session.statistics.record_failure(total_ns=time.perf_counter_ns() - started_ns)
            raise
        self._record_success(started_ns)
        return outputs

    def _record_success(self, started_ns: int) -> None:
        self.session.statistics.record_success(
            total_ns=time.perf_counter_ns() - started_ns, now_ms=time.time_ns() // 1_000_000
        )

    def _require(self, *, trained: bool) -> None:
        if self._trained is trained:
            return
        takes = "named tensors, not a feature vector", "a feature vector, not named tensors"
        raise ValidationError(
            f"model {self.package.reference} takes {takes[self._trained]}",
            code="wrong_model_kind",
            hint="See the model's metadata for its inputs.",
        )
