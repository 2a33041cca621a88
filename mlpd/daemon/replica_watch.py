"""How far followers are behind: metrics of both sides, and the owner's alert."""

import math
import time
from collections.abc import Callable, Iterable, Mapping

from mlpd.daemon.feeding import Feeding
from mlpd.daemon.roles import Roles
from mlpd.daemon.tailing import Tailing
from mlpd.monitoring.alerts import ALERTNAME, Measurement
from mlpd.monitoring.instruments import Descriptor
from mlpd.monitoring.metrics import Collected, Collector
from mlpd.storage.feed import Feed


def replica_collector(roles: Roles, feeding: Feeding, tailing: Tailing, feed: Feed) -> Collector:
    """Return a collector of the role, and of lag: a follower's own, and that of an owner's."""

    def collect() -> Iterable[Collected]:
        yield _gauges("mlpd_role", "1 for the role that the daemon has.", {roles.role.name: 1.0})
        if roles.role.follows:
            yield from _of_follower(tailing)
            return
        lags = feeding.lags()
        rows = {url: float(found[0]) for url, found in lags.items()}
        seconds = {url: found[1] for url, found in lags.items()}
        text = "Rows that a follower lacks."
        yield _gauges("mlpd_replica_follower_lag_rows", text, rows, "follower")
        text = "Since a follower last had all."
        yield _gauges("mlpd_replica_follower_lag_seconds", text, seconds, "follower", "seconds")
        text = "Commits kept for followers."
        yield _one("mlpd_feed_bytes", "gauge", text, feed.size_bytes, "bytes")

    return collect


class ReplicaLook:
    """How far the followers in the map are behind.  One thread at a time."""

    names = ("ReplicaLag",)

    def __init__(
        self,
        roles: Roles,
        feeding: Feeding,
        lag_alert_s: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._roles = roles
        self._feeding = feeding
        self._lag_alert_s = lag_alert_s
        self._monotonic = monotonic
        self._since_s: dict[str, float] = {}
        """When a follower was first missed, by URL."""

    def measure(self) -> list[Measurement]:
        """Return for each follower in the map for how long it hasn't had all."""
        lags, now_s = self._feeding.lags(), self._monotonic()
        urls = self._roles.replicas()
        self._since_s = {url: self._since_s.get(url, now_s) for url in urls if url not in lags}
        return [self._measure(url, lags, now_s) for url in urls]

    def _measure(
        self, url: str, lags: Mapping[str, tuple[int, float]], now_s: float
    ) -> Measurement:
        if url in lags:
            rows, lag_s = lags[url]
            text = f"the follower at {url} is {rows} rows and {lag_s:.0f} s behind"
        else:
            lag_s = now_s - self._since_s[url]
            text = f"the follower at {url} isn't heard of"
        labels = {ALERTNAME: "ReplicaLag", "follower": url}
        return Measurement(labels, "followers", lag_s, self._lag_alert_s, text)


def _of_follower(tailing: Tailing) -> Iterable[Collected]:
    rows, stale_s = tailing.lag_rows, tailing.staleness_s
    yield _one("mlpd_replica_lag_rows", "gauge", "Rows that the owner had more.", rows)
    if math.isfinite(stale_s):
        text = "Since all that the owner had was here."
        yield _one("mlpd_replica_lag_seconds", "gauge", text, stale_s, "seconds")
    text = "Commits of the owner that were applied."
    yield _one("mlpd_replica_commits_total", "counter", text, tailing.commits)
    text = "Bytes of the feed that were applied."
    yield _one("mlpd_replica_bytes_total", "counter", text, tailing.bytes, "bytes")


def _one(name: str, kind: str, text: str, value: float, unit: str = "") -> Collected:
    return Collected(Descriptor(name, kind, text, (), unit), [((), float(value))])  # type: ignore[arg-type]  # one of its kinds


def _gauges(
    name: str, text: str, values: Mapping[str, float], label: str = "role", unit: str = ""
) -> Collected:
    samples = [((key,), value) for key, value in values.items()]
    return Collected(Descriptor(name, "gauge", text, (label,), unit), samples)
