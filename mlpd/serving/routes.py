"""Routes: named endpoints with weighted arms, shadows, an experiment and a fallback; values."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlpd.core.errors import ValidationError
from mlpd.core.names import check_identifier, check_name

ARMS_MAX = 32
"""Most arms, and most shadows, of one route."""

Resolve = Callable[[str, str], int]
"""Returns the version behind (model, alias); raises NotFoundError for an unknown one."""

_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True, order=True)
class ModelRef:
    """A model version by number, or by an alias that is looked up whenever routes are applied."""

    model: str
    target: str

    @classmethod
    def parse(cls, text: object, what: str = "model reference") -> "ModelRef":
        """Return the reference in `flight-risk@champion` or `flight-risk@3`.

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
        check_name(target, "alias")
        return cls(model, target)

    @property
    def version(self) -> int | None:
        """The version number, None for an alias."""
        return int(self.target) if self.target.isdigit() else None

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
    the arm, or None.  `fallback`: the score answered when no arm can, or None for an error.
    `version` counts the route's changes from 1; the store of routes sets it.
    Constructing validates: ValidationError(code="invalid_route") names the route and the problem.
    """

    name: str
    service: str
    arms: tuple[Arm, ...]
    shadows: tuple[ModelRef, ...] = ()
    experiment: str | None = None
    fallback: float | None = None
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
        """All models that the route needs loaded."""
        return frozenset(arm.model for arm in self.arms) | frozenset(self.shadows)

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
        if not isinstance(arms, list) or not isinstance(shadows, list):
            raise _invalid(name, "`arms` and `shadows` are lists")
        fallback, version = document.get("fallback"), document.get("version", 1)
        return cls(
            name=name,
            service=_take(document, "service", what),
            arms=tuple(_parse_arm(arm, name) for arm in arms),
            shadows=tuple(ModelRef.parse(ref, f"shadow of {what}") for ref in shadows),
            experiment=document.get("experiment"),
            fallback=None if fallback is None else _number(fallback, "fallback", name),
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


_ROUTE_KEYS = {"name", "service", "arms", "shadows", "experiment", "fallback", "version"}
_ARM_KEYS = {"name", "model", "weight"}


def _problems(route: RouteSpec) -> Iterator[str]:
    names = [arm.name for arm in route.arms]
    weights = [arm.weight for arm in route.arms]
    if not 1 <= len(names) <= ARMS_MAX or len(route.shadows) > ARMS_MAX:
        yield f"it takes 1 to {ARMS_MAX} arms and at most {ARMS_MAX} shadows"
    if len(set(names)) < len(names):
        yield "two arms have the same name"
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        yield f"weights are finite and not negative, got {weights}"
    if sum(weights) <= 0:
        yield "all weights are 0, so no arm could be chosen"
    if len(set(route.shadows)) < len(route.shadows):
        yield "two shadows are the same"
    if route.fallback is not None and not math.isfinite(route.fallback):
        yield "the fallback is not finite"
    if type(route.version) is not int or route.version < 1:
        yield f"the version is a number from 1, got {route.version!r}"


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
    found = {key: value for key, value in document.items() if value not in (None, [])}
    for arm in arms:
        found |= {f"arms.{arm['name']}.{key}": arm[key] for key in ("model", "weight")}
    return found


def _invalid(route: str, problem: str) -> ValidationError:
    return ValidationError(
        f"route {route!r}: {problem}", code="invalid_route", hint="Correct the route; see /docs."
    )
