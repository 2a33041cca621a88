"""What follows from a look without anybody asking: arms to stop, an arm to promote; pure."""

from dataclasses import dataclass
from itertools import chain

from mlpd.experiments.analysis import ExperimentState
from mlpd.experiments.estimates import Cell, Combined, combine, pooled_theta, strata_of
from mlpd.experiments.guardrails import Breach, Guardrail, guardrail_alpha
from mlpd.experiments.metric import Metric
from mlpd.experiments.promotion import Gain, gain_of, winner
from mlpd.experiments.verdict import Comparison, usable_pairs


@dataclass(frozen=True, slots=True)
class Ruling:
    """The outcome of a look; `promoted`: (arm, why) or None."""

    comparisons: tuple[Comparison, ...]
    sample_ratio_alarm: bool
    breaches: tuple[Breach, ...]
    promoted: tuple[str, str] | None


def judge(state: ExperimentState) -> Ruling:
    """Return the ruling of a look.  Under a sample-ratio alarm nothing is promoted.

    Guardrails hold all the same: whatever loses units may be the harm.
    """
    result = state.result()
    alarm = result.sample_ratio.alarm
    breaches = tuple(
        breach
        for guardrail in state.spec.guardrails
        if guardrail.on == "metric"
        for breach in _breaches(state, guardrail)
    )
    promoted = None if alarm or breaches else _promoted(state)
    return Ruling(result.comparisons, alarm, breaches, promoted)


def _open_arms(state: ExperimentState) -> list[str]:
    """Return the arms besides the control that get traffic."""
    weights = state.spec.weights
    return [arm for arm, weight in weights.items() if weight > 0 and arm != state.spec.control]


def _gain(state: ExperimentState, metric: Metric, arm: str, alpha: float) -> Gain | None:
    found = _difference(state, metric, arm)
    if found is None:
        return None
    return gain_of(found, metric, planned_units=state.spec.planned_units, alpha=alpha)


def _difference(state: ExperimentState, metric: Metric, arm: str) -> Combined | None:
    pairs: list[tuple[Cell, Cell]]
    pairs, _ = usable_pairs(state.spec, metric, arm, len(state.phases), state.cells)
    if not pairs:
        return None
    theta = None if metric.covariate is None else pooled_theta(chain.from_iterable(pairs))
    return combine(strata_of(pairs, theta=theta))


def _breaches(state: ExperimentState, guardrail: Guardrail) -> list[Breach]:
    spec = state.spec
    metric = next(metric for metric in spec.metrics if metric.name == guardrail.metric)
    alpha = guardrail_alpha(spec.guardrails, len(spec.arms))
    found = []
    for arm in _open_arms(state):
        gain = _gain(state, metric, arm, alpha)
        if gain is not None and gain.high < -guardrail.margin:
            reason = (
                f"it is worse than {spec.control} by {-gain.estimate:.4g}, at least "
                f"{-gain.high:.4g} (alpha = {alpha:.2g} at every look)"
            )
            found.append(Breach(arm, guardrail.name, reason))
    return found


def _promoted(state: ExperimentState) -> tuple[str, str] | None:
    promotion, spec = state.spec.promotion, state.spec
    arms = _open_arms(state)
    if promotion is None or not arms or not spec.weights[spec.control]:
        return None  # it is over: somebody has all traffic
    metric = next(m for m in spec.metrics if promotion.metric in (None, m.name))
    alpha = spec.alpha / (len(spec.arms) - 1)
    gains = {arm: gain for arm in arms if (gain := _gain(state, metric, arm, alpha)) is not None}
    arm = winner(gains, promotion.margin)
    if arm is None:
        return None
    gain = gains[arm]
    return arm, (
        f"{metric.name} gains {gain.estimate:.4g} over {spec.control}, at least {gain.low:.4g} "
        f"(alpha = {alpha:.2g} at every look; a loss of {promotion.margin:g} is allowed)"
    )
