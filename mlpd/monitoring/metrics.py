"""Our own metrics registry: counters, gauges and histograms that cost less than 0.1 us to observe.

A *family* is one metric name with its label names; a *child* is one labelled series of it (or, for
a histogram, one set of series).  Callers look a child up once, keep it, and pay for an attribute
addition or a list append per observation:

    >>> registry = Registry()
    >>> latency = registry.histogram(
    ...     "mlpd_predict_latency_seconds", "Time to answer.", labels=("route",), unit="seconds"
    ... )
    >>> child = latency.labels("flight-risk")   # once, at start
    >>> child.observe(0.0021)                   # on every request
    >>> child.snapshot().count
    1

Every family shares the registry's series budget: a label set that finds no room is counted as
dropped and lands on the family's `other` child, so a mistake in labelling can't eat the memory.
`exposition.py` turns a registry into text.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from mlpd.core.errors import ConflictError, ValidationError
from mlpd.monitoring.instruments import (
    LATENCY_BUCKETS_S,
    Counter,
    Descriptor,
    Gauge,
    Histogram,
)

LabelValues = tuple[str, ...]

DEFAULT_MAX_SERIES: Final = 10_000
OTHER: Final = "other"

_log = logging.getLogger(__name__)

C = TypeVar("C", Counter, Gauge, Histogram)


class Family(Generic[C]):
    """All children of one metric; made by the registry."""

    def __init__(
        self, descriptor: Descriptor, make: Callable[[], C], cost: int, registry: "Registry"
    ) -> None:
        self.descriptor = descriptor
        self.cost = cost
        self._make: Callable[[], C] = make
        self._registry = registry
        self._children: dict[LabelValues, C] = {}

    def labels(self, *values: str) -> C:
        """Return the child of these label values (in declared order), made on first use.

        Without room in the budget it is the child whose every label is `other`; each such call
        counts into `mlpd_metrics_series_dropped_total`.  Keep the child: this costs 200 ns.
        """
        child = self._children.get(values)
        return child if child is not None else self._registry.admit(self, values)

    def remove(self, *values: str) -> None:
        """Forget a child (a model was unloaded) and give its room back; unknown is fine."""
        self._registry.release(self, values)

    def children(self) -> list[tuple[LabelValues, C]]:
        """Return the children in order of their creation."""
        return list(self._children.items())

    def get_child(self, values: LabelValues) -> C | None:
        """Return the child of these label values if there is one."""
        return self._children.get(values)

    def make_child(self, values: LabelValues) -> C:
        """Create a child; the registry calls this, holding its lock."""
        child = self._children[values] = self._make()
        return child

    def drop_child(self, values: LabelValues) -> bool:
        """Delete a child and tell whether there was one; the registry calls this."""
        return self._children.pop(values, None) is not None


@dataclass(frozen=True, slots=True)
class Collected:
    """One family read at scrape time: `samples` pair label values with a value.

    For counters, gauges and infos only; a histogram belongs in a Family.
    """

    descriptor: Descriptor
    samples: Sequence[tuple[LabelValues, float]]


Collector = Callable[[], Iterable[Collected]]
"""Called at scrape time, off the loop: it must only read, and must not block for long."""


class Registry:
    """Every metric of one daemon, under one series budget."""

    def __init__(self, *, max_series: int = DEFAULT_MAX_SERIES) -> None:
        self._max_series = max_series
        self._series = 0
        self._lock = threading.RLock()  # admitting one child may count into another family
        self._families: dict[str, Family[Counter] | Family[Gauge] | Family[Histogram]] = {}
        self._collectors: dict[str, Collector] = {}
        self._dropped = self.counter(
            "mlpd_metrics_series_dropped_total",
            "Lookups of a label set that found no room in the series budget.",
            labels=("family",),
        )
        self._failures = self.counter(
            "mlpd_metrics_collector_failures_total",
            "Scrapes at which a collector raised; its metrics are absent from that scrape.",
            labels=("collector",),
        )

    @property
    def series(self) -> int:
        """How many series the children hold, of at most `max_series` plus the `other` ones."""
        return self._series

    def counter(
        self, name: str, help_text: str, *, labels: Sequence[str] = (), unit: str = ""
    ) -> Family[Counter]:
        """Declare a counter; `name` ends with `_total`."""
        descriptor = Descriptor(name, "counter", help_text, tuple(labels), unit)
        return self._declare(Family(descriptor, Counter, 1, self))

    def gauge(
        self, name: str, help_text: str, *, labels: Sequence[str] = (), unit: str = ""
    ) -> Family[Gauge]:
        """Declare a gauge."""
        descriptor = Descriptor(name, "gauge", help_text, tuple(labels), unit)
        return self._declare(Family(descriptor, Gauge, 1, self))

    def histogram(
        self,
        name: str,
        help_text: str,
        *,
        labels: Sequence[str] = (),
        unit: str = "",
        bounds: Sequence[float] = LATENCY_BUCKETS_S,
    ) -> Family[Histogram]:
        """Declare a histogram of at most 14 ascending `bounds`; each child costs bounds + 3."""
        Histogram(bounds)  # raises before anything is declared
        descriptor = Descriptor(name, "histogram", help_text, tuple(labels), unit)
        cost = len(bounds) + 3
        return self._declare(Family(descriptor, lambda: Histogram(bounds), cost, self))

    def info(self, name: str, help_text: str, **labels: str) -> None:
        """Declare a constant series of value 1 whose labels tell something; name: `..._info`."""
        descriptor = Descriptor(name, "info", help_text, tuple(labels))
        self._declare(Family(descriptor, Gauge, 1, self)).labels(*labels.values()).set(1.0)

    def add_collector(self, name: str, collector: Collector) -> None:
        """Call `collector` at every scrape; a second one of this name replaces the first."""
        self._collectors[name] = collector

    def families(self) -> list[Family[Counter] | Family[Gauge] | Family[Histogram]]:
        """Return the declared families in order of declaration."""
        return list(self._families.values())

    def collect(self) -> list[Collected]:
        """Run the collectors.  One that raises is logged and counted, the others still run."""
        found: list[Collected] = []
        names = set(self._families)
        room = max(0, self._max_series - self._series)
        for name, collector in list(self._collectors.items()):
            try:
                collected = list(collector())
            except Exception:  # noqa: BLE001  the boundary that keeps a scrape alive; it logs and counts
                _log.exception("metrics collector %s failed", name)
                self._failures.labels(name).inc()
                continue
            for item in collected:
                if item.descriptor.name in names:
                    _log.error("collector %s repeats metric %s", name, item.descriptor.name)
                    self._failures.labels(name).inc()
                    continue
                names.add(item.descriptor.name)
                found.append(self._within(item, room))
                room -= len(found[-1].samples)
        return found

    def admit(self, family: Family[C], values: LabelValues) -> C:
        """Return a new child of `family`, or its `other` child if the budget is spent."""
        names = family.descriptor.labels
        if len(values) != len(names):
            raise ValidationError(
                f"{family.descriptor.name} has labels {names}, got {len(values)} values"
            )
        with self._lock:
            if (known := family.get_child(values)) is not None:
                return known
            if not self._has_room(family):
                self._dropped.labels(family.descriptor.name).inc()
                values = (OTHER,) * len(names)
                if (known := family.get_child(values)) is not None:
                    return known
            self._series += family.cost
            return family.make_child(values)

    def release(self, family: Family[C], values: LabelValues) -> None:
        """Delete a child of `family` and give its series back to the budget."""
        with self._lock:
            if family.drop_child(values):
                self._series -= family.cost

    def _has_room(self, family: Family[C]) -> bool:
        # Unlabelled families and the registry's own are bounded by the code that declares them.
        bounded = not family.descriptor.labels or family.descriptor.name in (
            "mlpd_metrics_series_dropped_total",
            "mlpd_metrics_collector_failures_total",
        )
        return bounded or self._series + family.cost <= self._max_series

    def _within(self, item: Collected, room: int) -> Collected:
        if len(item.samples) <= room:
            return item
        self._dropped.labels(item.descriptor.name).inc(len(item.samples) - room)
        return Collected(item.descriptor, item.samples[:room])

    def _declare(self, family: Family[C]) -> Family[C]:
        name = family.descriptor.name
        with self._lock:
            if name in self._families:
                raise ConflictError(f"metric {name!r} is declared twice", code="metric_declared")
            self._families[name] = family
        return family
