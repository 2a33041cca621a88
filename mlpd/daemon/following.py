"""Following: a member of a cluster comes to what the arbiter decided, and stays there.

It asks for what changed after the revision that it has come to, makes that its own, in order, and
notes the revision last: each step changes nothing when it is taken again.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from typing import IO, Any

from mlpd.core.errors import ConflictError, MlpdError, NotFoundError, UnavailableError
from mlpd.core.shards import Shard
from mlpd.daemon.definitions import DefinitionsVerb
from mlpd.daemon.experiments import Experiments
from mlpd.daemon.models import ModelsVerb
from mlpd.daemon.ownership import Ownership
from mlpd.daemon.peers import Peers
from mlpd.daemon.route_store import LOADED, route_of
from mlpd.daemon.routes import Routes
from mlpd.daemon.shared import Shared
from mlpd.registry.models import Registry
from mlpd.registry.records import Event, ModelVersion
from mlpd.storage.changes import Change, Position, load_position, note, store_position
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

ASK_S = 5.0
"""How long a question for changes stays open at the arbiter."""
ANSWER_S = 10.0
"""What it may take beyond that until the arbiter counts as out of reach."""
RETRY_S, RETRY_MAX_S = 0.1, 1.0
"""Pauses after a failed try; well below `shared.SILENT_S`: who pauses isn't taken for gone."""
ALONE_S = 0.1
"""How often a daemon that decides by itself looks whether it has become a member."""
BLOB_S = 600.0
"""What one file of a version may take."""

_log = logging.getLogger("mlpd.following")


class Following:
    """Follows the arbiter while another shard is it; every method belongs to the loop."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        ownership: Ownership,
        shared: Shared,
        registry: Registry,
        routes: Routes,
        models: ModelsVerb,
        experiments: Experiments,
        definitions: DefinitionsVerb,
        peers: Peers,
    ) -> None:
        self._environment = environment
        self._writer = writer
        self._ownership = ownership
        self._shared = shared
        self._registry = registry
        self._follower = registry.follower()
        self._routes = routes
        self._models = models
        self._experiments = experiments
        self._definitions = definitions
        self._peers = peers
        self._moved = asyncio.Event()
        self._damaged: dict[str, ModelVersion] = {}
        self._wake: Callable[[], None] = lambda: None
        self._applied: Mapping[Table, Callable[[Sequence[Change]], Awaitable[None]]] = {
            Table.MODELS: self._follow_models,
            Table.ROUTES: self._follow_routes,
            Table.EXPERIMENTS: self._follow_experiments,
        }
        self.why = ""
        """What keeps this member from following, "" while nothing does."""
        self.pulled_bytes = 0
        """Of files of versions that were fetched from other members since the start."""
        shared.hindrance = lambda: self.why
        registry.mends = self._mends

    async def run_forever(self) -> None:
        """Follow, whatever goes wrong; cancel it at any time."""
        damaged = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(damaged.set)

        self._wake = wake
        pause_s = RETRY_S
        while True:
            arbiter = self._shared.arbiter
            try:
                await self._shared.lead()
                if arbiter is None:
                    self.why = ""
                    await asyncio.sleep(ALONE_S)
                    continue
                await self._mend()
                await self._turn(arbiter, damaged)
                self.why, pause_s = "", RETRY_S
            except Exception as error:  # noqa: BLE001 - it goes on serving; the next turn tries
                self._note(error)
                await asyncio.sleep(pause_s)
                pause_s = min(RETRY_MAX_S, 2.0 * pause_s)

    async def reach(self, revision: int, timeout_s: float) -> bool:
        """Wait until this member has come to a revision of the arbiter; False if it hasn't."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while (position := self._position()) is None or position.revision < revision:
                    self._moved.clear()
                    await self._moved.wait()
                return True
        return False

    def _position(self) -> Position | None:
        with self._environment.snapshot() as snapshot:
            return load_position(snapshot)

    def _note(self, error: Exception) -> None:
        why = error.message if isinstance(error, MlpdError) else repr(error)
        if why != self.why:  # once, not every second
            _log.warning(
                "the arbiter can't be followed: %s",
                why,
                exc_info=None if isinstance(error, MlpdError) else error,
            )
        self.why = why

    async def _turn(self, arbiter: Shard, damaged: asyncio.Event) -> None:
        """Ask once for changes and make them this member's own; also return when files are damaged.

        Raises ConflictError(code="members_differ") for a member with things of its own.
        """
        member = self._ownership.member
        assert member is not None  # else there were no arbiter
        cluster = member.shard_map.cluster
        position = self._position() or await self._begin(cluster)
        if position.cluster != cluster:
            raise ConflictError(
                f"this member has followed cluster {position.cluster}, not {cluster}",
                code="other_cluster",
                hint="A shard never changes its cluster: start it on an empty directory.",
            )
        asks = {
            "cluster": cluster,
            "shard": member.shard,
            "after": position.revision,
            "wait_s": ASK_S,
            "why": self.why[:200],
        }
        asked = asyncio.ensure_future(self._ask(arbiter, asks))
        woken = asyncio.ensure_future(damaged.wait())
        try:
            await asyncio.wait({asked, woken}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                damaged.clear()
                return
            answer = asked.result()
        finally:
            for task in (asked, woken):
                task.cancel()
            await asyncio.gather(asked, woken, return_exceptions=True)
        leader = tuple(answer["leader"])
        if leader < position.leader:
            raise ConflictError(
                f"shard {arbiter.name} shows the token {leader}, and there was {position.leader}",
                code="old_leader",
                hint="It was the arbiter before another one was, or is a copy of before: stop it.",
            )
        if answer["changes"] or leader != position.leader:
            seen = replace(position, leader=leader)
            await self._apply(seen, [_change(row) for row in answer["changes"]])

    async def _ask(self, arbiter: Shard, asks: Mapping[str, Any]) -> Any:
        call = arbiter.url, "POST", "/v1/cluster/changes"
        return await self._peers.ask(*call, asks, timeout_s=ASK_S + ANSWER_S)

    async def _begin(self, cluster: str) -> Position:
        """Return where a member begins that has followed nobody yet."""
        if self._follower.has_events or self._routes.all() or self._experiments.names():
            raise ConflictError(
                "this member has models, routes or experiments of its own, which nobody else knows",
                code="members_differ",
                hint="Members are made of empty daemons: mlpd models export keeps what is only "
                "here; then start this one on an empty directory.",
            )
        return Position(cluster)

    async def _apply(self, position: Position, changes: Sequence[Change]) -> None:
        """Make changes this member's own, in order, and note how far it has come."""
        version, revision = position.definitions, position.revision
        for table, group in groupby(changes, key=lambda change: change.table):
            found = list(group)
            if table is Table.DEFINITIONS:
                version = await self._follow_definitions(found)
            else:
                await self._applied[table](found)
        if changes:
            revision = changes[-1].revision
            await self._routes.refresh()
        come = replace(position, revision=revision, definitions=version)
        await self._writer.write(lambda txn: store_position(txn, come))
        self._moved.set()

    async def _follow_models(self, changes: Sequence[Change]) -> None:
        events = [Event.decode(change.value or b"") for change in changes]
        self.pulled_bytes += await self._follower.pull_registered(events, self._fetch)
        models = await self._follower.repeat(events)
        await self._routes.refresh()
        await self._models.follow_aliases(models)

    async def _follow_routes(self, changes: Sequence[Change]) -> None:
        await self._store(changes)
        routes = {name for change in changes if (name := route_of(change.key)) is not None}
        await self._routes.follow(routes)
        loaded = [c.key[1:].decode() for c in changes if c.key.startswith(LOADED)]
        await self._models.follow(loaded)

    async def _follow_experiments(self, changes: Sequence[Change]) -> None:
        await self._store(changes)
        await self._experiments.follow([change.key.decode() for change in changes])

    async def _follow_definitions(self, changes: Sequence[Change]) -> int:
        told: Any = changes[-1].value
        version, document = told
        await self._definitions.apply(document)
        return int(version)

    async def _store(self, changes: Sequence[Change]) -> None:
        def write(txn: WriteTransaction) -> None:
            for change in changes:
                if change.value is None:
                    txn.delete(change.table, change.key)
                else:
                    txn.put(change.table, change.key, change.value)
                note(txn, change.table, change.key)

        await self._writer.write(write)

    async def _fetch(self, digest: str, file: IO[bytes]) -> None:
        """Write a blob to a file, from the first member that has it, the arbiter's first.

        Raises NotFoundError where all members answer and none has it, else the first error.
        """
        member = self._ownership.member
        assert member is not None
        error: MlpdError = NotFoundError(f"nobody has the blob {digest}", code="unknown_blob")
        for shard in member.shard_map.shards:
            if shard.name == member.shard:
                continue
            await asyncio.to_thread(_empty, file)
            try:
                path = f"/v1/registry/blobs/{digest}"
                await self._peers.fetch(shard.url, path, file, timeout_s=BLOB_S)
            except NotFoundError:
                continue
            except (MlpdError, OSError) as found:
                error = found if isinstance(found, MlpdError) else UnavailableError(str(found))
            else:
                return
        raise error

    def _mends(self, version: ModelVersion) -> bool:
        """Take a damaged version over if this member follows; in a thread."""
        if self._shared.decides:
            return False
        self._damaged[version.reference] = version
        self._wake()
        return True

    async def _mend(self) -> None:
        """Fetch the files of damaged versions anew, and serve them."""
        if not self._damaged:
            return
        damaged, self._damaged = self._damaged, {}
        for version in damaged.values():
            try:
                size = version.size_bytes
                self.pulled_bytes += await self._follower.pull(version.digest, size, self._fetch)
            except MlpdError as error:
                _log.warning("%s can't be mended: %s", version.reference, error.message)
        await self._routes.refresh()


def _change(row: Sequence[Any]) -> Change:
    revision, table, key, value = row
    return Change(revision, Table(table), key, value)


def _empty(file: IO[bytes]) -> None:
    file.seek(0)
    file.truncate()
