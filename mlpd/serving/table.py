"""The models and routes that are served now: one immutable snapshot, swapped as one reference.

A request takes its route or model once and keeps what it took, so it sees one state of the table
from start to end; a version swapped out lives until its last request lets go of it.

What routes refer to is always loaded.  Versions that were loaded explicitly may be evicted when
there are more than the memory budget holds; the next request for one loads it again.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence

from mlpd.core.errors import ConflictError, MlpdError, NotFoundError, UnavailableError
from mlpd.serving.batcher import Batcher
from mlpd.serving.budget import Key, MemoryBudget
from mlpd.serving.package import ModelPackage
from mlpd.serving.pool import SessionPool
from mlpd.serving.predictor import ServedModel
from mlpd.serving.routes import ModelRef, RouteSpec
from mlpd.serving.snapshot import LiveRoute, Snapshot, build_live_route, by_model, resolve_ref

CHAMPION = "champion"
"""The alias behind a model's name alone."""

Aliases = Callable[[str], Mapping[str, int]]
"""Returns the versions behind a model's aliases; NotFoundError for an unknown model."""
Fetch = Callable[[str, int], Awaitable[ModelPackage]]
"""Returns the package of a version from the registry, digests verified, or raises."""
Loaded = Callable[[frozenset[str]], None]
"""Called with the references of all versions that are loaded, whenever some were let go of."""

_log = logging.getLogger("mlpd.serving")

BYTES_MAX = 1 << 30
LOAD_WAIT_S = 1.0
"""How long a request waits for an evicted version to be loaded again; a load takes 10 to 50 ms."""


class ModelTable:
    """Keeps loaded what routes and explicit loads refer to; all methods belong to the loop.

    A change loads what it needs first and swaps then; if anything fails, nothing has changed.
    Aliases are looked up at a change: call `refresh` after one has moved.
    """

    def __init__(
        self,
        pool: SessionPool,
        batcher: Batcher,
        *,
        aliases: Aliases,
        fetch: Fetch,
        loaded: Loaded = lambda _: None,
        bytes_max: int = BYTES_MAX,
    ) -> None:
        self._pool, self._batcher = pool, batcher
        self._aliases, self._fetch, self._loaded = aliases, fetch, loaded
        self._budget = MemoryBudget(bytes_max)
        self._pins: frozenset[ModelRef] = frozenset()
        self._now = Snapshot()
        self._changing = asyncio.Lock()
        self._reloading: dict[Key, asyncio.Task[ServedModel]] = {}
        self.evictions = 0

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

        Raises NotFoundError: `unknown_model`, `unknown_version`; UnavailableError(
        code="model_evicted") for one that `get` would load again.
        """
        key = self._key(model, target)
        if key in self._now.evicted:
            raise _evicted(key, "is not in memory now")
        return self._now.models[model][key[1]]

    async def get(self, model: str, target: str | int | None = None) -> ServedModel:
        """Return a version as `find` does, and load an evicted one again, once for all who ask.

        Raises what loading raises, and UnavailableError(code="model_loading") if it isn't there
        after LOAD_WAIT_S.
        """
        key = self._key(model, target)
        self._budget.touch(key)
        if key not in self._now.evicted:
            return self._now.models[model][key[1]]
        task = self._reloading.get(key)
        if task is None:
            task = self._reloading[key] = asyncio.create_task(self._reload(key))
            task.add_done_callback(lambda done: self._forget(key, done))
        await asyncio.wait({task}, timeout=LOAD_WAIT_S)
        if not task.done():
            raise _evicted(key, "is being loaded", code="model_loading")
        return task.result()

    def check(self, model: str, target: str | int | None = None) -> None:
        """Raise NotFoundError as `find` does; an evicted version is as good as a loaded one."""
        self._key(model, target)

    def versions(self, model: str) -> list[int]:
        """Return the versions of a model that answer requests, evicted ones too, in order."""
        return self._now.versions(model)

    @property
    def memory_bytes(self) -> int:
        """What the loaded versions take."""
        return sum(self._sizes().values())

    async def close(self) -> None:
        """Wait for loads under way."""
        await asyncio.gather(*self._reloading.values(), return_exceptions=True)

    def pins(self) -> frozenset[ModelRef]:
        """Return what is loaded explicitly."""
        return self._pins

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
        """Load a version, or whatever an alias points at, and serve it until `unload`; return it.

        Others are evicted for it.  Raises ConflictError(code="model_memory_full") if it doesn't
        fit into what the routes' models leave.
        """
        async with self._changing:
            aliases = dict(self._aliases(ref.model))
            key = ref.model, resolve_ref(ref, aliases)
            served, before = await self._serve(*key), self._now
            self._budget.touch(key)
            self._swap(before.plus(key, served, aliases))
            self._fit(keep=key)
            if self.memory_bytes > self._budget.bytes_max and key not in before.pinned():
                wanted = self.memory_bytes
                self._swap(before)
                raise _too_big(key, wanted, self._budget.bytes_max)
            self._pins |= {ref}
            return served

    async def unload(self, model: str, target: str | None = None) -> None:
        """Let go of a model's explicit loads, or of one; its memory goes with its last request.

        Raises NotFoundError for what isn't loaded, ConflictError(code="model_in_use") for what a
        route refers to.
        """
        async with self._changing:
            self._key(model, target) if target else self._known(model)
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

    def _key(self, model: str, target: str | int | None) -> Key:
        """Return the number of a version that answers requests, else raise NotFoundError."""
        now = self._now
        versions = now.models.get(model)
        if versions is None and not self.versions(model):
            raise _unknown("model", model, now.models)
        text = CHAMPION if target is None else str(target)
        number = int(text) if text.isdigit() else now.aliases[model].get(text)
        if number is not None and (number in (versions or ()) or (model, number) in now.evicted):
            return model, number
        loaded = ", ".join(map(str, self.versions(model)))
        raise NotFoundError(
            f"model {model!r} has no loaded version {text!r}; loaded: {loaded}",
            code="unknown_version",
            hint="Load it, or name a version or alias that is loaded.",
        )

    def _known(self, model: str) -> None:
        if not self.versions(model):
            raise _unknown("model", model, self._now.models)

    async def _change(self, specs: Mapping[str, RouteSpec], pins: frozenset[ModelRef]) -> None:
        """Serve other routes and explicit loads; of these the evicted ones stay so."""
        required = pins.union(*(spec.required for spec in specs.values()))
        refs = required.union(*(spec.references for spec in specs.values()))
        # In a thread: each takes some 100 us, and there may be hundreds.
        aliases = await asyncio.to_thread(self._look_up, {ref.model for ref in refs})
        keys = {
            ref: (ref.model, resolve_ref(ref, aliases[ref.model]))
            for ref in refs
            if ref in required or not _is_not_there_yet(ref, aliases[ref.model])
        }
        of_routes = {keys[ref] for s in specs.values() for ref in s.references if ref in keys}
        asleep = {keys[pin] for pin in pins if self._was_evicted(pin)} - of_routes
        may_fail = {key for ref, key in keys.items() if ref.is_previous}
        may_fail -= {keys[ref] for ref in required}
        served = await self._serve_all(sorted({*keys.values()} - asleep), may_fail)
        by_ref = {ref: served[key] for ref, key in keys.items() if key in served}
        routes = {name: build_live_route(spec, by_ref) for name, spec in specs.items()}
        self._pins = pins
        self._swap(Snapshot(routes, by_model(served), frozenset(asleep), aliases))
        self._fit()

    def _look_up(self, models: Collection[str]) -> dict[str, dict[str, int]]:
        return {model: dict(self._aliases(model)) for model in models}

    def _was_evicted(self, pin: ModelRef) -> bool:
        number = pin.version or self._now.aliases.get(pin.model, {}).get(pin.target)
        return (pin.model, number) in self._now.evicted

    async def _serve_all(
        self, keys: Sequence[Key], may_fail: Collection[Key]
    ) -> dict[Key, ServedModel]:
        """Return what serves versions; one of `may_fail` is left out if it can't be loaded."""
        loaded = await asyncio.gather(*(self._serve(*key) for key in keys), return_exceptions=True)
        served: dict[Key, ServedModel] = {}
        for key, outcome in zip(keys, loaded, strict=True):
            if isinstance(outcome, MlpdError) and key in may_fail:
                _log.warning("no fallback: %s@%d: %s", *key, outcome.message)
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                served[key] = outcome
        return served

    def _swap(self, snapshot: Snapshot) -> None:
        self._now = snapshot
        self._loaded(frozenset(model.package.reference for _, model in snapshot.loaded()))

    def _fit(self, *, keep: Key | None = None) -> None:
        """Evict what has not been used for the longest time until the rest fits."""
        stay = self._now.pinned() | ({keep} if keep else frozenset())
        evicted = self._budget.choose(self._sizes(), stay)
        if evicted:
            self.evictions += len(evicted)
            self._swap(self._now.without(evicted))

    def _sizes(self) -> dict[Key, int]:
        return {key: model.session.memory_bytes for key, model in self._now.loaded()}

    async def _reload(self, key: Key) -> ServedModel:
        async with self._changing:
            if key in self._now.evicted:
                served = await self._serve(*key)
                self._swap(self._now.plus(key, served, self._now.aliases[key[0]]))
                self._fit(keep=key)
            return self.find(*key)

    def _forget(self, key: Key, done: "asyncio.Task[ServedModel]") -> None:
        del self._reloading[key]
        if not done.cancelled():
            done.exception()  # the waiters have it; without any, asyncio would complain

    async def _serve(self, model: str, version: int) -> ServedModel:
        """Return what serves a version: the same object as now if it's loaded already."""
        present = self._now.models.get(model, {}).get(version)
        if present is not None:
            return present
        session = await self._pool.load(await self._fetch(model, version))
        return ServedModel(session, self._batcher)


def _is_not_there_yet(ref: ModelRef, aliases: Mapping[str, int]) -> bool:
    """Tell whether an alias has no version before: it will have one when it is moved."""
    return ref.is_previous and ref.target not in aliases and ref.alias in aliases


def _evicted(key: Key, problem: str, code: str = "model_evicted") -> MlpdError:
    return UnavailableError(
        f"model {key[0]}@{key[1]} {problem}",
        code=code,
        hint="Ask again shortly.",
        details={"retry_after_s": LOAD_WAIT_S},
    )


def _too_big(key: Key, wanted: int, bytes_max: int) -> MlpdError:
    return ConflictError(
        f"with model {key[0]}@{key[1]} the models would take {wanted / 1e6:.0f} MB, "
        f"but {bytes_max / 1e6:.0f} MB are allowed",
        code="model_memory_full",
        hint="Raise [serving] model_bytes_max, or let routes refer to fewer versions.",
    )


def _unknown(what: str, name: str, known: Mapping[str, object]) -> MlpdError:
    return NotFoundError(
        f"unknown {what} {name!r}; served: {', '.join(sorted(known)) or 'none'}",
        code=f"unknown_{what}",
        hint="Check the spelling, or load it first.",
    )
