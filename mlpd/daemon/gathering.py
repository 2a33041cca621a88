"""Gathering: the events of all shards in files here, each event once, for whoever needs them all.

Each shard writes those that have their home there (`home_child`); nothing of it is in this process.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any

from mlpd.core.errors import ConflictError, MlpdError, UnavailableError
from mlpd.core.hashing import definition_hash
from mlpd.core.shards import Shard
from mlpd.daemon.offline import offline_request
from mlpd.daemon.ownership import Ownership
from mlpd.daemon.parts import Parts
from mlpd.daemon.peers import Peers, together
from mlpd.daemon.process import Child
from mlpd.daemon.state import CatalogState
from mlpd.features.catalog import Catalog
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.horizons import Horizon, load_horizons
from mlpd.storage.lineage import encode_lineage, load_lineage

FETCH_S = 3600.0
"""What the events of one source on one shard may take."""
_NICE = 10


class Gathering:
    """Writes this shard's events of a source, and fetches those of the others; on the loop."""

    def __init__(
        self,
        environment: Environment,
        state: CatalogState,
        ownership: Ownership,
        parts: Parts,
        peers: Peers,
        paths: DataDirectory,
    ) -> None:
        self._environment = environment
        self._state = state
        self._ownership = ownership
        self._parts = parts
        self._peers = peers
        self._paths = paths
        self._writing = asyncio.Semaphore(1)
        parts.offer("horizons", self._horizons)
        parts.offer("standing", self._standing)

    @property
    def is_needed(self) -> bool:
        """Whether this daemon's log isn't all events, each once."""
        return self._ownership.part is not None or self._ownership.has_lineage

    @asynccontextmanager
    async def written(
        self, source: str, definitions: str, epoch: int, *, copies: bool = False
    ) -> AsyncIterator[IO[bytes]]:
        """Yield the file of this shard's events of a source, open, which is gone afterwards.

        Those at home here, or with `copies` all that its log has.  `definitions`, `epoch`: digest
        of the definitions and epoch of the map of whoever asks.  Raises ConflictError:
        `other_definitions`, `epoch_moved`, `move_under_way`; and what `Definitions.source` raises.
        """
        self.check_still(epoch)
        with self._environment.snapshot() as snapshot:
            catalog = self._state.read_catalog(snapshot)
        if definition_hash(catalog.document) != definitions:
            raise ConflictError(
                "this shard runs other definitions",
                code="other_definitions",
                hint="Try again shortly; mlpd shard status shows who doesn't follow.",
            )
        catalog.definitions.source(source)  # raises
        path = self._paths.joins / f"{secrets.token_hex(8)}.parquet"
        try:
            await asyncio.to_thread(self._paths.joins.mkdir, parents=True, exist_ok=True)
            await self._write(catalog, source, path, copies=copies)
            file = path.open("rb")
        finally:
            await asyncio.to_thread(path.unlink, missing_ok=True)
        with file:
            yield file

    async def gather(
        self, catalog: Catalog, sources: Iterable[str], folder: Path
    ) -> dict[str, Any] | None:
        """Return what a child's request says of the events of `sources` on all shards.

        Their files lie in `folder`.  None where this daemon's log has all of them.  Raises
        UnavailableError(code="part_missing") if a shard gives none, ConflictError(
        code="several_shards") if one can't tell events from their copies.
        """
        if not self.is_needed:
            return None
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        digest, epoch = definition_hash(catalog.document), self._ownership.epoch
        files: dict[str, list[str]] = {}
        for number, source in enumerate(sorted(sources)):
            own = folder / f"{number}-own.parquet"
            others = [
                (shard, folder / f"{number}-{shard.name}.parquet")
                for shard in self._ownership.others()
            ]
            query = f"definitions={digest}&epoch={epoch}"
            fetched = (self._fetch(shard, source, query, path) for shard, path in others)
            await together(self._write(catalog, source, own), *fetched)
            named = {shard.name: path for shard, path in others}
            member = self._ownership.member
            named["" if member is None else member.shard] = own
            files[source] = [str(named[name]) for name in sorted(named)]
        horizons = await self._merged_horizons()
        self.check_still(epoch)
        return {"files": files, "horizons": horizons}

    async def fetch_logs(
        self, catalog: Catalog, wanted: Mapping[str, Iterable[str]], folder: Path
    ) -> dict[str, dict[str, Any]]:
        """Return, by the names of shards, what an audit's request says of the `wanted` sources.

        Their files lie in `folder`: all events of that shard's log, which has them up to `through`
        at least.  Raises as `gather` does.
        """
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        digest, epoch = definition_hash(catalog.document), self._ownership.epoch
        shards = self._ownership.others()
        query = f"definitions={digest}&epoch={epoch}&copies=true"
        standings = await self._parts.others("standing", {})
        found: dict[str, dict[str, Any]] = {}
        for shard, standing in zip(shards, standings, strict=True):
            if shard.name in wanted:
                sources = [s for s in wanted[shard.name] if s in catalog.definitions.sources]
                files = {s: folder / f"{shard.name}-{n}.parquet" for n, s in enumerate(sources)}
                fetched = (self._fetch(shard, s, query, path) for s, path in files.items())
                await together(*fetched)
                named = {source: str(path) for source, path in files.items()}
                found[shard.name] = {**standing, "files": named}
        horizons = await self._parts.others("horizons", {})  # what went meanwhile is in no file
        for shard, gone in zip(shards, horizons, strict=True):
            if shard.name in found:
                found[shard.name]["horizons"] = gone
        self.check_still(epoch)
        return found

    def check_still(self, epoch: int) -> None:
        """Raise ConflictError unless the map is of this epoch and nothing moves.

        No event has two homes then.
        """
        if self._ownership.epoch != epoch:
            raise ConflictError(
                f"the map is of epoch {self._ownership.epoch}, not {epoch}",
                code="epoch_moved",
                hint="Start it again: slots have moved meanwhile.",
            )
        moves = self._ownership.moves
        if moves.leaving is not None or moves.arriving is not None:
            raise ConflictError(
                "slots move just now, and their events lie on two shards",
                code="move_under_way",
                hint="Start it again when mlpd shard status shows no move.",
            )

    async def _write(
        self, catalog: Catalog, source: str, path: Path, *, copies: bool = False
    ) -> None:
        part = self._ownership.part
        with self._environment.snapshot() as snapshot:
            through = snapshot.sequence
        request = {
            **offline_request(self._paths, catalog, through),
            "source": source,
            "copies": copies,
            "part": None if part is None else part.to_request(),
            "answer": str(path),
        }
        async with self._writing, Child("home", request, nice=_NICE) as child:
            await child.result()

    async def _fetch(self, shard: Shard, source: str, query: str, path: Path) -> None:
        where = f"/v1/cluster/events/{source}?{query}"
        try:
            with path.open("wb") as file:
                await self._peers.fetch(shard.url, where, file, timeout_s=FETCH_S)
        except MlpdError as error:
            if error.code == "several_shards":
                raise
            raise UnavailableError(
                f"shard {shard.name} doesn't give its events of {source}: {error.message}",
                code="part_missing",
                hint="The events of all shards are needed, or none are; mlpd shard status shows "
                "who answers.",
                details={"shard": shard.name, "why": error.code},
            ) from None

    async def _standing(self, _: Mapping[str, Any]) -> dict[str, Any]:
        with self._environment.snapshot() as snapshot:
            lineage = encode_lineage(load_lineage(snapshot))
            return {"through": snapshot.sequence, "lineage": lineage}

    async def _horizons(self, _: Mapping[str, Any]) -> dict[str, list[int]]:
        with self._environment.snapshot() as snapshot:
            found = load_horizons(snapshot)
        return {name: [h.before_us, h.sequence] for name, h in found.items()}

    async def _merged_horizons(self) -> dict[str, list[int]]:
        """Return by source the latest horizon of any shard: before it a part may be gone."""
        merged: dict[str, Horizon] = {}
        for part in (await self._horizons({}), *await self._parts.others("horizons", {})):
            for name, fields in part.items():
                merged[name] = Horizon(*fields).moved(merged.get(name))
        return {name: [h.before_us, h.sequence] for name, h in merged.items()}
