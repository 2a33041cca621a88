"""A router's own metrics: its requests, its calls to shards, and what it saved or sent twice."""

from collections.abc import Iterable, Mapping

from mlpd.cluster.router.cache import HotKeys
from mlpd.cluster.router.members import Members
from mlpd.core.limits import AdaptiveLimit
from mlpd.monitoring.instruments import Descriptor, Kind
from mlpd.monitoring.metrics import Collected, Registry


class RouterMetrics:
    """Counts requests; what others count is read when it is asked for."""

    def __init__(
        self, members: Members, limits: Mapping[str, AdaptiveLimit], cache: HotKeys
    ) -> None:
        self._cache = cache
        self.registry = Registry()
        self._members = members
        self._limits = limits
        self._requests = self.registry.counter(
            "mlpd_router_requests_total", "Requests by route.", labels=("route", "code")
        )
        self._seconds = self.registry.histogram(
            "mlpd_router_request_seconds", "Time to answer.", labels=("route",), unit="seconds"
        )
        self.registry.add_collector("router", self._collect)

    def observe(self, path: str, status: int, seconds: float) -> None:
        """Count an answered request; about 1 us."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def _collect(self) -> Iterable[Collected]:
        members, hedging = self._members.all(), self._members.hedging
        calls = Descriptor(
            *("mlpd_router_calls_total", "counter", "Calls to shards by outcome."),
            ("shard", "outcome"),
        )
        yield Collected(
            calls,
            [
                ((member.name, outcome), float(count))
                for member in members
                for outcome, count in list(member.outcomes.items())
            ],
        )
        down = Descriptor(
            "mlpd_router_shard_down", "gauge", "Whether a shard counts as down.", ("shard",)
        )
        yield Collected(down, [((m.name,), float(m.breaker.is_open)) for m in members])
        refused = Descriptor(
            "mlpd_router_refused_total", "counter", "Requests over the limit.", ("kind",)
        )
        yield Collected(refused, [((k,), float(v.refused)) for k, v in self._limits.items()])
        singles: list[tuple[str, Kind, str, float]] = [
            ("mlpd_router_epoch", "gauge", "Of the map.", self._members.epoch),
            ("mlpd_router_hedged_total", "counter", "Reads sent twice.", hedging.hedged),
            ("mlpd_router_hedges_won_total", "counter", "Answered by the second.", hedging.won),
            ("mlpd_router_cache_rows", "gauge", "Rows kept.", len(self._cache)),
            ("mlpd_router_cache_hits_total", "counter", "Rows from it.", self._cache.hits),
            ("mlpd_router_cache_misses_total", "counter", "Rows not there.", self._cache.misses),
        ]
        for name, kind, text, value in singles:
            yield Collected(Descriptor(name, kind, text), [((), float(value))])
