"""What one row costs a model, beside the champion, in the child that trained it."""

import time

import msgpack
import numpy as np
from numpy.typing import NDArray

from mlpd.serving.sessions import Session

Floats = NDArray[np.float64]

ROUNDS = 5
CALLS = 1_000
"""Of each model in each round: ten of them are slower than a p99."""
_WARM_UP = 50


def measure_latency(
    ours: Session, rows: Floats, champion: tuple[Session, Floats] | None = None
) -> dict[str, float]:
    """Return p50 and p99 of a row from vector to score in us; the champion's on its own rows.

    Processor time: the child gets what others leave of the processors, and how long it waits says
    nothing of the model.  The models take turns, and each figure is the median of five rounds:
    caches that others emptied hit both, and one round's bad luck neither.  About 0.1 s a model.
    """
    sides = [("", ours, rows)] + ([("champion_", *champion)] if champion else [])
    for _, session, some in sides:
        _time(session, some, _WARM_UP)
    rounds: list[dict[str, float]] = [
        {
            f"{side}p{share}_us": float(np.percentile(took, share))
            for side, session, some in sides
            for took in [_time(session, some, CALLS)]
            for share in (50, 99)
        }
        for _ in range(ROUNDS)
    ]
    return {name: float(np.median([found[name] for found in rounds])) for name in rounds[0]}


def golden_rows(golden: bytes) -> Floats:
    """Return the vectors float64 [n, F] in a version's golden.msgpack."""
    shape, data = msgpack.unpackb(golden)["features"]
    return np.frombuffer(data).reshape(shape)


def _time(session: Session, rows: Floats, calls: int) -> list[float]:
    """Return what each call took, in us, the rows one after the other."""
    alone = [np.ascontiguousarray(rows[i : i + 1]) for i in range(len(rows))]
    took = []
    for call in range(calls):
        row = alone[call % len(alone)]
        started_ns = time.thread_time_ns()  # sessions run on the thread that calls them
        session.score(session.run(row))
        took.append((time.thread_time_ns() - started_ns) / 1000)
    return took
