"""Verb models: changes of the registry that serving follows or must not be hurt by."""

import logging
from collections.abc import Iterable

import msgpack

from mlpd.core.errors import ConflictError, MlpdError
from mlpd.core.time import Clock
from mlpd.daemon.backup import Backup
from mlpd.daemon.route_store import LOADED
from mlpd.daemon.routes import Routes
from mlpd.registry.catalog import Expected
from mlpd.registry.collect import Collection, Policy
from mlpd.registry.models import Registry
from mlpd.registry.records import Alias, Cause, ModelVersion, VersionState, prefix_end
from mlpd.serving.routes import ModelRef
from mlpd.serving.table import CHAMPION, ModelTable
from mlpd.storage.changes import note
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

_log = logging.getLogger("mlpd.models")

_RETIRING = (VersionState.ARCHIVED, VersionState.DELETED)


class ModelsVerb:
    """Moves aliases, changes states, collects; every method belongs to the loop."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        registry: Registry,
        routes: Routes,
        table: ModelTable,
        backup: Backup,
        clock: Clock,
    ) -> None:
        self._environment = environment
        self._writer = writer
        self._registry = registry
        self._routes = routes
        self._table = table
        self._backup = backup
        self._clock = clock

    async def start(self) -> None:
        """Load what was loaded explicitly before; what can't be is logged and stays asked for."""
        with self._environment.snapshot() as snapshot:
            keys = [key for key, _ in snapshot.scan(Table.ROUTES, LOADED, prefix_end(LOADED))]
        for key in keys:
            name = key.removeprefix(LOADED).decode()
            try:
                await self._load(name)
            except MlpdError as error:
                _log.warning("model %s can't be loaded: %s", name, error.message)

    async def follow(self, names: Iterable[str]) -> None:
        """Load, or let go of, what is stored as loaded explicitly now, whoever stored it."""
        with self._environment.snapshot() as snapshot:
            wanted = {n: snapshot.get(Table.ROUTES, LOADED + n.encode()) for n in names}
        for name, row in wanted.items():
            try:
                await (self._table.unload(name) if row is None else self._load(name))
            except MlpdError as error:
                _log.warning("model %s can't be loaded, or let go of: %s", name, error.message)

    async def follow_aliases(self, models: Iterable[str]) -> None:
        """Load what aliases of models say now, where they are loaded explicitly."""
        wanted = set(models)
        for ref in [ref for ref in self._table.pins() if ref.model in wanted]:
            try:
                await self._table.load(ref)
            except MlpdError as error:
                _log.warning("model %s can't be loaded: %s", ref.model, error.message)

    async def load(self, name: str, by: str) -> None:
        """Keep a model's champion loaded, whatever it is, also after a restart, until `unload`."""
        await self._load(name)
        row = msgpack.packb({"alias": CHAMPION, "by": by})

        def write(txn: WriteTransaction) -> None:
            txn.put(Table.ROUTES, LOADED + name.encode(), row)
            note(txn, Table.ROUTES, LOADED + name.encode())

        await self._writer.write(write)

    async def _load(self, name: str) -> None:
        await self._table.load(ModelRef(name, CHAMPION))

    async def unload(self, name: str) -> None:
        """Let go of an explicitly loaded model; ConflictError for one that a route uses."""
        await self._table.unload(name)

        def write(txn: WriteTransaction) -> None:
            txn.delete(Table.ROUTES, LOADED + name.encode())
            note(txn, Table.ROUTES, LOADED + name.encode())

        await self._writer.write(write)

    async def move_alias(
        self, name: str, alias: str, to: int | None, cause: Cause, *, expected: Expected
    ) -> Alias:
        """Point an alias at a version, or at nothing; what serves by it follows on return.

        Raises ConflictError(code="model_in_use") for taking away what is loaded explicitly.
        """
        if to is None and ModelRef(name, alias) in self._table.pins():
            raise ConflictError(
                f"{name}@{alias} is loaded",
                code="model_in_use",
                hint=f"Unload it first: mlpd models unload {name}.",
            )
        moved = await self._registry.move_alias(name, alias, to, cause, expected=expected)
        await self._follow(name, alias)
        return moved

    async def roll_back(self, name: str, alias: str, cause: Cause) -> Alias:
        """Point an alias back at the version before; routes follow on return."""
        moved = await self._registry.rollback(name, alias, cause)
        await self._follow(name, alias)
        return moved

    async def set_state(
        self, name: str, number: int, state: VersionState, cause: Cause
    ) -> ModelVersion:
        """Change a version's state; one that answers requests is neither archived nor deleted.

        Raises ConflictError(code="version_in_use"), and as `Registry.set_state`.
        """
        if state in _RETIRING and number in self._table.models().get(name, ()):
            raise ConflictError(
                f"version {name}@{number} is loaded: a route or a client keeps it",
                code="version_in_use",
                hint="Point the route at another version, or unload the model, first.",
            )
        changed = await self._registry.set_state(name, number, state, cause)
        await self._routes.refresh()
        return changed

    async def _follow(self, name: str, alias: str) -> None:
        await self._routes.refresh()
        ref = ModelRef(name, alias)
        if ref in self._table.pins():
            await self._table.load(ref)

    async def collect(
        self, cause: Cause, *, grace_us: int, keep: int | None, dry_run: bool
    ) -> Collection:
        """Remove what no version needs any more, or tell what would go.

        What answers requests stays.  Raises ConflictError(code="backup_running"): a backup copies
        the names of blobs first and the blobs later.
        """
        if self._backup.running:
            raise ConflictError(
                "a backup is under way, which still needs what would be removed",
                code="backup_running",
                hint="Wait for it, then collect again.",
            )
        async with self._backup.paused():
            loaded = self._table.models()
            served = frozenset(f"{name}@{number}" for name in loaded for number in loaded[name])
            policy = Policy(now_us=self._clock(), grace_us=grace_us, keep=keep, served=served)
            return await self._registry.collect(policy, cause, dry_run=dry_run)
