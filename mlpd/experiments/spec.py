"""What an experiment is: frozen, validated definitions of arms, metrics, targeting, decision."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, Final, Literal, get_args

from mlpd.core.errors import DefinitionError
from mlpd.core.names import check_identifier, check_name
from mlpd.core.numbers import is_number
from mlpd.experiments.bandit import Bandit
from mlpd.experiments.guardrails import Guardrail
from mlpd.experiments.metric import Metric, at_least
from mlpd.experiments.promotion import Promotion
from mlpd.experiments.rendezvous import Rendezvous, checked_total, salt
from mlpd.experiments.sequences import Correction

MIN_ARMS: Final = 2
MAX_ARMS: Final = 20
MAX_METRICS: Final = 20
MAX_RULES: Final = 32
MAX_FORCED: Final = 1000
MAX_GUARDRAILS: Final = 10
MAX_ALPHA: Final = 0.5
NAMESPACE_BUCKETS: Final = 10_000

Method = Literal["sequence", "welch"]
Op = Literal["eq", "ne", "lt", "le", "gt", "ge", "in", "not_in"]
RuleValue = str | int | float | bool | tuple[str | int | float | bool, ...]


@dataclass(frozen=True, slots=True)
class Arm:
    """One variant: `name` is what a route maps to a model version; `weight` is relative, >= 0."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Rule:
    """`field op value` on a request field; a request without the field doesn't match.

    `in` and `not_in` take a tuple of values, the others one value.
    """

    field: str
    op: Op
    value: RuleValue


@dataclass(frozen=True, slots=True)
class Namespace:
    """Buckets [start, end) of the 10,000 of a namespace that all its experiments share.

    Experiments with disjoint ranges of one namespace never see the same unit.
    """

    name: str
    start: int = 0
    end: int = NAMESPACE_BUCKETS


@dataclass(frozen=True)  # no slots: the cached properties live in __dict__
class ExperimentSpec:
    """An experiment, valid by construction: a wrong value raises DefinitionError.

    - `name` salts the assignment: a new name re-randomises every unit.
    - `unit` is the field that identifies the randomisation unit, such as `tailnum`.
    - `control` is the arm that the others are compared with; "" means the first arm.
    - `planned_units` is N*, the total of units in all arms at which the confidence sequence is
      tightest (it stays valid before and after), or the fixed horizon of `method="welch"`.
    - `alpha` is the chance of a false positive over all looks, in (0, 0.5).
    - `holdout` is the share of units, in [0, 1), that never see any arm.
    - `forced` maps units of testers to arms; they are served so and never analysed.
    - `rules` must all match for a request to take part.
    - `correction` is over all metrics and arms of this experiment.
    - `guardrails` stop an arm that breaks one: its weight becomes 0, and stays so for
      `cool_down_s` unless it is forced.
    - `promotion` gives all traffic to an arm that is shown to do no harm.
    - `bandit` moves traffic to arms that are likely to be the best, bit by bit; units stay in the
      arm that they saw first.
    - `interleaving` shows each unit one list of both arms' picks, instead of one arm: of two arms
      of equal weight, on the metric `label`, and without what moves traffic.
    """

    name: str
    unit: str
    arms: tuple[Arm, ...]
    metrics: tuple[Metric, ...]
    planned_units: int
    control: str = ""
    alpha: float = 0.05
    method: Method = "sequence"
    correction: Correction = "holm"
    holdout: float = 0.0
    namespace: Namespace | None = None
    rules: tuple[Rule, ...] = ()
    forced: Mapping[str, str] = field(default_factory=dict)
    guardrails: tuple[Guardrail, ...] = ()
    cool_down_s: float = 86_400.0
    promotion: Promotion | None = None
    bandit: Bandit | None = None
    interleaving: bool = False

    def __post_init__(self) -> None:
        """Check everything, and fill in the control arm."""
        check_name(self.name, "experiment")
        check_identifier(self.unit, f"experiment {self.name!r}: unit")
        self._check_arms()
        self._check_metrics()
        self._check_numbers()
        self._check_namespace()
        self._check_rules()
        self._check_automation()

    @cached_property
    def weights(self) -> dict[str, float]:
        """Weight by arm name, in the order of the definition."""
        return {arm.name: float(arm.weight) for arm in self.arms}

    @cached_property
    def covariates(self) -> tuple[str, ...]:
        """The covariates of all metrics, each once, in the order of the definition."""
        named = (metric.covariate for metric in self.metrics)
        return tuple(dict.fromkeys(name for name in named if name is not None))

    @cached_property
    def exposure(self) -> Rendezvous:
        """The draw of the arm, with the salt of exposures."""
        return self.exposure_with(self.weights)

    @cached_property
    def holdout_salt(self) -> bytes:
        """Salt of the hold-out: per namespace if there is one, so its experiments share it."""
        if self.namespace:
            return salt("holdout", "namespace", self.namespace.name)
        return salt("holdout", "experiment", self.name)

    @cached_property
    def namespace_salt(self) -> bytes:
        """Salt of the namespace's buckets; meaningless without a namespace."""
        return salt("namespace", self.namespace.name if self.namespace else "")

    def exposure_with(self, weights: Mapping[str, float]) -> Rendezvous:
        """Return the draw of the arm under other weights: those of an earlier phase."""
        return Rendezvous(("exposure", self.name), weights)

    def to_dict(self) -> dict[str, Any]:
        """Return the definition as JSON and msgpack types; `spec_from_dict` reads it back."""
        namespace = self.namespace
        return {
            "name": self.name,
            "unit": self.unit,
            "arms": self.weights,
            "metrics": [metric.to_dict() for metric in self.metrics],
            "planned_units": self.planned_units,
            "control": self.control,
            "alpha": self.alpha,
            "method": self.method,
            "correction": self.correction,
            "holdout": self.holdout,
            "namespace": namespace
            and {"name": namespace.name, "start": namespace.start, "end": namespace.end},
            "rules": [{"field": r.field, "op": r.op, "value": r.value} for r in self.rules],
            "forced": dict(self.forced),
            "guardrails": [guardrail.to_dict() for guardrail in self.guardrails],
            "cool_down_s": self.cool_down_s,
            "promotion": self.promotion and self.promotion.to_dict(),
            "bandit": self.bandit and self.bandit.to_dict(),
            "interleaving": self.interleaving,
        }

    def _check_arms(self) -> None:
        count, names = len(self.arms), [arm.name for arm in self.arms]
        enough = MIN_ARMS <= count <= MAX_ARMS
        self._require(enough, f"it has {count} arms", f"{MIN_ARMS} to {MAX_ARMS}")
        for arm in self.arms:
            check_name(arm.name, f"experiment {self.name!r}: arm")
            found = f"weight of arm {arm.name!r} is {arm.weight!r}"
            self._require(is_number(arm.weight), found, "a finite number >= 0")
        self._require(len(set(names)) == count, f"arms are {names}", "different names")
        checked_total({arm.name: arm.weight for arm in self.arms})
        if not self.control:
            object.__setattr__(self, "control", names[0])
        self._require_one_of(self.control, names, "control")
        self._check_forced(names)

    def _check_forced(self, names: list[str]) -> None:
        found = f"forced is {type(self.forced).__name__}"
        self._require(isinstance(self.forced, Mapping), found, "a mapping of unit to arm")
        count = len(self.forced)
        self._require(count <= MAX_FORCED, f"{count} units are forced", f"at most {MAX_FORCED}")
        for unit, arm in self.forced.items():
            self._require_one_of(arm, names, f"forced arm of unit {unit!r}")

    def _check_metrics(self) -> None:
        count, names = len(self.metrics), [metric.name for metric in self.metrics]
        self._require(1 <= count <= MAX_METRICS, f"it has {count} metrics", f"1 to {MAX_METRICS}")
        for metric in self.metrics:
            check_identifier(metric.name, f"experiment {self.name!r}: metric")
            for ok, found, expected in metric.problems():
                self._require(ok, found, expected)
        self._require(len(set(names)) == count, f"metrics are {names}", "different names")

    def _check_numbers(self) -> None:
        planned, alpha, holdout = self.planned_units, self.alpha, self.holdout
        self._require(_is_int(planned, 1), f"planned_units is {planned!r}", "an integer >= 1")
        in_range = is_number(alpha) and 0 < alpha < MAX_ALPHA
        self._require(in_range, f"alpha is {alpha!r}", f"0 < alpha < {MAX_ALPHA}")
        in_range = is_number(holdout) and 0 <= holdout < 1
        self._require(in_range, f"holdout is {holdout!r}", "a share of units, 0 <= holdout < 1")
        self._require_one_of(self.method, get_args(Method), "method")
        self._require_one_of(self.correction, get_args(Correction), "correction")

    def _check_namespace(self) -> None:
        if self.namespace is None:
            return
        name, start, end = self.namespace.name, self.namespace.start, self.namespace.end
        check_name(name, f"experiment {self.name!r}: namespace")
        in_range = _is_int(start, 0) and _is_int(end, 1) and start < end <= NAMESPACE_BUCKETS
        found = f"namespace {name!r} has buckets [{start!r}, {end!r})"
        self._require(in_range, found, f"0 <= start < end <= {NAMESPACE_BUCKETS}")

    def _check_rules(self) -> None:
        count = len(self.rules)
        self._require(count <= MAX_RULES, f"it has {count} rules", f"at most {MAX_RULES}")
        for rule in self.rules:
            check_identifier(rule.field, f"experiment {self.name!r}: rule on field")
            self._require_one_of(rule.op, get_args(Op), f"op of the rule on {rule.field!r}")
            wants_many = rule.op in ("in", "not_in")
            found = f"value of the rule {rule.field!r} {rule.op} is {rule.value!r}"
            expected = "a list of values" if wants_many else "one value"
            self._require(isinstance(rule.value, tuple) == wants_many, found, expected)

    def _check_automation(self) -> None:
        count = len(self.guardrails)
        self._require(
            count <= MAX_GUARDRAILS, f"it has {count} guardrails", f"at most {MAX_GUARDRAILS}"
        )
        seconds = self.cool_down_s
        found = f"cool_down_s is {seconds!r}"
        self._require(at_least(seconds, 0), found, "a number of seconds >= 0")
        metrics = [metric.name for metric in self.metrics]
        problems = [part.problems(metrics) for part in self.guardrails]
        if self.promotion is not None:
            problems.append(self.promotion.problems(metrics))
        if self.bandit is not None:
            problems.append(self.bandit.problems(metrics, len(self.arms)))
            found = "it has a bandit and a promotion"
            self._require(self.promotion is None, found, "one of them: both move all traffic")
        for ok, found, expected in chain.from_iterable(problems):
            self._require(ok, found, expected)
        self._require(
            isinstance(self.interleaving, bool),
            f"interleaving is {self.interleaving!r}",
            "true or false",
        )
        if self.interleaving:
            self._check_interleaving()
        names = [guardrail.name for guardrail in self.guardrails]  # texts, as checked above
        self._require(len(set(names)) == count, f"guardrails are on {names}", "different things")

    def _check_interleaving(self) -> None:
        what = "it is interleaved with"
        weights = list(self.weights.values())
        even = len(weights) == MIN_ARMS and weights[0] == weights[1]
        self._require(even, f"{what} arms {self.weights}", "two arms of equal weight")
        names = [metric.name for metric in self.metrics]
        self._require(names == ["label"], f"{what} metrics {names}", "label alone: a click is 1")
        parts = {
            "guardrails": self.guardrails,
            "a promotion": self.promotion,
            "a bandit": self.bandit,
        }
        for name, part in parts.items():
            self._require(not part, f"{what} {name}", "none: a list is of both arms")

    def _require_one_of(self, value: object, choices: Sequence[str], what: str) -> None:
        self._require(value in choices, f"{what} is {value!r}", f"one of {', '.join(choices)}")

    def _require(self, ok: bool, found: str, expected: str) -> None:
        if not ok:
            raise DefinitionError(
                f"experiment {self.name!r}: {found}, expected {expected}",
                code="invalid_experiment",
                hint="Correct the experiment's definition and send it again.",
            )


def check_disjoint(specs: Iterable[ExperimentSpec]) -> None:
    """Raise DefinitionError if two experiments claim the same bucket of one namespace.

    Two experiments of one namespace that both hold units out use one draw, so hold-outs nest.
    """
    claims = sorted(
        (space.name, space.start, space.end, spec.name)
        for spec in specs
        if (space := spec.namespace) is not None
    )
    for (name, _, end, left), (other, start, _, right) in pairwise(claims):
        if name == other and start < end:
            raise DefinitionError(
                f"experiments {left!r} and {right!r} overlap in namespace {name!r}: "
                f"bucket {start} belongs to both",
                code="namespace_overlap",
                hint=f"Give them disjoint ranges [start, end) of the {NAMESPACE_BUCKETS} buckets.",
            )


def _is_int(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low
