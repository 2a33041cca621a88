"""Roles: what this daemon is to its shard, the gate that its writes pass, and the steps between.

A step is durable when it returns, and may be asked for again.  docs/paths/replica.md has the order.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from mlpd.core.errors import ConflictError, MisdirectedError, UnavailableError
from mlpd.core.leases import Lease, Promise
from mlpd.core.shards import ShardMap
from mlpd.storage.map_store import Member
from mlpd.storage.roles import Role, RoleStore

PAUSED_RETRY_S = 0.2


class Roles:
    """The role of one daemon, and the lease that its writes need; the writer's gate.

    `role` is replaced as a whole, on the loop; any thread reads it.  `member`: returns this
    daemon's name and map, None while there is none.  `changed` is set when the daemon has to start
    anew as something else.
    """

    def __init__(
        self,
        store: RoleStore,
        lease_us: int,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._monotonic = monotonic
        self.role = store.load()
        self.lease = Lease(lease_us / 1e6)
        self.promise = Promise()
        if self.role.follows:  # what an earlier process has promised
            self.promise.give(self.role.lease_us / 1e6, monotonic())
        self.member: Callable[[], Member | None] = lambda: None
        self.drain: Callable[[], Awaitable[None]] = _nothing
        """Waits until what came before a pause is stored, or on its way to the writer."""
        self.barrier: Callable[[], Awaitable[None]] = _nothing
        """Returns when no group of writes is under way that began before the call."""
        self.changed = asyncio.Event()
        self.is_resting = not self.is_owner
        """Whether the daemon was started as something else than an owner."""
        self._closing = False
        self._halted: Role | None = None
        """While this daemon is being fenced: what it is until then."""
        self._lock = asyncio.Lock()

    @property
    def is_owner(self) -> bool:
        """Whether this daemon may write."""
        return self.role.name == "owner"

    @property
    def is_open(self) -> bool:
        """Whether it answers everything."""
        return self.role.name == "owner" and not self._closing and self._halted is None

    def replicas(self) -> tuple[str, ...]:
        """Return the URLs of the shard's followers, as the map has them."""
        member = self.member()
        return () if member is None else member.shard_map.shard(member.shard).replicas

    def check_begin(self) -> None:
        """Raise UnavailableError if nothing may be written: by role, or `lease_lost`.

        One that was promoted writes nothing before it has started anew: its commits belong into the
        feed.
        """
        if not self.is_owner or self.is_resting or self._halted is not None:
            raise refusal(self._halted or self.role)
        if not self.lease.holds(self.replicas(), self._monotonic()):
            raise _lease_lost("nothing was written")

    def check_end(self) -> None:
        """Raise UnavailableError(code="lease_lost") if the lease ran out while it was written."""
        if self.is_owner and not self.lease.holds(self.replicas(), self._monotonic()):
            raise _lease_lost("it is not known whether this will be kept")

    async def pause(self, url: str, token: str) -> None:
        """Write nothing more from now on, for the follower at `url` to take the owner's place.

        `token` names this pause from now on.  Raises ConflictError: `promotion_under_way` for
        another follower, `wrong_role`.
        """
        async with self._lock:
            self._expect("owner", "paused")
            if self.role.name == "paused" and self.role.url != url:
                raise ConflictError(
                    f"the follower at {self.role.url} is about to take this daemon's place",
                    code="promotion_under_way",
                    hint="Finish that, or mlpd shard promote --cancel.",
                )
            self._closing = True
            try:
                if self.is_owner:
                    await self.drain()
                await self._become(replace(self.role, name="paused", url=url, token=token))
            finally:
                self._closing = False
            await self.barrier()

    async def resume(self, token: str | None) -> None:
        """Write again, or ask the owner again: a promotion was given up.

        Raises ConflictError: `wrong_role` once the daemon is fenced, `other_pause` where the one of
        that token was followed by another.
        """
        async with self._lock:
            self._expect("owner", "paused", "follower", "standing")
            if self.role.name == "paused":
                if token != self.role.token or self._was_given_away():
                    raise _other_pause()
                await self._become(replace(self.role, name="owner", url="", token=""))
                if self.is_resting:
                    self.changed.set()
            elif self.role.name == "standing":
                await self._become(replace(self.role, name="follower"))

    async def fence(
        self, new: ShardMap, store: Callable[[ShardMap], object], *, token: str | None = None
    ) -> None:
        """Be the shard's owner no more, since a map gives the shard another URL.

        `store` keeps the map, or raises.  `token`: only in that pause, and if no other map came
        since, as this is what decides; ConflictError: `other_pause`, `epoch_moved`.
        """
        async with self._lock:
            self._expect("owner", "paused", "fenced")
            member = self.member()
            if member is None:
                raise ConflictError("this daemon has no map", code="no_cluster")
            if self.role.name == "fenced" and new.epoch <= member.shard_map.epoch:
                return
            url = new.shard(member.shard).url
            named = member.shard_map.shard(member.shard).url
            if url == named and self.role.name != "fenced" and not self._was_given_away():
                raise ConflictError(
                    f"the map leaves shard {member.shard} at {url}", code="same_owner"
                )
            if token is not None:
                self._check_decides(new, member.shard_map.epoch, token)
            self._halted = Role("paused", url)
            try:
                await self.barrier()  # nothing is acknowledged by the new map
                await asyncio.to_thread(store, new)
                await self._become(Role("fenced", url))
            finally:
                self._halted = None
            self.changed.set()

    def _was_given_away(self) -> bool:
        """Tell whether this daemon was killed in `fence`, after the map and before the role."""
        member, role = self.member(), self.role
        if member is None or role.name != "paused":
            return False
        return member.shard_map.shard(member.shard).url == role.url

    def _check_decides(self, new: ShardMap, epoch: int, token: str) -> None:
        if new.epoch != epoch + 1:
            raise ConflictError(
                f"the map is of epoch {epoch}, {new.epoch} doesn't follow it",
                code="epoch_moved",
                hint="Somebody else changed the map; run mlpd shard promote again.",
                details={"epoch": epoch},
            )
        if (self.role.name, self.role.token) != ("paused", token):
            raise _other_pause()

    async def stand(self) -> float:
        """Ask the owner no more, to be promoted as if it were lost; return for how long to wait.

        So long the owner may still write, as it was promised.
        """
        async with self._lock:
            self._expect("follower", "standing")
            if self.role.name == "follower":
                await self._become(replace(self.role, name="standing"))
            return self.promise.left_s(self._monotonic())

    async def promote(
        self,
        new: ShardMap,
        store: Callable[[ShardMap], object],
        *,
        since: int,
        lost: bool,
    ) -> None:
        """Be the owner from now on, by a map that says so; the former one is told until it hears.

        `since`: the newest sequence here.  `lost`: the former one may still write, as far as
        anybody knows; so only a follower that stands, and whose promise is over: ConflictError(
        code="lease_runs") else.  And `newer_owner` if it has heard of another owner than its map.
        """
        async with self._lock:
            member = self.member()
            if self.is_owner and member is not None and member.shard_map.epoch >= new.epoch:
                return
            self._expect(*(("standing",) if lost else ("follower", "standing")))
            assert member is not None, "a follower has its owner's map"
            left_s = self.promise.left_s(self._monotonic())
            if lost and left_s > 0.0:
                raise ConflictError(
                    f"the owner may still write for {left_s:.1f} s",
                    code="lease_runs",
                    hint="Wait for that; mlpd shard promote does.",
                    details={"wait_s": left_s},
                )
            named = member.shard_map.shard(member.shard).url
            if lost and named not in (self.role.url, new.shard(member.shard).url):
                raise ConflictError(
                    f"{self.role.url} took the place of {named}, by a map that isn't here yet",
                    code="newer_owner",
                    hint=f"Ask who has it: mlpd shard promote --url {named}.",
                )
            await asyncio.to_thread(store, new)
            await self._become(Role("owner", fence=(self.role.url,), since=since))
            self.changed.set()

    async def told(self, url: str) -> None:
        """Note that a former owner knows that it is none any more."""
        async with self._lock:
            left = tuple(one for one in self.role.fence if one != url)
            if self.is_owner and left != self.role.fence:
                await self._become(replace(self.role, fence=left))

    async def ask(self, lease_us: int) -> None:
        """Promise, by a question that is about to be sent, and remember for how long at most.

        Raises ConflictError(code="wrong_role") for one that asks no more.
        """
        if lease_us > self.role.lease_us:
            async with self._lock:
                self._expect("follower")
                await self._become(replace(self.role, lease_us=lease_us))
        self._expect("follower")
        self.promise.give(lease_us / 1e6, self._monotonic())

    async def follow(self, url: str) -> None:
        """Follow the owner at a URL: a follower whose owner has changed, or a former owner.

        One that was fenced has to start anew for that.
        """
        async with self._lock:
            self._expect("follower", "fenced")
            was_fenced = self.role.name == "fenced"
            await self._become(replace(self.role, name="follower", url=url))
            if was_fenced:
                self.changed.set()

    def describe(self) -> dict[str, Any]:
        """Return role, the other one's URL, the lease and for how long a promise still holds."""
        return {
            "role": self.role.name,
            "url": self.role.url or None,
            "fence": list(self.role.fence),
            "since": self.role.since,
            "token": self.role.token or None,
            "started": not (self.is_owner and self.is_resting),
            "lease_s": self.lease.lease_s,
            "wait_s": self.promise.left_s(self._monotonic()),
        }

    def _expect(self, *names: str) -> None:
        if self.role.name not in names:
            raise ConflictError(
                f"this daemon is {self.role.name}, not {' or '.join(names)}",
                code="wrong_role",
                hint="mlpd shard status shows who is what.",
                details={"role": self.role.name, "url": self.role.url},
            )

    async def _become(self, role: Role) -> None:
        if role != self.role:
            await asyncio.to_thread(self._store.store, role)
            self.role = role


async def _nothing() -> None:
    return


def refusal(role: Role) -> UnavailableError:
    """Return why a daemon of this role writes nothing."""
    if role.name == "paused":
        return UnavailableError(
            f"the follower at {role.url} takes this daemon's place just now",
            code="promoting",
            hint="Send it again shortly; mlpd shard status shows one that stands still.",
            details={"retry_after_s": PAUSED_RETRY_S},
        )
    return UnavailableError(
        f"this daemon is {role.name}; nothing is written here", code="not_owner"
    )


def elsewhere(role: Role, member: Member | None) -> MisdirectedError:
    """Return the error for what only the owner does."""
    details: Mapping[str, Any] = (
        {}
        if member is None
        else {"shard": member.shard, "epoch": member.shard_map.epoch, "url": role.url}
    )
    is_fenced = role.name == "fenced"
    return MisdirectedError(
        f"this daemon {'was' if is_fenced else 'follows'} the owner of its shard; "
        f"{role.url} {'took its place' if is_fenced else 'is'}",
        code="fenced" if is_fenced else "follower",
        hint="Fetch the map (GET /v1/cluster/map) and ask the owner; mlpd.client does so.",
        details=details,
    )


def _other_pause() -> ConflictError:
    return ConflictError(
        "this daemon isn't in that pause any more",
        code="other_pause",
        hint="Somebody else promotes, or gave it up; run mlpd shard promote again.",
    )


def _lease_lost(what: str) -> UnavailableError:
    return UnavailableError(
        f"a follower of this daemon was not heard of for the lease of [replica]; {what}",
        code="lease_lost",
        hint="Start it, or take it off the map: mlpd shard replicas.",
        details={"retry_after_s": 1.0},
    )
