"""Beside a daemon: what its role makes it ask of others, before it starts and while it runs.

A follower pulls.  An owner makes sure that no follower took its place, and tells former owners that
it took theirs.  A former owner becomes a follower where it has nothing that the new one hasn't.
"""

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path

from mlpd.client import AsyncClient
from mlpd.cluster.replica.pull import HistoryGoneError, Puller
from mlpd.cluster.replica.start import Told, has_data, start_following
from mlpd.core.errors import ConflictError, MlpdError
from mlpd.core.shards import Shard, ShardMap, decode_map
from mlpd.daemon.app import Daemon
from mlpd.storage.map_store import FileMapStore, Member
from mlpd.storage.roles import Role, RoleStore

ASK_S = 1.0
"""How often a daemon asks, and how long an answer may take."""
AGAIN_S = 5.0
"""Between two tries to start again from a backup."""
SILENT_S = 2.0
"""A follower that hasn't asked for so long may have taken the owner's place."""

_log = logging.getLogger("mlpd.replica")


class Companion:
    """Lives as long as the process, from one role of the daemon to the next.

    `follow`: the URL of an owner to follow; None: be what the data directory says.  `discard`: as
    in `start_following`.
    """

    def __init__(self, follow: str | None, told: Told, *, discard: bool = False) -> None:
        self._follow = follow
        self._told = told
        self._discard = discard
        self._again = False
        self._again_s = 0.0

    async def prepare(self, directory: Path) -> None:
        """Make the directory a follower's, or find out that an owner's place was taken."""
        role = await asyncio.to_thread(_role_of, directory)
        again, self._again = self._again, False
        url, self._follow = self._follow, None  # later the directory's role says it
        if again and role.follows:
            await self._start_again(directory, role.url)
        elif url is not None:
            discard, self._discard = self._discard, False
            await start_following(directory, url, self._told, discard=discard)
        elif role.name in ("owner", "paused"):
            await self._look_back(directory, role)

    async def _start_again(self, directory: Path, url: str) -> None:
        """Fetch everything anew; what is here is read meanwhile and stays if that fails."""
        try:
            await start_following(directory, url, self._told, discard=True, again=True)
        except MlpdError as error:
            self._told(f"it failed, and will be tried again: {error.message}")
            self._again_s = AGAIN_S
        else:
            self._again_s = 0.0

    async def run(self, daemon: Daemon, url: str) -> None:
        """Do what the daemon's role asks for, until it is cancelled."""
        role = daemon.roles.role.name
        if role in ("follower", "standing"):
            await self._pull(daemon, url)
        elif role == "fenced":
            await self._rejoin(daemon, url)
        else:
            await self._guard(daemon)

    async def _pull(self, daemon: Daemon, url: str) -> None:
        while True:
            try:
                await Puller(daemon, _own_url(daemon, url)).run()
            except HistoryGoneError as error:
                _log.warning("starting again from a backup of the owner: %s", error)
                daemon.tailing.trouble = f"it starts again from a backup: {error}"
                await asyncio.sleep(self._again_s)
                self._again = True
                daemon.roles.changed.set()
                return
            await asyncio.sleep(ASK_S / 10)  # it stands, and may be sent back to follow

    async def _rejoin(self, daemon: Daemon, url: str) -> None:
        """Follow the new owner, if it has all that is here."""
        roles, tailing = daemon.roles, daemon.tailing
        while True:
            owner = roles.role.url
            try:
                async with _client(owner) as client:
                    head = tailing.head
                    await client.cluster.feed(head.text, follower=url)
                    await roles.follow(owner)
                    return
            except MlpdError as error:
                if error.code != "feed_gone":
                    tailing.trouble = error.message
                else:
                    tailing.trouble = await self._explain(owner, int(head.sequence))
            await asyncio.sleep(ASK_S)

    async def _explain(self, owner: str, sequence: int) -> str:
        """Say what a former owner has that the new one hasn't, in rows."""
        try:
            async with _client(owner) as client:
                since = (await client.cluster.role())["since"]
        except MlpdError as error:
            return error.message
        lost = max(0, sequence - since)
        said = (
            f"{lost} rows, sequences {since + 1} to {sequence}, are here that {owner} never got"
            if lost
            else f"no row is here that {owner} never got, but commits may be"
        )
        return f"{said}; to follow it without them: mlpd serve --follow {owner} --discard"

    async def _guard(self, daemon: Daemon) -> None:
        """Fence former owners, and this one if it is one by now."""
        roles, own = daemon.roles, daemon.ownership
        while True:
            for url in roles.role.fence:
                assert own.member is not None, "it was promoted by a map"
                if await _fence(url, own.member.shard_map):
                    await roles.told(url)
            recent = {url for url, one in daemon.feeding.lags().items() if one[1] < SILENT_S}
            silent = [url for url in roles.replicas() if url not in recent]
            if silent and own.member is not None:
                newer = await _newer_map(own.member, silent)
                if newer is not None:
                    await roles.fence(newer, own.adopt)
                    return
            await asyncio.sleep(ASK_S)

    async def _look_back(self, directory: Path, role: Role) -> None:
        """Fence a data directory whose place was taken while nobody ran there."""
        store = FileMapStore(directory)
        member = await asyncio.to_thread(store.load)
        if member is None:
            return
        shard = member.shard_map.shard(member.shard)
        newer = await _newer_map(member, (*shard.replicas, *role.fence))
        if newer is not None:
            self._told(f"{newer.shard(member.shard).url} took this daemon's place")
            epoch = member.shard_map.epoch
            await asyncio.to_thread(store.store, Member(member.shard, newer), epoch)
            fenced = Role("fenced", newer.shard(member.shard).url)
            await asyncio.to_thread(RoleStore(directory).store, fenced)


def _role_of(directory: Path) -> Role:
    return RoleStore(directory).load() if has_data(directory) else Role()


def _own_url(daemon: Daemon, url: str) -> str:
    """Return how the map calls this follower: by its address, or by its socket."""
    known = (url, f"unix:{daemon.paths.socket}")
    return next((one for one in known if one in daemon.roles.replicas()), url)


async def _newer_map(member: Member, urls: Iterable[str]) -> ShardMap | None:
    """Return the newest map by which somebody else is the shard's owner, if one has such."""
    asked = await asyncio.gather(*map(_map_of, urls))
    current = member.shard_map
    newer = [
        found
        for found in asked
        if found is not None
        and found.cluster == current.cluster
        and found.epoch > current.epoch
        and _owner_of(found, member.shard) not in (None, current.shard(member.shard).url)
    ]
    return max(newer, key=lambda found: found.epoch, default=None)


def _owner_of(shard_map: ShardMap, name: str) -> str | None:
    found: Shard | None = next((s for s in shard_map.shards if s.name == name), None)
    return None if found is None else found.url


async def _map_of(url: str) -> ShardMap | None:
    try:
        async with _client(url) as client:
            found = await client.cluster.map()
            return None if found["map"] is None else decode_map(found["map"])
    except (MlpdError, LookupError, TypeError):
        return None


async def _fence(url: str, shard_map: ShardMap) -> bool:
    """Tell a former owner; return whether it knows."""
    try:
        async with _client(url) as client:
            await client.cluster.step_role("fence", map=shard_map.to_dict())
    except ConflictError as error:
        return error.code in ("wrong_role", "other_cluster", "older_map")
    except MlpdError:
        return False
    return True


def _client(url: str) -> AsyncClient:
    return AsyncClient(url, timeout_s=ASK_S, by="mlpd replica")
