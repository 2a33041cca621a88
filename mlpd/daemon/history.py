"""Verb history: a point-in-time join over all acknowledged events, in a child process."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Literal

from mlpd.core.closure import build_closure
from mlpd.core.columns import Columns, DType, encode_columns, height
from mlpd.core.errors import InternalError, TooLargeError, ValidationError
from mlpd.core.specs import Closure, ServiceSpec
from mlpd.daemon.history_child import EVENT_TIME, SEQUENCE
from mlpd.daemon.offline import offline_request
from mlpd.daemon.process import Child
from mlpd.daemon.state import CatalogState
from mlpd.features.assemble import check_given
from mlpd.features.on_stale import OnStale
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory

SPINE_ROWS_MAX = 2_000_000
JOINS_MAX = 2
"""Joins at once; each is a process with the history of some sources in memory."""

Mode = Literal["as_known", "as_corrected", "as_of_sequence"]
MODES = ("as_known", "as_corrected", "as_of_sequence")


class History:
    """Answers spines; one instance per daemon."""

    def __init__(self, environment: Environment, state: CatalogState, paths: DataDirectory) -> None:
        self._environment = environment
        self._state = state
        self._paths = paths
        self._slots = asyncio.Semaphore(JOINS_MAX)

    async def join(
        self,
        spine: Columns,
        *,
        service: str | None = None,
        features: Sequence[str] = (),
        request: Mapping[str, DType] | None = None,
        mode: Mode = "as_known",
        statuses: bool = False,
        on_stale: OnStale = "null",
    ) -> bytes:
        """Return the spine's columns and the features as an Arrow IPC stream.

        `spine`: `event_time` (timestamp), key columns, request fields and, for `as_of_sequence`,
        `sequence` (int64).  `on_stale`: what a value older than its ttl becomes;
        ConflictError(code="stale_feature") for "error".  Every event acknowledged before the call
        counts.
        """
        self._check(spine, service, features, request or {}, mode)
        with self._environment.snapshot() as snapshot:
            through = snapshot.sequence
            catalog = self._state.read_catalog(snapshot)
        message = {
            **offline_request(self._paths, catalog, through),
            "spine": await asyncio.to_thread(encode_columns, spine),
            "service": service,
            "features": list(features),
            "request": {name: str(dtype) for name, dtype in (request or {}).items()},
            "mode": mode,
            "statuses": statuses,
            "on_stale": on_stale,
        }
        async with self._slots, Child("history", message) as child:
            async for part in child.messages():
                if part["kind"] == "arrow":
                    data: bytes = part["data"]
                    return data
        raise InternalError("the join gave no answer")

    def closure(
        self, service: str | None, features: Sequence[str], request: Mapping[str, DType]
    ) -> Closure:
        """Return what the spine must bring; raises for an unknown service or feature."""
        definitions = self._state.catalog.definitions
        if service is not None:
            return build_closure(definitions, definitions.service(service))
        return build_closure(definitions, ServiceSpec("features", tuple(features), request))

    def _check(
        self,
        spine: Columns,
        service: str | None,
        features: Sequence[str],
        request: Mapping[str, DType],
        mode: str,
    ) -> None:
        if height(spine) > SPINE_ROWS_MAX:
            raise TooLargeError(
                f"the spine has {height(spine)} rows; the limit is {SPINE_ROWS_MAX}",
                code="spine_too_large",
                hint="Send it in parts.",
            )
        if mode not in MODES:
            raise ValidationError(
                f"mode {mode!r} is unknown", code="unknown_mode", hint=f"Known: {', '.join(MODES)}."
            )
        if EVENT_TIME not in spine or spine[EVENT_TIME].dtype is not DType.TIMESTAMP:
            raise ValidationError(
                "the spine needs the timestamp column 'event_time'", code="missing_timestamp"
            )
        if (mode == "as_of_sequence") != (SEQUENCE in spine):
            raise ValidationError(
                "the spine brings the int64 column 'sequence' with as_of_sequence, and only then",
                code="missing_sequence",
            )
        check_given(self.closure(service, features, request), spine)
