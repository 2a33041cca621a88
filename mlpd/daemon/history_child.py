"""Child entry `history`: a point-in-time join for a spine that a client sent."""

import io
from typing import Any

import numpy as np

from mlpd.core.closure import build_closure
from mlpd.core.columns import DType, decode_columns
from mlpd.core.errors import ValidationError
from mlpd.core.specs import ServiceSpec
from mlpd.daemon.child import Send
from mlpd.daemon.offline import open_offline
from mlpd.features.offline import Spine, join_history
from mlpd.features.on_stale import apply_on_stale
from mlpd.storage.frames import to_series

EVENT_TIME = "event_time"
SEQUENCE = "sequence"


def run(request: dict[str, Any], send: Send) -> int:
    """Send the joined frame as one Arrow IPC stream; returns its height.

    `spine`: encoded columns with `event_time`, the keys and request fields and, for
    `as_of_sequence`, `sequence`.  The result has the spine's columns, then the features.
    """
    import polars as pl  # noqa: PLC0415 - in the child alone

    spine = decode_columns(request["spine"])
    with open_offline(request) as offline:
        definitions = offline.catalog.definitions
        if request["service"] is not None:
            service = definitions.service(request["service"])
        else:
            fields = {name: DType(dtype) for name, dtype in request["request"].items()}
            service = ServiceSpec("features", tuple(request["features"]), fields)
        closure = build_closure(definitions, service)
        t_us = spine[EVENT_TIME].values
        if bool((~spine[EVENT_TIME].mask()).any()):
            raise ValidationError("a spine row has no event_time", code="missing_timestamp")
        sequences = spine[SEQUENCE].values if SEQUENCE in spine else None
        joined = join_history(
            offline.catalog,
            closure,
            Spine(spine, t_us, sequences),
            offline.events,
            mode=request["mode"],
            keep_stale=request["on_stale"] == "value",
        )
    apply_on_stale(joined, request["on_stale"])
    features = {n: c for n, c in joined.columns.items() if n not in spine}
    series = [to_series(name, column) for name, column in {**spine, **features}.items()]
    if request["statuses"]:
        series += [
            pl.Series(f"{name}__status", status.astype(np.uint8))
            for name, status in joined.statuses.items()
        ]
    buffer = io.BytesIO()
    pl.DataFrame(series).write_ipc_stream(buffer)
    send({"kind": "arrow", "data": buffer.getvalue()})
    return len(t_us)
