"""Verb routes: named endpoints kept with their history, their models loaded, swapped at once.

A change is loaded and checked first, stored as the next version, then swapped in as one reference:
requests under way finish on the route that they began with.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from mlpd.core.errors import ConflictError, MlpdError, NotFoundError, UnavailableError
from mlpd.core.specs import Closure
from mlpd.core.time import Clock, format_time
from mlpd.daemon.experiments import Experiments
from mlpd.daemon.packages import TrainedVersion, read_version
from mlpd.daemon.state import CatalogState
from mlpd.experiments.rendezvous import Rendezvous
from mlpd.registry.models import Registry
from mlpd.serving.pool import SessionPool
from mlpd.serving.routes import ModelRef, RouteSpec, diff_routes
from mlpd.serving.sessions import Session
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

ROUTES_MAX = 1_000
HISTORY_MAX = 100

_log = logging.getLogger("mlpd.routes")


@dataclass(frozen=True, slots=True)
class Served:
    """A version ready to predict: its files parsed, its session loaded and checked."""

    version: TrainedVersion
    session: Session


@dataclass(frozen=True, slots=True)
class LiveRoute:
    """A route at work; immutable, so a request holds one consistent whole.

    `arms`: by name; `draw`: chooses among them by unit when there is no experiment.
    """

    spec: RouteSpec
    closure: Closure
    arms: Mapping[str, Served]
    shadows: tuple[Served, ...]
    draw: Rendezvous


class Models:
    """Loads versions for routes and /v2; one copy of each, however many ask."""

    def __init__(self, registry: Registry, pool: SessionPool) -> None:
        self._registry = registry
        self._pool = pool
        self._served: dict[str, Served] = {}
        self._lock = asyncio.Lock()

    async def load(self, model: str, selector: int | str) -> Served:
        """Return a version, loaded; raises NotFoundError, or what loading raises."""
        version = self._registry.get(model, selector)
        found = self._served.get(version.reference)
        if found is not None:
            return found
        async with self._lock:
            if version.reference not in self._served:
                loaded = await self._registry.load(model, version.number)
                trained = await asyncio.to_thread(read_version, loaded)
                session = await self._pool.load(trained.package)
                self._served[version.reference] = Served(trained, session)
            return self._served[version.reference]

    def loaded(self) -> dict[str, Served]:
        """Return the loaded versions by `model@version`."""
        return dict(self._served)

    def unload(self, reference: str) -> None:
        """Forget a loaded version; requests and routes that hold it go on."""
        self._served.pop(reference, None)

    def keep_only(self, references: frozenset[str]) -> None:
        """Forget every loaded version that is not among `references`."""
        for reference in self._served.keys() - references:
            del self._served[reference]


class Routes:
    """All routes of a daemon; every method belongs to the loop."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        state: CatalogState,
        registry: Registry,
        models: Models,
        experiments: Experiments,
        clock: Clock,
    ) -> None:
        self._environment = environment
        self._writer = writer
        self._state = state
        self._registry = registry
        self._models = models
        self._experiments = experiments
        self._clock = clock
        self._specs: dict[str, RouteSpec] = {}
        self._live: dict[str, LiveRoute] = {}
        self._broken: dict[str, str] = {}
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Load every stored route; one that can't be loaded is logged and answers 503."""
        with self._environment.snapshot() as snapshot:
            stored = [value for _, value in snapshot.scan(Table.ROUTES, b"c", b"d")]
        for value in stored:
            spec = RouteSpec.from_dict(msgpack.unpackb(value))
            self._specs[spec.name] = spec
            await self._reload(spec)

    def live(self, name: str) -> LiveRoute:
        """Return the route that serves `name` now.

        Raises NotFoundError(code="unknown_route"), or UnavailableError(code="route_broken").
        """
        live = self._live.get(name)
        if live is not None:
            return live
        self._find(name)
        raise UnavailableError(
            f"route {name!r} can't serve: {self._broken.get(name, 'it is being loaded')}",
            code="route_broken",
            hint="mlpd routes show tells more; roll it back or point it at another version.",
        )

    def all(self) -> list[dict[str, Any]]:
        """Return all routes by name."""
        return [self.get(name) for name in sorted(self._specs)]

    def get(self, name: str) -> dict[str, Any]:
        """Return a route with the versions that serve it now."""
        spec, live = self._find(name), self._live.get(name)
        return {
            **spec.to_dict(),
            "serving": None
            if live is None
            else {arm: served.version.reference for arm, served in live.arms.items()},
            "error": self._broken.get(name),
        }

    def history(self, name: str) -> list[dict[str, Any]]:
        """Return a route's versions, newest first, each with what it changed."""
        self._find(name)
        prefix = _history_prefix(name)
        found: list[dict[str, Any]] = []
        with self._environment.snapshot() as snapshot:
            for _, value in snapshot.scan(Table.ROUTES, prefix, prefix + b"\xff" * 5, reverse=True):
                entry = msgpack.unpackb(value)
                found.append({**entry, "at": format_time(entry["at"])})
                if len(found) == HISTORY_MAX:
                    break
        return found

    async def put(
        self, name: str, document: Mapping[str, Any], *, by: str, expected: int | None = None
    ) -> dict[str, Any]:
        """Make `document` the next version of route `name`; loaded and swapped on return.

        `expected`: the version that the caller has seen, 0 for a new route; another one raises
        ConflictError(code="route_changed").
        """
        async with self._lock:
            old = self._specs.get(name)
            version = 0 if old is None else old.version
            newest = self._newest_version(name)
            if expected not in (None, version):
                raise ConflictError(
                    f"route {name!r} is at version {version}, not {expected}",
                    code="route_changed",
                    hint="Look at it again and repeat your change.",
                )
            if old is None and len(self._specs) >= ROUTES_MAX:
                raise ConflictError(f"there are {ROUTES_MAX} routes already", code="too_many")
            spec = RouteSpec.from_dict({**document, "name": name, "version": newest + 1})
            live = await self._load(spec)
            await self._store(old, spec, by)
            self._specs[name] = spec
            self._swap(live)
        return self.get(name)

    async def rollback(self, name: str, version: int, *, by: str) -> dict[str, Any]:
        """Make an earlier version's content the next version."""
        self._find(name)
        with self._environment.snapshot() as snapshot:
            key = _history_prefix(name) + version.to_bytes(4, "big")
            value = snapshot.get(Table.ROUTES, key) if 0 < version < 1 << 31 else None
        if value is None:
            raise NotFoundError(
                f"route {name!r} has no version {version}", code="unknown_route_version"
            )
        document = msgpack.unpackb(value)["route"]
        return await self.put(name, document, by=f"{by}: rollback to {version}")

    async def delete(self, name: str, *, by: str) -> None:
        """Remove a route; its history stays."""
        async with self._lock:
            old = self._find(name)

            def write(txn: WriteTransaction) -> None:
                txn.delete(Table.ROUTES, b"c" + name.encode())
                entry = {
                    "version": old.version + 1,
                    "at": txn.known_us,
                    "by": by,
                    "changes": diff_routes(old, None),
                    "route": None,
                }
                txn.put(Table.ROUTES, _history_key(name, old.version + 1), msgpack.packb(entry))

            await self._writer.write(write)
            self._specs.pop(name)
            self._live.pop(name, None)
            self._broken.pop(name, None)
            self._forget_unused()

    async def refresh(self, model: str) -> None:
        """Load again the routes that name `model` by an alias: it may have moved."""
        async with self._lock:
            for spec in list(self._specs.values()):
                if any(ref.model == model and ref.version is None for ref in spec.references):
                    await self._reload(spec)

    async def refresh_all(self) -> None:
        """Load all routes again: the definitions have changed."""
        async with self._lock:
            for spec in list(self._specs.values()):
                await self._reload(spec)

    def _newest_version(self, name: str) -> int:
        """Return the last number that the route's history used; it outlives deletion."""
        prefix = _history_prefix(name)
        with self._environment.snapshot() as snapshot:
            newest = snapshot.scan(Table.ROUTES, prefix, prefix + b"\xff" * 5, reverse=True)
            return next((int.from_bytes(key[-4:], "big") for key, _ in newest), 0)

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

    async def _reload(self, spec: RouteSpec) -> None:
        try:
            live = await self._load(spec)
        except MlpdError as error:
            _log.exception("route %s can't be loaded", spec.name)
            self._broken[spec.name] = error.message
            return
        self._swap(live)

    def _swap(self, live: LiveRoute) -> None:
        self._live[live.spec.name] = live
        self._broken.pop(live.spec.name, None)
        self._forget_unused()

    def _forget_unused(self) -> None:
        self._models.keep_only(
            frozenset(
                served.version.reference
                for live in self._live.values()
                for served in (*live.arms.values(), *live.shadows)
            )
        )

    async def _load(self, spec: RouteSpec) -> LiveRoute:
        catalog = self._state.catalog
        catalog.definitions.service(spec.service)
        closure = catalog.closures[spec.service]
        if spec.experiment is not None:
            _check_experiment(spec, self._experiments)
        arms = {arm.name: await self._serve(arm.model, closure) for arm in spec.arms}
        shadows = tuple([await self._serve(ref, closure) for ref in spec.shadows])
        weights = {arm.name: arm.weight for arm in spec.arms}
        return LiveRoute(spec, closure, arms, shadows, Rendezvous(("route", spec.name), weights))

    async def _serve(self, ref: ModelRef, closure: Closure) -> Served:
        number = ref.resolve(lambda model, alias: self._registry.get(model, alias).number)
        served = await self._models.load(ref.model, number)
        pinned = served.version.lineage.service_hash
        if pinned != closure.hash:
            raise ConflictError(
                f"{served.version.reference} was trained on another version of service "
                f"{closure.service.name!r} ({pinned[:8]}, now {closure.hash[:8]})",
                code="service_mismatch",
                hint="Train it again on the present definitions, or apply the former ones.",
            )
        return served

    async def _store(self, old: RouteSpec | None, spec: RouteSpec, by: str) -> None:
        changes = diff_routes(old, spec)
        document = spec.to_dict()

        def write(txn: WriteTransaction) -> None:
            entry = {
                "version": spec.version,
                "at": txn.known_us,
                "by": by,
                "changes": changes,
                "route": document,
            }
            txn.put(Table.ROUTES, b"c" + spec.name.encode(), msgpack.packb(document))
            txn.put(Table.ROUTES, _history_key(spec.name, spec.version), msgpack.packb(entry))

        await self._writer.write(write)


def _check_experiment(spec: RouteSpec, experiments: Experiments) -> None:
    experiment = experiments.spec(spec.experiment or "")
    arms = {arm.name for arm in spec.arms}
    if missing := sorted(experiment.weights.keys() - arms):
        raise ConflictError(
            f"experiment {experiment.name!r} has the arm {missing[0]!r}, "
            f"which route {spec.name!r} lacks",
            code="experiment_arms",
            hint="Give the route an arm of that name.",
        )


def _history_prefix(name: str) -> bytes:
    return b"h" + name.encode() + b"\x00"


def _history_key(name: str, version: int) -> bytes:
    return _history_prefix(name) + version.to_bytes(4, "big")
