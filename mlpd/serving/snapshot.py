"""One state of what is served: routes with their loaded versions, models by number; immutable."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from mlpd.core.errors import NotFoundError, ValidationError
from mlpd.serving.budget import Key
from mlpd.serving.predictor import ServedModel
from mlpd.serving.routes import ModelRef, RouteSpec


@dataclass(frozen=True, slots=True)
class LiveRoute:
    """A route with the loaded versions of its arms, by arm name, and of its shadows, in order.

    `fallbacks`: those of its fallback models that can be served, in order.
    """

    spec: RouteSpec
    arms: Mapping[str, ServedModel]
    shadows: tuple[ServedModel, ...]
    fallbacks: tuple[ServedModel, ...] = ()

    def arm(self, name: str) -> ServedModel:
        """Return an arm's version, else raise ValidationError(code="unknown_arm")."""
        found = self.arms.get(name)
        if found is None:
            self.spec.arm(name)  # raises with the known arms
            raise KeyError(name)
        return found


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Routes by name, loaded versions and aliases by model, and versions that were evicted."""

    routes: Mapping[str, LiveRoute] = field(default_factory=dict)
    models: Mapping[str, Mapping[int, ServedModel]] = field(default_factory=dict)
    evicted: frozenset[Key] = frozenset()
    aliases: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def loaded(self) -> Iterator[tuple[Key, ServedModel]]:
        """Yield every loaded version."""
        for name, versions in self.models.items():
            for number, model in versions.items():
                yield (name, number), model

    def pinned(self) -> frozenset[Key]:
        """Return the versions that routes refer to."""
        return frozenset(
            (model.package.name, model.package.version)
            for route in self.routes.values()
            for model in (*route.arms.values(), *route.shadows, *route.fallbacks)
        )

    def versions(self, model: str) -> list[int]:
        """Return the versions of a model that answer requests, evicted ones too, in order."""
        evicted = (number for name, number in self.evicted if name == model)
        return sorted([*self.models.get(model, {}), *evicted])

    def plus(self, key: Key, served: ServedModel, aliases: Mapping[str, int]) -> "Snapshot":
        """Return this and one version more; `aliases` are its model's."""
        model, number = key
        return replace(
            self,
            models={**self.models, model: {**self.models.get(model, {}), number: served}},
            evicted=self.evicted - {key},
            aliases={**self.aliases, model: aliases},
        )

    def without(self, evicted: Collection[Key]) -> "Snapshot":
        """Return this with some of the loaded versions evicted."""
        left = {key: model for key, model in self.loaded() if key not in evicted}
        return replace(self, models=by_model(left), evicted=self.evicted | frozenset(evicted))


def resolve_ref(ref: ModelRef, aliases: Mapping[str, int]) -> int:
    """Return the version behind a reference, else raise NotFoundError(code="unknown_alias")."""

    def look_up(model: str, alias: str) -> int:
        if alias not in aliases:
            raise NotFoundError(
                f"model {model!r} has no alias {alias!r}; it has {', '.join(aliases) or 'none'}",
                code="unknown_alias",
                hint="Set the alias first, or name a version.",
            )
        return aliases[alias]

    return ref.resolve(look_up)


def build_live_route(spec: RouteSpec, served: Mapping[ModelRef, ServedModel]) -> LiveRoute:
    """Return a route at work; raises ValidationError(code="route_mismatch") for unlike models.

    Fallback models that are unlike, or not in `served`, are left out.
    """
    arms = {arm.name: served[arm.model] for arm in spec.arms}
    shadows = tuple(served[ref] for ref in spec.shadows)
    kinds = {_kind_of(model) for model in (*arms.values(), *shadows)}
    if len(kinds) > 1 or not next(iter(kinds))[0]:
        raise ValidationError(
            f"the models of route {spec.name!r} are not all trained ones with the same outputs",
            code="route_mismatch",
            hint="A route serves trained models; reach a user's ONNX file under /v2.",
        )
    spare = (served[ref] for ref in spec.fallback_models if ref in served)
    return LiveRoute(spec, arms, shadows, tuple(m for m in spare if _kind_of(m) in kinds))


def _kind_of(model: ServedModel) -> tuple[bool, int]:
    trained = model.package.trained
    return trained, model.session.outputs if trained else 0


def by_model(served: Mapping[Key, ServedModel]) -> Mapping[str, Mapping[int, ServedModel]]:
    """Return versions by model and number."""
    models: dict[str, dict[int, ServedModel]] = {}
    for (model, version), found in served.items():
        models.setdefault(model, {})[version] = found
    return models
