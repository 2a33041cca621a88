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
from mlpd.core.time import format_time
from mlpd.daemon.experiments import Experiments
from mlpd.daemon.packages import TrainedVersion, read_version
from mlpd.daemon.state import CatalogState
from mlpd.experiments.rendezvous import Rendezvous
from mlpd.registry.models import Registry
from mlpd.serving.package import ModelPackage
from mlpd.serving.routes import RouteSpec, diff_routes
from mlpd.serving.snapshot import LiveRoute
from mlpd.serving.table import ModelTable
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

ROUTES_MAX = 1_000
HISTORY_MAX = 100
_VERSIONS_MAX = 1 << 32
"""A version is stored in four bytes."""

_log = logging.getLogger("mlpd.routes")


@dataclass(frozen=True, slots=True)
class ServedRoute:
    """A route at work; immutable, so a request holds one consistent whole.

    `live`: the loaded arms and shadows.  `draw`: chooses an arm by unit without an experiment.
    """

    spec: RouteSpec
    closure: Closure
    live: LiveRoute
    draw: Rendezvous


class Versions:
    """The parsed files of loaded versions: vectorizer, profile, lineage by `model@version`."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._parsed: dict[str, TrainedVersion] = {}

    async def fetch(self, model: str, number: int) -> ModelPackage:
        """Return a version's package, every digest verified; what the model table loads with."""
        loaded = await self._registry.load(model, number)
        trained = await asyncio.to_thread(read_version, loaded)
        self._parsed[trained.reference] = trained
        return trained.package

    def aliases(self, model: str) -> dict[str, int]:
        """Return a model's aliases with the versions that they point to."""
        return {a.alias: a.version for a in self._registry.aliases(model) if a.version is not None}

    def get(self, reference: str) -> TrainedVersion:
        """Return a loaded version's files; KeyError for one that isn't loaded."""
        return self._parsed[reference]

    def keep_only(self, references: frozenset[str]) -> None:
        """Forget the files of every version that is no longer loaded."""
        for reference in self._parsed.keys() - references:
            del self._parsed[reference]


class Routes:
    """All routes of a daemon; every method belongs to the loop."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        state: CatalogState,
        table: ModelTable,
        versions: Versions,
        experiments: Experiments,
    ) -> None:
        self._environment = environment
        self._writer = writer
        self._state = state
        self._table = table
        self._versions = versions
        self._experiments = experiments
        self._specs: dict[str, RouteSpec] = {}
        self._served: dict[str, ServedRoute] = {}
        self._broken: dict[str, str] = {}
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Load every stored route; one that can't be loaded is logged and answers 503."""
        with self._environment.snapshot() as snapshot:
            stored = [value for _, value in snapshot.scan(Table.ROUTES, b"c", b"d")]
        for value in stored:
            spec = RouteSpec.from_dict(msgpack.unpackb(value))
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

    def all(self) -> list[dict[str, Any]]:
        """Return all routes by name."""
        return [self.get(name) for name in sorted(self._specs)]

    def get(self, name: str) -> dict[str, Any]:
        """Return a route with the versions that serve it now."""
        spec, served = self._find(name), self._served.get(name)
        serving = None
        if served is not None:
            serving = {arm: m.package.reference for arm, m in served.live.arms.items()}
        return {**spec.to_dict(), "serving": serving, "error": self._broken.get(name)}

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
            self._check(spec)
            await self._serve({**self._working(), name: spec})
            await self._store(old, spec, by)
            self._specs[name] = spec
            self._broken.pop(name, None)
        return self.get(name)

    async def rollback(self, name: str, version: int, *, by: str) -> dict[str, Any]:
        """Make an earlier version's content the next version."""
        self._find(name)
        value = None
        if 0 < version < _VERSIONS_MAX:
            with self._environment.snapshot() as snapshot:
                value = snapshot.get(Table.ROUTES, _history_key(name, version))
        if value is None:
            raise NotFoundError(
                f"route {name!r} has no version {version}", code="unknown_route_version"
            )
        document = msgpack.unpackb(value)["route"]
        if document is None:
            raise ConflictError(
                f"version {version} of route {name!r} was its deletion",
                code="route_deleted",
                hint="mlpd routes delete removes it; any other version can come back.",
            )
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
            del self._specs[name]
            self._broken.pop(name, None)
            await self._serve({n: s for n, s in self._working().items() if n != name})

    async def refresh(self) -> None:
        """Serve what aliases and definitions say now; a route that can't goes on as it was."""
        async with self._lock:
            for spec in list(self._specs.values()):
                await self._serve_or_note(spec)

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

    def _working(self) -> dict[str, RouteSpec]:
        return {name: served.spec for name, served in self._served.items()}

    async def _serve_or_note(self, spec: RouteSpec) -> None:
        try:
            self._check(spec)
            await self._serve({**self._working(), spec.name: spec})
        except MlpdError as error:
            _log.warning("route %s can't be served: %s", spec.name, error.message)
            self._broken[spec.name] = error.message
        else:
            self._broken.pop(spec.name, None)

    async def _serve(self, specs: Mapping[str, RouteSpec]) -> None:
        """Load what `specs` need, check it, and make them the routes that are served."""
        before = self._working()
        await self._table.apply(specs.values())
        try:
            served = {name: self._resolve(live) for name, live in self._table.routes().items()}
        except MlpdError:
            await self._table.apply(before.values())
            raise
        self._served = served
        loaded = self._table.models().values()
        self._versions.keep_only(
            frozenset(m.package.reference for models in loaded for m in models.values())
        )

    def _check(self, spec: RouteSpec) -> None:
        self._state.catalog.definitions.service(spec.service)
        if spec.experiment is not None:
            _check_experiment(spec, self._experiments)

    def _resolve(self, live: LiveRoute) -> ServedRoute:
        closure = self._state.catalog.closures[live.spec.service]
        for model in (*live.arms.values(), *live.shadows):
            pinned = self._versions.get(model.package.reference).lineage.service_hash
            if pinned != closure.hash:
                raise _service_mismatch(model.package.reference, closure, pinned)
        weights = {arm.name: arm.weight for arm in live.spec.arms}
        draw = Rendezvous(("route", live.spec.name), weights)
        return ServedRoute(live.spec, closure, live, draw)

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


def _service_mismatch(reference: str, closure: Closure, pinned: str) -> ConflictError:
    return ConflictError(
        f"{reference} was trained on another version of service "
        f"{closure.service.name!r} ({pinned[:8]}, now {closure.hash[:8]})",
        code="service_mismatch",
        hint="Train it again on the present definitions, or apply the former ones.",
    )


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
