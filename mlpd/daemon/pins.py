"""Pins: which versions of feature services models need, and who holds these models.

A model version pins the hash of the service that it was trained on.  It is in use while an alias
points at it, a route names it or serves it, or a run is about to publish it.  What is asked inside
a write transaction is exact there: aliases and routes can't move before that commits.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

import msgpack

from mlpd.core.errors import MlpdError
from mlpd.registry import rows
from mlpd.registry.models import Registry
from mlpd.registry.origin import Origin
from mlpd.serving.routes import RouteSpec
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.transactions import Snapshot, WriteTransaction

Seen = Snapshot | WriteTransaction
Holders = Mapping[str, tuple[str, ...]]
"""By service hash who holds it: `model@alias`, `route NAME`, `run ID`; sorted."""

Held = Callable[[], Iterable[tuple[str, str]]]
"""Returns (holder, service hash) of what is held in memory; any thread calls it."""

_Version = tuple[str, int]


class Pins:
    """Finds what is pinned; hashes of versions in use are at hand, read once each."""

    def __init__(
        self, environment: Environment, registry: Registry, others: Iterable[Held] = ()
    ) -> None:
        """Look at aliases and routes on disk, and ask `others` who know more."""
        self._environment = environment
        self._registry = registry
        self._others = tuple(others)
        self._hashes: dict[_Version, str | None] = {}

    async def read(self) -> Holders:
        """Return what is pinned now; on the loop.

        A version that could not be read is tried anew each time: it may be out of quarantine.
        """
        found = None
        while found is None:
            versions = await asyncio.to_thread(self._versions)
            known = {v: pinned for v, pinned in self._hashes.items() if v in versions and pinned}
            fresh = {version: await self._load(version) for version in versions - known.keys()}
            self._hashes = {**known, **fresh}
            found = await asyncio.to_thread(self._find_now)
        return found

    def _versions(self) -> set[_Version]:
        with self._environment.snapshot() as snapshot:
            return {version for version, _ in _in_use(snapshot)}

    def _find_now(self) -> Holders | None:
        with self._environment.snapshot() as snapshot:
            return self.find(snapshot)

    def find(self, seen: Seen) -> Holders | None:
        """Return what is pinned as `seen`; None if a version came into use since `read`.

        On any thread; 10 us per alias and route.
        """
        held: dict[str, set[str]] = {}
        for version, holder in _in_use(seen):
            if version not in self._hashes:
                return None
            service_hash = self._hashes[version]
            if service_hash is not None:
                held.setdefault(service_hash, set()).add(holder)
        for holder, service_hash in chain.from_iterable(others() for others in self._others):
            held.setdefault(service_hash, set()).add(holder)
        return {service_hash: tuple(sorted(by)) for service_hash, by in held.items()}

    async def _load(self, version: _Version) -> str | None:
        """Return what a version pins: None for an upload, and for one that can't be read."""
        try:
            lineage = await self._registry.load_lineage(*version)
        except MlpdError:
            return None  # nothing can serve it
        return None if isinstance(lineage, Origin) else lineage.service_hash


def _in_use(seen: Seen) -> Iterator[tuple[_Version, str]]:
    """Yield (model and number, holder) for all aliases and routes."""
    aliases: dict[tuple[str, str], int] = {}
    for model in rows.models(seen):
        for alias in rows.aliases(seen, model):
            if alias.version is not None:
                aliases[model, alias.alias] = alias.version
                yield (model, alias.version), f"{model}@{alias.alias}"
    for _, value in seen.scan(Table.ROUTES, b"c", b"d"):
        route = RouteSpec.from_dict(msgpack.unpackb(value))
        for ref in route.required:
            number = aliases.get((ref.model, ref.target), 0) if ref.version is None else ref.version
            if number:
                yield (ref.model, number), f"route {route.name}"
