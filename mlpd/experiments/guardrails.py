"""What an arm must not do: guardrails on requests and on metrics, and how harm is told from chance.

Faults of requests are counted by unit, as units are what is randomised: a client that is broken
fails in whatever arm it is in, all day long, and is one fault.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple, get_args

from mlpd.core.numbers import is_number
from mlpd.experiments.metric import at_least

On = Literal["errors", "latency", "nulls", "metric"]

GUARDRAIL_ALPHA: Final = 0.01
"""Chance that any guardrail of an experiment ever stops an arm that is as good as the control."""
RATIOS: Final = (1.4, 2.0, 4.0, 10.0, 50.0)
"""Rates of faults, over the tolerated one, that the sequence bets on, in equal parts."""
UNITS_MAX: Final = 100_000
"""Units remembered as faulty per guardrail; when they are full, its sequence stands still."""
WINDOW_UNITS: Final = 50
"""Latest units of an arm that the tripwire looks at: fewer are no window."""
CONTROL_UNITS: Final = 500
TRIP_POINTS: Final = 0.3
TRIP_SIGMAS: Final = 6.0
"""The tripwire goes off 30 points above the control, and at least 6 standard deviations: by chance
not once in 10^8 windows."""


@dataclass(frozen=True, slots=True)
class Guardrail:
    """One thing that an arm must not do worse than the control.

    - `errors`: its model fails; `nulls`: its score is NaN; `latency`: its model's answer takes
      longer than `limit_ms`.  `tolerance` is the rate of these faults that is tolerated, as a
      multiple of the control's.
    - `metric`: `metric` is worse than the control's by more than `margin`, in units of the metric.
    """

    on: On
    metric: str | None = None
    limit_ms: float | None = None
    tolerance: float = 1.0
    margin: float = 0.0

    @property
    def name(self) -> str:
        """What it is called where it breaks: the metric's name, or what it is on."""
        return self.metric or self.on

    def to_dict(self) -> dict[str, Any]:
        """Return the definition as JSON and msgpack types; what is not set is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def problems(self, metrics: Sequence[str]) -> Iterator[tuple[bool, str, str]]:
        """Yield (whether it is right, what was found, what was expected) of every field."""
        known = get_args(On)
        yield self.on in known, f"on of a guardrail is {self.on!r}", f"one of {', '.join(known)}"
        what, on_metric = f"of the guardrail on {self.on} is", self.on == "metric"
        right = self.metric in metrics if on_metric else self.metric is None
        expected = f"one of {', '.join(metrics)}" if on_metric else "none, as it is on requests"
        yield right, f"metric {what} {self.metric!r}", expected
        limit = self.limit_ms
        right = is_number(limit) and (limit or 0) > 0 if self.on == "latency" else limit is None
        expected = "milliseconds > 0 for latency, none for others"
        yield right, f"limit_ms {what} {limit!r}", expected
        yield at_least(self.tolerance, 1), f"tolerance {what} {self.tolerance!r}", "a number >= 1"
        yield at_least(self.margin, 0), f"margin {what} {self.margin!r}", "a number >= 0"


class Breach(NamedTuple):
    """A guardrail that an arm broke, and how that is known."""

    arm: str
    guardrail: str
    reason: str


class FaultSequence(NamedTuple):
    """Evidence, valid at every look, that faults come from an arm more often than its share.

    Given that a unit fails for the first time, it is in the arm (and not in the control) with
    probability `share` if the arms fail alike, whatever the rate is and however it moves.  `e` is a
    test martingale against that: the mean of bets on RATIOS, begun at every fault with weights
    that sum to 1.  It exceeds 1 / alpha ever with probability alpha at most (Ville), and finds a
    change nearly as fast after a long quiet time as at the beginning.  An immutable value.
    References: Shiryaev (1963); Shin, Ramdas & Rinaldo, "E-detectors" (2022).
    """

    faults: int = 0
    sums: tuple[float, ...] = (0.0,) * len(RATIOS)

    @property
    def e(self) -> float:
        """The e-value now."""
        return _rest(self.faults) + sum(self.sums) / len(self.sums)

    def after(self, *, in_arm: bool, share: float, tolerance: float = 1.0) -> "FaultSequence":
        """Return it after one more fault; `share` is the arm's part of both arms' traffic."""
        begun = _rest(self.faults) - _rest(self.faults + 1)
        factors = _factors(share, tolerance)[in_arm]
        sums = [(total + begun) * f for total, f in zip(self.sums, factors, strict=True)]
        return FaultSequence(self.faults + 1, tuple(sums))


class Tripwire:
    """The latest units of one arm, and whether their last request was at fault."""

    def __init__(self, units_max: int = WINDOW_UNITS) -> None:
        self._units_max = units_max
        self._latest: OrderedDict[str, bool] = OrderedDict()
        self._faults = 0

    def observe(self, unit: str, *, fault: bool) -> None:
        """Take in a request; about 0.5 us."""
        self._faults += fault - self._latest.pop(unit, False)
        self._latest[unit] = fault
        if len(self._latest) > self._units_max:
            self._faults -= self._latest.popitem(last=False)[1]

    @property
    def units(self) -> int:
        """Units in the window."""
        return len(self._latest)

    @property
    def rate(self) -> float:
        """Share of them whose last request was at fault."""
        return self._faults / max(1, len(self._latest))

    def trips(self, control: "Tripwire") -> bool:
        """Whether the rate is beyond what can be chance; both windows need WINDOW_UNITS."""
        if self.units < WINDOW_UNITS or control.units < WINDOW_UNITS:
            return False
        usual = control.rate
        sigma = math.sqrt(usual * (1 - usual) / WINDOW_UNITS)
        return self.rate - usual >= max(TRIP_POINTS, TRIP_SIGMAS * sigma)


class FaultGuard:
    """Watches one kind of fault in all arms of an experiment; owned by one thread.

    A breach is returned once for an arm, until `begin_phase` gives it a new start.
    """

    def __init__(
        self, guardrail: Guardrail, control: str, weights: Mapping[str, float], alpha: float
    ) -> None:
        self._guardrail = guardrail
        self._control = control
        self._alpha = alpha
        self._faulty: set[str] = set()
        self._weights = dict(weights)
        self._sequences: dict[str, FaultSequence] = {}
        self._windows: dict[str, Tripwire] = {}
        self._broken: set[str] = set()

    def begin_phase(self, weights: Mapping[str, float]) -> None:
        """Go on under other weights; an arm that comes back from 0 is watched anew.

        Units that failed before stay counted once: the e-value goes on being one.
        """
        for arm, weight in weights.items():
            if weight > 0 and not self._weights.get(arm):
                self._sequences.pop(arm, None)
                self._windows.pop(arm, None)
                self._broken.discard(arm)
        self._weights = dict(weights)

    def observe(
        self, unit: str, arm: str, *, fault: bool, weights: Mapping[str, float] | None = None
    ) -> Breach | None:
        """Take in a request and return the guardrail that it broke, if it did; 1 us without.

        `weights`: those that the unit was assigned by, if not those of now.
        """
        window = self._windows.get(arm)
        if window is None:
            size = CONTROL_UNITS if arm == self._control else WINDOW_UNITS
            window = self._windows[arm] = Tripwire(size)
        window.observe(unit, fault=fault)
        return self._judge(unit, arm, window, weights or self._weights) if fault else None

    def _judge(
        self, unit: str, arm: str, window: Tripwire, weights: Mapping[str, float]
    ) -> Breach | None:
        if unit not in self._faulty and len(self._faulty) < UNITS_MAX:
            self._faulty.add(unit)
            self._advance(arm, weights)
        if arm == self._control or arm in self._broken:
            return None
        reason = self._reason(arm, window)
        if reason is None:
            return None
        self._broken.add(arm)
        return Breach(arm, self._guardrail.name, reason)

    def _advance(self, arm: str, weights: Mapping[str, float]) -> None:
        """Count a unit's first fault: one in the control counts against every other arm."""
        control = weights.get(self._control, 0.0)
        others = [name for name in weights if name != self._control]
        for other in others if arm == self._control else [arm]:
            weight = weights.get(other, 0.0)
            if weight > 0 and control > 0:
                known = self._sequences.get(other, FaultSequence())
                self._sequences[other] = known.after(
                    in_arm=arm == other,
                    share=weight / (weight + control),
                    tolerance=self._guardrail.tolerance,
                )

    def _reason(self, arm: str, window: Tripwire) -> str | None:
        control = self._windows.get(self._control, Tripwire())
        rates = f"{window.rate:.0%} of its last {window.units} units, {control.rate:.0%} of "
        rates += f"{self._control}'s last {control.units}"
        e_value = self._sequences.get(arm, FaultSequence()).e
        if e_value >= 1 / self._alpha:
            return f"p < {self._alpha:g} at every look (e = {e_value:.3g}); at fault: {rates}"
        if window.trips(control):
            return f"tripwire: at fault are {rates}"
        return None


def fault_guards(
    guardrails: Sequence[Guardrail], control: str, weights: Mapping[str, float]
) -> list[FaultGuard | None]:
    """Return a guard for each guardrail on requests, None for one on a metric."""
    alpha = guardrail_alpha(guardrails, len(weights))
    return [
        None if guardrail.on == "metric" else FaultGuard(guardrail, control, weights, alpha)
        for guardrail in guardrails
    ]


def guardrail_alpha(guardrails: Sequence[Guardrail], arms: int) -> float:
    """Return the level of one guardrail of one arm."""
    return GUARDRAIL_ALPHA / (max(1, len(guardrails)) * max(1, arms - 1))


@lru_cache(maxsize=1024)
def _factors(share: float, tolerance: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return what a fault in the control, and one in the arm, multiplies each bet by."""
    base = _shifted(share, tolerance)
    bets = [_shifted(base, ratio) for ratio in RATIOS]
    return tuple((1 - bet) / (1 - base) for bet in bets), tuple(bet / base for bet in bets)


def _rest(begun: int) -> float:
    """Return the weight of the bets that begin after so many faults: slower than any power."""
    return 1 / (1 + math.log1p(begun))


def _shifted(share: float, ratio: float) -> float:
    """Return the arm's share of faults when its rate is `ratio` times the control's."""
    return share * ratio / (share * ratio + 1 - share)
