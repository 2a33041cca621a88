"""The states of alerts: measurements in, changed alerts out; pure, counted in windows.

An alert is one thing that can be wrong, named by its labels.  Only alerts that are not ok are held.

    >>> table = AlertTable()
    >>> bad = Measurement({"alertname": "SourceLag", "source": "a"}, "source a", 2.0, 1.0, "late")
    >>> [alert.state.value for alert in table.judge({"SourceLag"}, 1, [bad], now_us=0)]
    ['pending']
    >>> [alert.state.value for alert in table.judge({"SourceLag"}, 2, [bad], now_us=5)]
    ['firing']
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any, Final, Self

import msgpack

CLEAR_SHARE: Final = 0.8
"""A window is calm under this share of the threshold."""

ALERTS_MAX: Final = 10_000
"""Alerts held at most: 4 MB.  What is more is counted and waits until there is room."""

GONE_AFTER: Final = 12
"""An alert that was not measured so often in a row ends: its version or source is used no more."""

ALERTNAME: Final = "alertname"
SEVERITY: Final = "severity"


class State(StrEnum):
    """What an alert is; `ok` is an alert that isn't held."""

    OK = "ok"
    PENDING = "pending"
    FIRING = "firing"
    RESOLVED = "resolved"


@dataclass(frozen=True, slots=True)
class Rule:
    """Fires when `fire_after` of the last `of` windows were over, ends after `clear_after` calm."""

    fire_after: int
    of: int
    clear_after: int


_SLOW, _QUALITY, _AT_ONCE = Rule(2, 3, 3), Rule(1, 1, 3), Rule(1, 1, 1)

RULES: Final[Mapping[str, Rule]] = {
    "FeatureDrift": _SLOW,
    "PredictionDrift": _SLOW,
    "FeatureQuality": _QUALITY,
    "SourceQuality": _QUALITY,
    "SourceStalled": _AT_ONCE,
    "SourceLag": _SLOW,
    "FreshnessSlo": _SLOW,
    "Performance": _AT_ONCE,
    "ConceptDrift": _AT_ONCE,
    "MultivariateDrift": _SLOW,
    "Inconsistent": _AT_ONCE,
    "DiskFull": _SLOW,
    "StoreMapFull": _SLOW,
    "WritesFail": _AT_ONCE,
    "ReplicaLag": _AT_ONCE,
    "ArmStopped": _AT_ONCE,
    "SampleRatio": _AT_ONCE,
}
"""By alertname."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One subject in one window: bad from `value` >= `threshold` > 0 on.

    `labels` name the alert, `group` what shares a message, `text` says to people what is wrong.
    `key` is the labels' fingerprint, which costs 5 us: make many measurements off the loop.
    """

    labels: Mapping[str, str]
    group: str
    value: float
    threshold: float
    text: str
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Compute the key."""
        object.__setattr__(self, "key", fingerprint(self.labels))


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert that is not ok.

    `recent`: whether the last windows were over, newest last.  `calm`: calm windows in a row.
    `absent`: looks in a row that did not measure it.  `window`: the last one judged.
    `starts_us`, `ends_us`: of its last episode, None before its first and while it lasts.
    `revision` grows with every beginning and end of an episode; `told` is the revision that each
    sink has taken, by the sink's name.
    """

    labels: Mapping[str, str]
    group: str
    state: State = State.OK
    recent: tuple[bool, ...] = ()
    calm: int = 0
    absent: int = 0
    window: int = -1
    value: float = 0.0
    threshold: float = 1.0
    text: str = ""
    starts_us: int | None = None
    ends_us: int | None = None
    revision: int = 0
    told: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its alertname."""
        return self.labels[ALERTNAME]

    @property
    def fingerprint(self) -> str:
        """Return 16 hex digits that stand for its labels."""
        return fingerprint(self.labels)

    def is_due(self, sink: str) -> bool:
        """Whether `sink` has to hear of its last change."""
        return self.told.get(sink, 0) < self.revision

    def knows_of(self, sink: str) -> bool:
        """Whether `sink` was told that the episode began, which is over now."""
        return self.ends_us is not None and self.told.get(sink, 0) == self.revision - 1

    def to_dict(self) -> dict[str, Any]:
        """Return JSON- and msgpack-able values."""
        return asdict(self)

    def encode(self) -> bytes:
        """Return the bytes that `decode` reads."""
        packed: bytes = msgpack.packb(self.to_dict())
        return packed

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Return the alert that `encode` packed."""
        found = msgpack.unpackb(data)
        state, recent = State(found["state"]), tuple(found["recent"])
        return cls(**{**found, "state": state, "recent": recent})


def fingerprint(labels: Mapping[str, str]) -> str:
    """Return 16 hex digits that stand for a set of labels."""
    # With lengths, no two sets of labels give one text.
    text = "".join(f"{name}={len(value)}:{value}," for name, value in sorted(labels.items()))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def step(alert: Alert, measured: Measurement, window: int, now_us: int) -> Alert:
    """Return the alert after one more window."""
    rule = RULES[alert.name]
    over = measured.value >= measured.threshold
    is_calm = measured.value < CLEAR_SHARE * measured.threshold
    alert = replace(
        alert,
        recent=(*alert.recent, over)[-rule.of :],
        calm=alert.calm + 1 if is_calm else 0,
        absent=0,
        window=window,
        value=measured.value,
        threshold=measured.threshold,
        text=measured.text,
    )
    if alert.state is State.FIRING:
        return end(alert, now_us) if alert.calm >= rule.clear_after else alert
    if sum(alert.recent) >= rule.fire_after:
        revision = alert.revision + 1
        return replace(alert, state=State.FIRING, starts_us=now_us, ends_us=None, revision=revision)
    if any(alert.recent):
        return replace(alert, state=State.PENDING)
    if alert.state is State.PENDING:
        return replace(alert, state=State.OK if alert.ends_us is None else State.RESOLVED)
    return alert


def end(alert: Alert, now_us: int) -> Alert:
    """Return a firing alert as resolved; its next episode begins from nothing."""
    ended_us = max(now_us, alert.starts_us or now_us)  # a clock may have jumped back
    revision = alert.revision + 1
    return replace(alert, state=State.RESOLVED, recent=(), ends_us=ended_us, revision=revision)


class AlertTable:
    """All alerts of a daemon that are not ok.  One thread at a time."""

    def __init__(self, alerts: Iterable[Alert] = ()) -> None:
        self._alerts = {alert.fingerprint: alert for alert in alerts}
        self.refused = 0
        """New alerts that found no room, counted at each look."""

    def all(self) -> list[Alert]:
        """Return what is held, in the order in which it came."""
        return list(self._alerts.values())

    def get(self, key: str) -> Alert | None:
        """Return the alert of a fingerprint, None if it is ok."""
        return self._alerts.get(key)

    def judge(
        self, names: Collection[str], window: int, measured: Iterable[Measurement], now_us: int
    ) -> list[Alert]:
        """Take in one window in which alerts of these names were measured; return what changed.

        A changed alert that is ok is held no more.  A window that an alert has seen already
        changes nothing, so that a restart within it counts it once.  A value that is no number
        was not measured.  0.3 us for each that is ok and was, 5 us for the others.
        """
        changed: dict[str, Alert] = {}
        seen = set()
        for one in measured:
            if not math.isfinite(one.value) or one.threshold <= 0:
                continue
            seen.add(one.key)
            before = self._alerts.get(one.key)
            if before is None:
                if one.value < one.threshold:
                    continue  # ok, as it was
                before = Alert(dict(one.labels), one.group)
            if before.window != window:
                self._hold(one.key, before, step(before, one, window, now_us), changed)
        for key, alert in list(self._alerts.items()):
            if alert.name in names and key not in seen and alert.state is not State.RESOLVED:
                self._hold(key, alert, _unseen(alert, now_us), changed)
        return list(changed.values())

    def mark_told(self, key: str, sink: str, revision: int) -> Alert | None:
        """Note what a sink has taken; returns the changed alert, None if it is held no more."""
        alert = self._alerts.get(key)
        if alert is not None:
            alert = replace(alert, told={**alert.told, sink: revision})
            self._alerts[key] = alert
        return alert

    def forget(self, key: str) -> None:
        """Let go of a resolved alert that everybody was told of; unknown is fine."""
        self._alerts.pop(key, None)

    def _hold(self, key: str, before: Alert, after: Alert, changed: dict[str, Alert]) -> None:
        if after.state is State.OK:
            if self._alerts.pop(key, None) is not None:
                changed[key] = after
            return
        if key not in self._alerts and len(self._alerts) >= ALERTS_MAX:
            self.refused += 1
            return
        if after != before:
            self._alerts[key] = changed[key] = after


def _unseen(alert: Alert, now_us: int) -> Alert:
    alert = replace(alert, absent=alert.absent + 1)
    if alert.absent < GONE_AFTER:
        return alert
    if alert.state is State.FIRING:
        return end(replace(alert, text=f"no longer measured; it was: {alert.text}"), now_us)
    return replace(alert, state=State.OK if alert.ends_us is None else State.RESOLVED)
