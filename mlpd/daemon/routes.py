"""Verb routes: named endpoints kept with their history, their models loaded, swapped at once.

A change is loaded and checked first, stored as the next version, then swapped in as one reference:
requests under way finish on the route that they began with.
"""

import asyncio
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlpd.core.closure import join_inputs
from mlpd.core.errors import ConflictError, MlpdError, NotFoundError, UnavailableError
from mlpd.core.specs import Closure
from mlpd.core.time import Clock
from mlpd.daemon.experiments import Experiments
from mlpd.daemon.route_store import RouteStore
from mlpd.daemon.state import CatalogState
from mlpd.daemon.trial_steps import begin_trial, next_change, try_challenger
from mlpd.daemon.trials import Trials, show_trial
from mlpd.daemon.versions import Versions
from mlpd.experiments.rendezvous import Rendezvous
from mlpd.serving.canary import share_weights
from mlpd.serving.package import ModelPackage
from mlpd.serving.predictor import ServedModel
from mlpd.serving.routes import RouteSpec
from mlpd.serving.snapshot import LiveRoute
from mlpd.serving.table import ModelTable
from mlpd.serving.trial import Trial

ROUTES_MAX = 1_000

_log = logging.getLogger("mlpd.routes")


@dataclass(frozen=True, slots=True)
class ServedRoute:
    """A route at work; immutable, so a request holds one consistent whole.

    `hashes`: of the version of the service that each model reads, by its reference; `versions` by
    these hashes.  `asks`: the keys and request fields of all of them, which a request brings.
    `live`: the loaded arms and shadows.  `draw`: chooses an arm by unit without an experiment.
    `fallbacks`: versions that read the features of the arms, too.
    """

    spec: RouteSpec
    hashes: Mapping[str, str]
    versions: Mapping[str, Closure]
    asks: Closure
    live: LiveRoute
    draw: Rendezvous
    fallbacks: tuple[ServedModel, ...] = ()


class Routes:
    """All routes of a daemon; every method belongs to the loop."""

    def __init__(
        self,
        store: RouteStore,
        state: CatalogState,
        table: ModelTable,
        versions: Versions,
        experiments: Experiments,
        clock: Clock,
    ) -> None:
        self._store = store
        self._state = state
        self._table = table
        self._versions = versions
        self._experiments = experiments
        self._clock = clock
        self.trials = Trials()
        self._specs: dict[str, RouteSpec] = {}
        self._served: dict[str, ServedRoute] = {}
        self._broken: dict[str, str] = {}
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Load every stored route; one that can't be loaded is logged and answers 503."""
        specs, trials = self._store.load()
        self.trials.restore(trials)
        for spec in specs:
            self._specs[spec.name] = spec
            await self._serve_or_note(spec)

    def served(self, name: str) -> ServedRoute:
        """Return the route that serves `name` now.

        Raises NotFoundError(code="unknown_route"), or UnavailableError(code="route_broken").
        """
        served = self._served.get(name)
        if served is not None:
            return served
        self._find(name)
        raise UnavailableError(
            f"route {name!r} can't serve: {self._broken.get(name, 'it is being loaded')}",
            code="route_broken",
            hint="mlpd routes show tells more; roll it back or point it at another version.",
        )

    def pins(self) -> list[tuple[str, str]]:
        """Return (route, service hash) of all that is served now; any thread."""
        return [
            (f"route {name}", service_hash)
            for name, served in self._served.items()
            for service_hash in served.versions
        ]

    def all(self) -> list[dict[str, Any]]:
        """Return all routes by name."""
        return [self.get(name) for name in sorted(self._specs)]

    def get(self, name: str) -> dict[str, Any]:
        """Return a route with the versions that serve it now."""
        spec, served, trial = self._find(name), self._served.get(name), self.trials.get(name)
        serving, fallbacks = None, []
        if served is not None:
            serving = {arm: m.package.reference for arm, m in served.live.arms.items()}
            fallbacks = [model.package.reference for model in served.fallbacks]
        return {
            **spec.to_dict(),
            "serving": serving,
            "serving_fallbacks": fallbacks,
            "trial": None if trial is None else show_trial(trial),
            "error": self._broken.get(name),
        }

    def history(self, name: str) -> list[dict[str, Any]]:
        """Return a route's versions, newest first, each with what it changed."""
        self._find(name)
        return self._store.history(name)

    async def put(
        self, name: str, document: Mapping[str, Any], *, by: str, expected: int | None = None
    ) -> dict[str, Any]:
        """Make `document` the next version of route `name`; loaded and swapped on return.

        A canary begins with it, unless it is the one that runs: then that goes on at its step.
        `expected`: the version that the caller has seen, 0 for a new route; another one raises
        ConflictError(code="route_changed").
        """
        async with self._lock:
            await self._put(name, document, by, expected=expected)
        return self.get(name)

    async def rollback(self, name: str, version: int, *, by: str) -> dict[str, Any]:
        """Make an earlier version's content the next version, with its weights as they were.

        Of a canary only these come back: none runs afterwards.
        """
        self._find(name)
        document = {**self._store.document(name, version), "canary": None}
        async with self._lock:
            await self._put(name, document, f"{by}: rollback to {version}")
        return self.get(name)

    async def delete(self, name: str, *, by: str) -> None:
        """Remove a route; its history stays."""
        async with self._lock:
            await self._store.delete(self._find(name), by)
            del self._specs[name]
            self.trials.set(name, None)
            self._broken.pop(name, None)
            await self._serve({n: s for n, s in self._working().items() if n != name}, None)

    async def follow_canary(self, name: str) -> None:
        """Do what the route's canary asks for now: nothing, its next step, its end."""
        async with self._lock:
            spec, trial = self._specs.get(name), self.trials.get(name)
            served = self._served.get(name)
            if spec is None or trial is None or served is None or not trial.is_running:
                return
            change = next_change(spec, trial, served.live, self._clock())
            if change is not None:
                await self._move(spec, change.spec, change.trial, change.by)

    async def begin_canaries(self, model: str, share: float, *, by: str) -> list[str]:
        """Give `model@challenger` a share of each route that serves the champion; return these.

        Routes with an experiment or another canary, and those that can't serve the challenger, are
        left alone (the latter are logged).  Again does nothing more.
        """
        begun = []
        for spec in sorted(self._specs.values(), key=lambda spec: spec.name):
            tried = try_challenger(spec, model, share)
            if tried is None:
                continue
            try:
                if tried != spec:
                    await self.put(spec.name, tried.to_dict(), by=by, expected=spec.version)
            except MlpdError as error:
                _log.warning("route %s gets no canary: %s", spec.name, error.message)
            else:
                begun.append(spec.name)
        return begun

    async def _put(
        self,
        name: str,
        document: Mapping[str, Any],
        by: str,
        *,
        expected: int | None = None,
    ) -> None:
        old = self._specs.get(name)
        version = 0 if old is None else old.version
        if expected not in (None, version):
            raise ConflictError(
                f"route {name!r} is at version {version}, not {expected}",
                code="route_changed",
                hint="Look at it again and repeat your change.",
            )
        if old is None and len(self._specs) >= ROUTES_MAX:
            raise ConflictError(f"there are {ROUTES_MAX} routes already", code="too_many")
        newest = self._store.newest_version(name)
        spec = RouteSpec.from_dict({**document, "name": name, "version": newest + 1})
        self._check(spec)
        trial = begin_trial(old, spec, self.trials.get(name), self._clock())
        await self._move(old, spec, trial, by)
        self._broken.pop(name, None)

    async def _move(
        self, old: RouteSpec | None, spec: RouteSpec, trial: Trial | None, by: str
    ) -> None:
        """Serve a route's next version and store it, with the weights of its trial's step."""
        if trial is not None and trial.is_running:
            weights = share_weights(trial.weights, trial.canary.arm, trial.now.share)
            spec = spec.with_weights(weights)
        await self._serve({**self._working(), spec.name: spec}, spec.name)
        if trial is not None and trial.is_running:
            live = self._served[spec.name].live
            trial = replace(trial, reference=live.arms[trial.canary.arm].package.reference)
        await self._store.put(old, spec, trial, by)
        self._specs[spec.name] = spec
        self.trials.set(spec.name, trial)

    async def follow(self, names: Collection[str]) -> None:
        """Go by what is stored of routes now, whoever stored it; one that can't serve is noted."""
        async with self._lock:
            specs, trials = await asyncio.to_thread(self._store.load)
            stored = {spec.name: spec for spec in specs}
            for name in sorted(names):
                self.trials.set(name, trials.get(name))
                if name in stored:
                    self._specs[name] = stored[name]
                    await self._serve_or_note(stored[name])
                elif self._specs.pop(name, None) is not None:
                    self._broken.pop(name, None)
                    await self._serve({n: s for n, s in self._working().items() if n != name}, None)

    async def refresh(self) -> None:
        """Serve what aliases and definitions say now; a route that can't goes on as it was."""
        async with self._lock:
            for spec in list(self._specs.values()):
                await self._serve_or_note(spec)

    def _find(self, name: str) -> RouteSpec:
        spec = self._specs.get(name)
        if spec is None:
            known = ", ".join(sorted(self._specs)) or "none"
            raise NotFoundError(
                f"unknown route {name!r}; known: {known}",
                code="unknown_route",
                hint="mlpd routes set NAME ... makes one.",
            )
        return spec

    def _working(self) -> dict[str, RouteSpec]:
        return {name: served.spec for name, served in self._served.items()}

    async def _serve_or_note(self, spec: RouteSpec) -> None:
        try:
            self._check(spec)
            await self._serve({**self._working(), spec.name: spec}, spec.name)
        except MlpdError as error:
            _log.warning("route %s can't be served: %s", spec.name, error.message)
            self._broken[spec.name] = error.message
        else:
            self._broken.pop(spec.name, None)

    async def _serve(self, specs: Mapping[str, RouteSpec], changed: str | None) -> None:
        """Load what `specs` need, check it, and make them the routes that are served.

        Raises, and changes nothing, if the route `changed` can't be served; another one that can't
        goes on as it was.
        """
        before = self._working()
        await self._table.apply(specs.values())
        served: dict[str, ServedRoute] = {}
        for name, live in self._table.routes().items():
            try:
                served[name] = self._resolve(live)
            except MlpdError:
                if name == changed:
                    await self._table.apply(before.values())
                    raise
                served[name] = self._served[name]
        self._served = served
        self._versions.hold(frozenset().union(*(route.hashes for route in served.values())))

    def _check(self, spec: RouteSpec) -> None:
        catalog = self._state.catalog
        if not any(spec.service in c.closures for c in (catalog, *catalog.pinned.values())):
            catalog.definitions.service(spec.service)  # raises
        if spec.experiment is not None:
            _check_experiment(spec, self._experiments)

    def _resolve(self, live: LiveRoute) -> ServedRoute:
        models = {model.package.reference: model for model in (*live.arms.values(), *live.shadows)}
        closures = {reference: self._closure(live.spec, reference) for reference in models}
        hashes = {reference: closure.hash for reference, closure in closures.items()}
        versions = {closure.hash: closure for closure in closures.values()}
        fallbacks = tuple(m for m in live.fallbacks if self._hash_of(m.package) in versions)
        hashes |= {m.package.reference: self._hash_of(m.package) for m in fallbacks}
        weights = {arm.name: arm.weight for arm in live.spec.arms}
        draw = Rendezvous(("route", live.spec.name), weights)
        asks = join_inputs(tuple(versions.values()))
        return ServedRoute(live.spec, hashes, versions, asks, live, draw, fallbacks)

    def _hash_of(self, package: ModelPackage) -> str:
        """Return which version of its service a loaded version was trained on."""
        return self._versions.get(package.reference).lineage.service_hash

    def _closure(self, spec: RouteSpec, reference: str) -> Closure:
        """Return what a loaded version reads: its own version of the service, while that runs."""
        pinned = self._versions.get(reference).lineage.service_hash
        closure = self._state.catalog.find_closure(spec.service, pinned)
        if closure is None:
            raise service_mismatch(reference, spec.service, pinned)
        return closure


def service_mismatch(reference: str, service: str, pinned: str) -> ConflictError:
    """Return the error for a model whose version of the service doesn't run."""
    return ConflictError(
        f"{reference} was trained on a version of service {service!r} that doesn't run any more "
        f"({pinned[:8]})",
        code="service_mismatch",
        hint="Train it again on the present definitions, or apply the former ones.",
    )


def _check_experiment(spec: RouteSpec, experiments: Experiments) -> None:
    name, arms = spec.experiment or "", {arm.name for arm in spec.arms}
    if missing := sorted(set(experiments.arms(name)) - arms):
        raise ConflictError(
            f"experiment {name!r} has the arm {missing[0]!r}, which route {spec.name!r} lacks",
            code="experiment_arms",
            hint="Give the route an arm of that name.",
        )
