"""What a route's change means for its canary, and a canary's look for its route; pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mlpd.core.errors import ValidationError
from mlpd.core.time import HOUR_US
from mlpd.serving.canary import Canary, Step
from mlpd.serving.routes import ARMS_MAX, Arm, ModelRef, RouteSpec
from mlpd.serving.snapshot import LiveRoute
from mlpd.serving.trial import Trial

CHANGED = "the route was changed"

CHALLENGER = "challenger"
HOLD_US, HOLD_ROWS = HOUR_US, 100
"""How long a challenger's canary is watched at least, and for how many of its rows."""


@dataclass(frozen=True, slots=True)
class Change:
    """A route's next version, for its history: made by the canary."""

    spec: RouteSpec
    trial: Trial
    by: str


def try_challenger(spec: RouteSpec, model: str, share: float) -> RouteSpec | None:
    """Return a route with a canary that gives `model@challenger` a share beside the champion.

    As it is where that runs already; None where the route doesn't serve the champion, or something
    else moves its weights.
    """
    champion, challenger = (ModelRef(model, alias) for alias in ("champion", "challenger"))
    if spec.experiment is not None or champion not in {arm.model for arm in spec.arms}:
        return None
    arms = {arm.model: arm.name for arm in spec.arms}
    if spec.canary is not None:
        return spec if spec.canary.arm == arms.get(challenger) else None
    name = arms.get(challenger, CHALLENGER)
    if challenger not in arms:
        if name in spec.weights or len(spec.arms) >= ARMS_MAX:
            return None
        spec = replace(spec, arms=(*spec.arms, Arm(name, challenger, 0.0)))
    canary = Canary(name, (Step(share, HOLD_US, HOLD_ROWS),))
    return replace(spec, canary=canary)


def begin_trial(
    old: RouteSpec | None, spec: RouteSpec, last: Trial | None, now_us: int
) -> Trial | None:
    """Return the trial of a route that somebody puts; the running one if nothing of it changes.

    Without a canary: how the last one ended, now if it ran.  Raises ValidationError(
    code="invalid_canary") if the other arms have no weight.
    """
    if spec.canary is None:
        ran = last is not None and last.is_running
        return last.ended("stopped", CHANGED, now_us) if ran and last is not None else last
    goes_on = old is not None and last is not None and _is_same_trial(old, spec, last)
    if goes_on and last is not None and old is not None and old.weights == spec.weights:
        return last
    if not _rest(spec.weights, spec.canary.arm):
        raise ValidationError(
            f"route {spec.name!r}: besides its canary's arm {spec.canary.arm!r} no arm has a "
            "weight, so nothing could be compared, or gone back to",
            code="invalid_canary",
            hint="Give the arms that serve now their weights; the canary's own doesn't matter.",
        )
    if goes_on and last is not None:
        return replace(last, weights=spec.weights)
    return Trial(spec.canary, "", spec.weights, started_us=now_us, entered_us=now_us)


def next_change(spec: RouteSpec, trial: Trial, live: LiveRoute, now_us: int) -> Change | None:
    """Return what a running trial makes of its route now, None for nothing."""
    arm = trial.canary.arm
    serving = live.arms[arm].package.reference
    after = replace(spec, version=spec.version + 1)
    if serving != trial.reference:  # an alias was moved
        anew = Trial(trial.canary, serving, trial.weights, started_us=now_us, entered_us=now_us)
        return Change(after, anew, f"canary: begins anew, {arm} serves {serving} now")
    decision, why = trial.decide()
    if decision == "wait":
        return None
    if decision == "advance":
        step = trial.advanced(now_us)
        count = len(trial.canary.steps)
        return Change(after, step, f"canary: step {step.step + 1} of {count}")
    after = replace(after, canary=None)
    if decision == "finish":
        return Change(after, trial.ended("finished", why, now_us), f"canary: finished, {why}")
    if trial.canary.on_failure == "stop":
        return Change(after, trial.ended("stopped", why, now_us), f"canary: stopped, {why}")
    ended = trial.ended("rolled_back", why, now_us)
    return Change(after.with_weights(_without(trial.weights, arm)), ended, f"canary: back, {why}")


def _is_same_trial(old: RouteSpec, spec: RouteSpec, last: Trial) -> bool:
    arms = ({arm.name: arm.model for arm in route.arms} for route in (old, spec))
    return last.is_running and last.canary == spec.canary and next(arms) == next(arms)


def _without(weights: Mapping[str, float], arm: str) -> dict[str, float]:
    return {name: 0.0 if name == arm else weight for name, weight in weights.items()}


def _rest(weights: Mapping[str, float], arm: str) -> float:
    return math.fsum(weight for name, weight in weights.items() if name != arm)
