"""One metric each: its name and rules; counters, gauges and histograms that are quick to feed."""

import re
import struct
import threading
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError

Kind = Literal["counter", "gauge", "histogram", "info", "mirrored"]
"""`mirrored` is a counter by another system's name, which need not end with `_total`."""

MAX_BUCKETS: Final = 14
"""Finite bounds of a histogram; `+Inf` comes on top."""
PENDING_OBSERVATIONS: Final = 4096
"""A histogram folds its pending values in at this many: 0.1 ms, and 17 ns for each value."""
LATENCY_BUCKETS_S: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0,
)  # fmt: skip

_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_SUFFIX: Final[dict[Kind, str]] = {
    "counter": "_total",
    "info": "_info",
    "gauge": "",
    "histogram": "",
    "mirrored": "",
}


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a family is: `name` as its samples carry it (a counter's ends with `_total`)."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    unit: str = ""

    def __post_init__(self) -> None:
        """Raise ValidationError on a name, label or unit that a scraper would refuse."""
        suffix = _SUFFIX[self.kind]
        if not _NAME.fullmatch(self.name) or not self.name.endswith(suffix):
            expected = f"letters, digits and '_', ending with {suffix!r}" if suffix else "[a-z0-9_]"
            raise ValidationError(f"{self.kind} name {self.name!r} is not {expected}")
        for label in self.labels:
            if not _NAME.fullmatch(label) or label.startswith("__") or label == "le":
                raise ValidationError(f"{self.name}: label name {label!r} is reserved or malformed")
        if self.unit and not self.base_name.endswith("_" + self.unit):
            raise ValidationError(f"{self.name}: the name must carry its unit {self.unit!r}")

    @property
    def base_name(self) -> str:
        """The family's name in OpenMetrics: without `_total` or `_info`."""
        return self.name.removesuffix(_SUFFIX[self.kind])


@dataclass(frozen=True, slots=True)
class HistogramSnapshot:
    """One histogram's state: `counts` per bucket (not cumulative), the last one for +Inf."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        """How many values were observed."""
        return sum(self.counts)


class Exemplar(NamedTuple):
    """One observation of a bucket whose trace can be looked up; `time_s` is Unix time."""

    trace_id: str
    value: float
    time_s: float


class Counter:
    """A sum that only grows.  Any thread: `value += x` has no switch point under the GIL."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        """Add `amount` >= 0 (not checked: this is the hot path).  45 ns."""
        self.value += amount


class Gauge:
    """A value that goes up and down; any thread."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def set(self, value: float) -> None:
        """Replace the value."""
        self.value = value

    def inc(self, amount: float = 1.0) -> None:
        """Add `amount`, which may be negative."""
        self.value += amount


class Histogram:
    """A classic histogram over ascending `bounds` (a value equal to a bound is inside it).

    Observing appends to a list; the list is folded into the counts by numpy when it is full or
    when somebody looks.  Any thread may observe, any thread may look.
    """

    __slots__ = ("_bounds", "_counts", "_edges", "_exemplars", "_lock", "_pending", "_sum")

    def __init__(self, bounds: Sequence[float] = LATENCY_BUCKETS_S) -> None:
        self._bounds = tuple(map(float, bounds))
        self._edges = np.asarray(bounds, dtype=np.float64)
        if not 0 < len(bounds) <= MAX_BUCKETS or not np.all(np.diff(self._edges) > 0):
            raise ValidationError(f"histogram bounds must be 1 to {MAX_BUCKETS} ascending numbers")
        self._counts: NDArray[np.int64] = np.zeros(len(bounds) + 1, dtype=np.int64)
        self._sum = 0.0
        self._exemplars: dict[int, Exemplar] = {}
        self._pending: list[float] = []
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        """Count one finite value.  83 ns, folding included; see `python -m bench metrics`."""
        pending = self._pending
        pending.append(value)
        if len(pending) >= PENDING_OBSERVATIONS:
            self._fold()

    def observe_traced(self, value: float, trace_id: str, time_s: float) -> None:
        """Count one finite value as the newest example of its bucket; 0.5 us."""
        self.observe(value)
        at = bisect_left(self._bounds, value)
        self._exemplars[at] = Exemplar(trace_id, value, time_s)

    def exemplars(self) -> dict[int, Exemplar]:
        """Return the newest example of each bucket that has one, by the bucket's number."""
        return dict(self._exemplars)

    def observe_many(self, values: NDArray[np.float64]) -> None:
        """Count each finite value of a float64 array of any shape."""
        with self._lock:
            self._add(values.ravel())

    def snapshot(self) -> HistogramSnapshot:
        """Return the state with everything observed so far."""
        self._fold()
        with self._lock:
            return HistogramSnapshot(self._bounds, tuple(self._counts.tolist()), self._sum)

    def _fold(self) -> None:
        with self._lock:
            batch = self._pending[:]
            del self._pending[: len(batch)]  # what was appended meanwhile stays
            if batch:
                self._add(_pack(batch))

    def _add(self, values: NDArray[np.float64]) -> None:
        slots = self._edges.searchsorted(values, side="left")
        self._counts += np.bincount(slots, minlength=len(self._counts))
        self._sum += float(values.sum())


def _pack(values: list[float]) -> NDArray[np.float64]:
    """Return the values as an array: 6 ns each, where numpy takes 15 to look at each object."""
    return np.frombuffer(struct.pack(f"{len(values)}d", *values))
