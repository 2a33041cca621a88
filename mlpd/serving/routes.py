"""Routes: named endpoints with weighted arms, shadows, an experiment and a fallback; values."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from mlpd.core.errors import ValidationError
from mlpd.core.names import check_identifier, check_name
from mlpd.serving.canary import Canary

ARMS_MAX = 32
"""Most arms, most shadows and most fallback models of one route."""

Resolve = Callable[[str, str], int]
"""Returns the version behind (model, alias); raises NotFoundError for an unknown one."""

PREVIOUS = "~1"
"""After an alias: the version that it pointed to before."""

_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True, order=True)
class ModelRef:
    """A model version by number, or by an alias that is looked up whenever routes are applied.

    `alias~1` is the version that the alias pointed to before.
    """

    model: str
    target: str

    @classmethod
    def parse(cls, text: object, what: str = "model reference") -> "ModelRef":
        """Return the reference in `flight-risk@champion`, `flight-risk@champion~1` or `...@3`.

        Raises ValidationError(code="invalid_model_ref").
        """
        model, at, target = text.partition("@") if isinstance(text, str) else ("", "", "")
        if not at:
            raise ValidationError(
                f"{what} {text!r} names no version",
                code="invalid_model_ref",
                hint="Write model@alias or model@version, for example flight-risk@champion.",
            )
        check_name(model, "model")
        if target.isdigit() and not _VERSION.fullmatch(target):
            raise ValidationError(
                f"{what} {text!r} has no valid version number", code="invalid_model_ref"
            )
        alias = target.removesuffix(PREVIOUS)
        check_name(alias, "alias")
        if alias != target and alias.isdigit():
            raise ValidationError(
                f"{what} {text!r}: only an alias has a version before", code="invalid_model_ref"
            )
        return cls(model, target)

    @property
    def version(self) -> int | None:
        """The version number, None for an alias."""
        return int(self.target) if self.target.isdigit() else None

    @property
    def alias(self) -> str:
        """The alias that is meant, or from which it goes back; the number for a number."""
        return self.target.removesuffix(PREVIOUS)

    @property
    def is_previous(self) -> bool:
        """Whether the version before an alias's present one is meant."""
        return self.target.endswith(PREVIOUS)

    def resolve(self, resolve: Resolve) -> int:
        """Return the version number, asking `resolve` for an alias."""
        return self.version if self.version is not None else resolve(self.model, self.target)

    def __str__(self) -> str:
        return f"{self.model}@{self.target}"


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm of a route; `weight` >= 0 counts relative to the others' (0 takes no traffic)."""

    name: str
    model: ModelRef
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class RouteSpec:
    """A named endpoint: what it serves, from which features, and what it answers when it can't.

    `service`: the feature service that makes the vector.  `experiment`: whose assignment chooses
    the arm, or None.  `fallback_models`: versions that answer, the first one that can, for an arm
    that can't; `fallback`: the score answered when none of them can, or None for an error.
    `canary`: by which timetable an arm's weight grows; whoever keeps it sets the weights.
    `log_share`: of its rows that are logged, (0, 1]; those of experiments and fallbacks always are.
    `version` counts the route's changes from 1; the store of routes sets it.
    Constructing validates: ValidationError(code="invalid_route") names the route and the problem.
    """

    name: str
    service: str
    arms: tuple[Arm, ...]
    shadows: tuple[ModelRef, ...] = ()
    experiment: str | None = None
    fallback: float | None = None
    fallback_models: tuple[ModelRef, ...] = ()
    canary: Canary | None = None
    log_share: float = 1.0
    version: int = 1

    def __post_init__(self) -> None:
        check_name(self.name, "route")
        check_identifier(self.service, "feature service")
        if self.experiment is not None:
            check_name(self.experiment, "experiment")
        for arm in self.arms:
            check_name(arm.name, "arm")
        for problem in _problems(self):
            raise _invalid(self.name, problem)

    @property
    def references(self) -> frozenset[ModelRef]:
        """All models that the route refers to."""
        return self.required.union(self.fallback_models)

    @property
    def required(self) -> frozenset[ModelRef]:
        """The models without which the route can't serve."""
        return frozenset(arm.model for arm in self.arms).union(self.shadows)

    @property
    def weights(self) -> dict[str, float]:
        """The arms' weights by name."""
        return {arm.name: arm.weight for arm in self.arms}

    def with_weights(self, weights: Mapping[str, float]) -> "RouteSpec":
        """Return the route with other weights of its arms."""
        arms = tuple(replace(arm, weight=weights[arm.name]) for arm in self.arms)
        return replace(self, arms=arms)

    def arm(self, name: str) -> Arm:
        """Return the arm `name`, else raise ValidationError(code="unknown_arm")."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        known = ", ".join(arm.name for arm in self.arms)
        raise ValidationError(
            f"route {self.name!r} has no arm {name!r}; it has {known}",
            code="unknown_arm",
            hint="Name one of its arms.",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that `from_dict` reads."""
        return {
            **{name: getattr(self, name) for name in ("name", "service")},
            "arms": [{**asdict(arm), "model": str(arm.model)} for arm in self.arms],
            "shadows": [str(ref) for ref in self.shadows],
            "experiment": self.experiment,
            "fallback": self.fallback,
            "fallback_models": [str(ref) for ref in self.fallback_models],
            "canary": None if self.canary is None else self.canary.to_dict(),
            "log_share": self.log_share,
            "version": self.version,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "RouteSpec":
        """Return the route in a JSON document.

        An arm's name defaults to its model's, its weight to 1.  Raises ValidationError for a
        missing or unknown key, a wrong type or form.
        """
        name = check_name(_take(document, "name", "a route"), "route")
        what = f"route {name!r}"
        _refuse_unknown(document, _ROUTE_KEYS, what)
        arms, shadows = document.get("arms"), document.get("shadows") or []
        spare = document.get("fallback_models") or []
        if not all(isinstance(part, list) for part in (arms, shadows, spare)):
            raise _invalid(name, "`arms`, `shadows` and `fallback_models` are lists")
        fallback, version = document.get("fallback"), document.get("version", 1)
        canary, share = document.get("canary"), document.get("log_share")
        return cls(
            name=name,
            service=_take(document, "service", what),
            arms=tuple(_parse_arm(arm, name) for arm in arms or ()),
            shadows=tuple(ModelRef.parse(ref, f"shadow of {what}") for ref in shadows),
            experiment=document.get("experiment"),
            fallback=None if fallback is None else _number(fallback, "fallback", name),
            fallback_models=tuple(ModelRef.parse(ref, f"fallback of {what}") for ref in spare),
            canary=None if canary is None else Canary.from_dict(canary),
            log_share=1.0 if share is None else _number(share, "log_share", name),
            version=version,
        )


def diff_routes(old: RouteSpec | None, new: RouteSpec | None) -> list[dict[str, Any]]:
    """Return what changes from `old` to `new`, versions aside: `{"path", "from", "to"}` each.

    None means that the route doesn't exist.  Paths look like `fallback` and `arms.champion.weight`;
    an arm that comes or goes is one entry.
    """
    before, after = _flat(old), _flat(new)
    return [
        {"path": path, "from": before.get(path), "to": after.get(path)}
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    ]


_ROUTE_KEYS = {
    *("name", "service", "arms", "shadows", "experiment"),
    *("fallback", "fallback_models", "canary", "log_share", "version"),
}
_ARM_KEYS = {"name", "model", "weight"}


def _problems(route: RouteSpec) -> Iterator[str]:
    names = [arm.name for arm in route.arms]
    weights = [arm.weight for arm in route.arms]
    if not 1 <= len(names) <= ARMS_MAX or len(route.shadows) > ARMS_MAX:
        yield f"it takes 1 to {ARMS_MAX} arms and at most {ARMS_MAX} shadows"
    if len(route.fallback_models) > ARMS_MAX:
        yield f"it takes at most {ARMS_MAX} fallback models"
    if len(set(names)) < len(names):
        yield "two arms have the same name"
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        yield f"weights are finite and not negative, got {weights}"
    if sum(weights) <= 0:
        yield "all weights are 0, so no arm could be chosen"
    if len(set(route.shadows)) < len(route.shadows):
        yield "two shadows are the same"
    if len(set(route.fallback_models)) < len(route.fallback_models):
        yield "two fallback models are the same"
    yield from _more_problems(route)
    if route.fallback is not None and not math.isfinite(route.fallback):
        yield "the fallback is not finite"
    if type(route.version) is not int or route.version < 1:
        yield f"the version is a number from 1, got {route.version!r}"


def _more_problems(route: RouteSpec) -> Iterator[str]:
    if not 0.0 < route.log_share <= 1.0:
        yield f"its log_share lies above 0 and up to 1, got {route.log_share}"
    if route.canary is None:
        return
    if route.canary.arm not in route.weights or len(route.weights) == 1:
        yield f"its canary moves one of its arms beside others, got {route.canary.arm!r}"
    if route.experiment is not None:
        yield "it has an experiment and a canary; one of them moves the weights"


def _parse_arm(document: object, route: str) -> Arm:
    if not isinstance(document, Mapping):
        raise _invalid(route, f"an arm is an object, got {document!r}")
    what = f"an arm of route {route!r}"
    _refuse_unknown(document, _ARM_KEYS, what)
    model = ModelRef.parse(_take(document, "model", what), f"model of {what}")
    weight = _number(document.get("weight", 1.0), "weight", route)
    return Arm(document.get("name", model.model), model, weight)


def _number(value: object, what: str, route: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise _invalid(route, f"the {what} is a number, got {value!r}")


def _take(document: Mapping[str, Any], key: str, what: str) -> Any:
    if key in document:
        return document[key]
    raise ValidationError(
        f"{what} has no {key!r}", code="invalid_route", hint=f"Give {key!r}; see /docs."
    )


def _refuse_unknown(document: Mapping[str, Any], known: set[str], what: str) -> None:
    if unknown := sorted(map(str, document.keys() - known)):
        raise ValidationError(
            f"{what} has the unknown key {unknown[0]!r}",
            code="invalid_route",
            hint=f"Known keys: {', '.join(sorted(known))}.",
        )


def _flat(route: RouteSpec | None) -> dict[str, Any]:
    if route is None:
        return {}
    document = route.to_dict()
    arms = document.pop("arms")
    del document["name"], document["version"]
    if document["log_share"] == 1.0:
        del document["log_share"]
    found = {key: value for key, value in document.items() if value not in (None, [])}
    for arm in arms:
        found |= {f"arms.{arm['name']}.{key}": arm[key] for key in ("model", "weight")}
    return found


def _invalid(route: str, problem: str) -> ValidationError:
    return ValidationError(
        f"route {route!r}: {problem}", code="invalid_route", hint="Correct the route; see /docs."
    )
