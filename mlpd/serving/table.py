"""The models and routes that are served now: one immutable snapshot, swapped as one reference.

A request takes its route or model once and keeps what it took, so it sees one state of the table
from start to end; a version swapped out lives until its last request lets go of it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

from mlpd.core.errors import ConflictError, MlpdError, NotFoundError, ValidationError
from mlpd.serving.batcher import Batcher
from mlpd.serving.package import ModelPackage
from mlpd.serving.pool import SessionPool
from mlpd.serving.predictor import ServedModel
from mlpd.serving.routes import ModelRef, RouteSpec

CHAMPION = "champion"
"""The alias behind a model's name alone."""

Aliases = Callable[[str], Mapping[str, int]]
"""Returns the versions behind a model's aliases; NotFoundError for an unknown model."""
Fetch = Callable[[str, int], Awaitable[ModelPackage]]
"""Returns the package of a version from the registry, digests verified, or raises."""


@dataclass(frozen=True, slots=True)
class LiveRoute:
    """A route with the loaded versions of its arms, by arm name, and of its shadows, in order."""

    spec: RouteSpec
    arms: Mapping[str, ServedModel]
    shadows: tuple[ServedModel, ...]

    def arm(self, name: str) -> ServedModel:
        """Return an arm's version, else raise ValidationError(code="unknown_arm")."""
        found = self.arms.get(name)
        if found is None:
            self.spec.arm(name)  # raises with the known arms
            raise KeyError(name)
        return found


@dataclass(frozen=True, slots=True)
class _Snapshot:
    routes: Mapping[str, LiveRoute] = field(default_factory=dict)
    models: Mapping[str, Mapping[int, ServedModel]] = field(default_factory=dict)
    aliases: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


class ModelTable:
    """Keeps loaded what routes and explicit loads refer to; all methods belong to the loop.

    A change loads what it needs first and swaps then; if anything fails, nothing has changed.
    Aliases are looked up at a change: call `refresh` after one has moved.
    """

    def __init__(
        self, pool: SessionPool, batcher: Batcher, *, aliases: Aliases, fetch: Fetch
    ) -> None:
        self._pool, self._batcher = pool, batcher
        self._aliases, self._fetch = aliases, fetch
        self._pins: frozenset[ModelRef] = frozenset()
        self._now = _Snapshot()
        self._changing = asyncio.Lock()

    def route(self, name: str) -> LiveRoute:
        """Return the route, else raise NotFoundError(code="unknown_route")."""
        found = self._now.routes.get(name)
        if found is None:
            raise _unknown("route", name, self._now.routes)
        return found

    def routes(self) -> Mapping[str, LiveRoute]:
        """Return all routes by name."""
        return self._now.routes

    def find(self, model: str, target: str | int | None = None) -> ServedModel:
        """Return a loaded version by number or alias, None meaning the champion.

        Raises NotFoundError: `unknown_model`, `unknown_version`.
        """
        now = self._now
        versions = now.models.get(model)
        if versions is None:
            raise _unknown("model", model, now.models)
        text = CHAMPION if target is None else str(target)
        number = int(text) if text.isdigit() else now.aliases[model].get(text)
        found = None if number is None else versions.get(number)
        if found is None:
            loaded = ", ".join(map(str, versions))
            raise NotFoundError(
                f"model {model!r} has no loaded version {text!r}; loaded: {loaded}",
                code="unknown_version",
                hint="Load it, or name a version or alias that is loaded.",
            )
        return found

    def models(self) -> Mapping[str, Mapping[int, ServedModel]]:
        """Return all loaded versions by model and number."""
        return self._now.models

    async def apply(self, specs: Iterable[RouteSpec]) -> None:
        """Make these the routes, all at once; requests under way finish with what they have.

        Raises what loading raises, NotFoundError for an unknown model or alias, ValidationError
        (code="route_mismatch") for arms that don't give the same kind of score.
        """
        wanted = {spec.name: spec for spec in specs}
        async with self._changing:
            await self._change(wanted, self._pins)

    async def refresh(self) -> None:
        """Look all aliases up again and serve what they point at now."""
        async with self._changing:
            await self._change(self._specs(), self._pins)

    async def load(self, ref: ModelRef) -> ServedModel:
        """Keep a version, or whatever an alias points at, loaded until `unload`; return it."""
        async with self._changing:
            await self._change(self._specs(), self._pins | {ref})
            return self.find(ref.model, ref.target)

    async def unload(self, model: str, target: str | None = None) -> None:
        """Let go of a model's explicit loads, or of one; its memory goes with its last request.

        Raises NotFoundError for what isn't loaded, ConflictError(code="model_in_use") for what a
        route refers to.
        """
        async with self._changing:
            self.find(model, target) if target else self._known(model)
            dropped = {p for p in self._pins if p.model == model and target in (None, p.target)}
            for spec in self._specs().values():
                for ref in spec.references:
                    if ref.model == model and target in (None, ref.target):
                        raise ConflictError(
                            f"route {spec.name!r} uses {ref}",
                            code="model_in_use",
                            hint="Change the route first.",
                        )
            await self._change(self._specs(), self._pins - dropped)

    def _specs(self) -> dict[str, RouteSpec]:
        return {name: route.spec for name, route in self._now.routes.items()}

    def _known(self, model: str) -> None:
        if model not in self._now.models:
            raise _unknown("model", model, self._now.models)

    async def _change(self, specs: Mapping[str, RouteSpec], pins: frozenset[ModelRef]) -> None:
        refs = pins.union(*(spec.references for spec in specs.values()))
        aliases = {ref.model: dict(self._aliases(ref.model)) for ref in refs}
        versions = {ref: _resolve(ref, aliases[ref.model]) for ref in refs}
        wanted = sorted({(ref.model, version) for ref, version in versions.items()})
        loaded = await asyncio.gather(
            *(self._serve(model, version) for model, version in wanted), return_exceptions=True
        )
        served: dict[tuple[str, int], ServedModel] = {}
        for key, outcome in zip(wanted, loaded, strict=True):
            if isinstance(outcome, BaseException):
                raise outcome
            served[key] = outcome
        by_ref = {ref: served[ref.model, version] for ref, version in versions.items()}
        self._now = _Snapshot(
            routes={name: _live(spec, by_ref) for name, spec in specs.items()},
            models=_by_model(served),
            aliases=aliases,
        )
        self._pins = pins

    async def _serve(self, model: str, version: int) -> ServedModel:
        """Return what serves a version: the same object as now if it's loaded already."""
        present = self._now.models.get(model, {}).get(version)
        if present is not None:
            return present
        session = await self._pool.load(await self._fetch(model, version))
        return ServedModel(session, self._batcher)


def _resolve(ref: ModelRef, aliases: Mapping[str, int]) -> int:
    def look_up(model: str, alias: str) -> int:
        if alias not in aliases:
            raise NotFoundError(
                f"model {model!r} has no alias {alias!r}; it has {', '.join(aliases) or 'none'}",
                code="unknown_alias",
                hint="Set the alias first, or name a version.",
            )
        return aliases[alias]

    return ref.resolve(look_up)


def _live(spec: RouteSpec, served: Mapping[ModelRef, ServedModel]) -> LiveRoute:
    route = LiveRoute(
        spec,
        {arm.name: served[arm.model] for arm in spec.arms},
        tuple(served[ref] for ref in spec.shadows),
    )
    models = (*route.arms.values(), *route.shadows)
    kinds = {(m.package.trained, m.session.outputs if m.package.trained else 0) for m in models}
    if len(kinds) > 1 or not next(iter(kinds))[0]:
        raise ValidationError(
            f"the models of route {spec.name!r} are not all trained ones with the same outputs",
            code="route_mismatch",
            hint="A route serves trained models; reach a user's ONNX file under /v2.",
        )
    return route


def _by_model(
    served: Mapping[tuple[str, int], ServedModel],
) -> Mapping[str, Mapping[int, ServedModel]]:
    models: dict[str, dict[int, ServedModel]] = {}
    for (model, version), found in served.items():
        models.setdefault(model, {})[version] = found
    return models


def _unknown(what: str, name: str, known: Mapping[str, object]) -> MlpdError:
    return NotFoundError(
        f"unknown {what} {name!r}; served: {', '.join(sorted(known)) or 'none'}",
        code=f"unknown_{what}",
        hint="Check the spelling, or load it first.",
    )
