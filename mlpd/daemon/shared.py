"""Shared: what all members of a cluster have in common, as its arbiter tells the others.

docs/paths/follow.md tells the way of a change; storage/changes.py keeps their order.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlpd.core.convert import INT64_MAX
from mlpd.core.errors import ConflictError, ValidationError
from mlpd.core.shards import Shard
from mlpd.daemon.ownership import Ownership
from mlpd.daemon.state import CURRENT_KEY
from mlpd.features.catalog import read_state
from mlpd.storage.changes import Change, changes_after, load_position, newest_revision, note
from mlpd.storage.environment import Environment
from mlpd.storage.leader_store import LeaderStore, Lease, TableLeaderStore
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

ROWS_MAX, BYTES_MAX = 500, 1 << 20
"""Of one answer; a member asks again for the rest."""
WAIT_MAX_S = 30.0
LOOK_S = 0.02
"""How often whoever waits looks for something new: two point reads."""
SPREAD_S = 10.0
"""How long a change waits for members that follow."""
SILENT_S = 2.0
"""A member that hasn't asked for so long isn't waited for, unless it is at work on changes."""


@dataclass(frozen=True, slots=True)
class _Follower:
    """What a member said last: its `revision`, and when (monotonic); `why`: what hinders it.

    `given`: the revision up to which it has been given changes.
    """

    revision: int
    asked_s: float
    why: str
    given: int


class Shared:
    """Says what changed, and knows how far the others have come; every method is the loop's."""

    def __init__(self, environment: Environment, writer: Writer, ownership: Ownership) -> None:
        self._environment = environment
        self._writer = writer
        self._ownership = ownership
        self._leaders: LeaderStore = TableLeaderStore()
        self._lease: Lease | None = None
        self._followers: dict[str, _Follower] = {}
        self._awaited_since: dict[str, float] = {}
        self.hindrance: Callable[[], str] = lambda: ""
        """Says what keeps this member from following."""

    @property
    def arbiter(self) -> Shard | None:
        """The member that decides, None if that is this daemon."""
        member = self._ownership.member
        if member is None or member.shard_map.arbiter.name == member.shard:
            return None
        return member.shard_map.arbiter

    @property
    def decides(self) -> bool:
        """Whether changes of what is shared are made here."""
        return self.arbiter is None

    async def lead(self) -> None:
        """Take the lease if this daemon decides and has none of this map yet; else let it go."""
        if not self.decides:
            self._lease = None
            return
        epoch = self._ownership.epoch
        if self._lease is None or self._lease.epoch < epoch:
            self._lease = await self._writer.write(lambda txn: self._leaders.acquire(txn, epoch))

    def fence(self, txn: WriteTransaction) -> None:
        """Raise unless what members share may be changed here in this transaction.

        ConflictError: `not_arbiter`, or `lease_lost` for who took the lease earlier than another.
        """
        if not self.decides:
            raise ConflictError(
                "the arbiter decides this for all members, and this one is not it",
                code="not_arbiter",
                hint="Ask over HTTP: any member hands it on.",
            )
        if self._lease is None or self._leaders.current(txn) != self._lease:
            raise ConflictError(
                "this daemon doesn't hold the lease of the arbiter",
                code="lease_lost",
                hint="Another daemon took it over; look at mlpd shard status.",
            )

    def revision(self) -> int:
        """Return the revision of the newest change here; about 5 us."""
        with self._environment.snapshot() as snapshot:
            return newest_revision(snapshot)

    def definitions_version(self, own: int) -> int:
        """Return the version of the definitions that all members know them by; `own`: this one's.

        Of a member that follows it is the arbiter's.
        """
        if self.decides:
            return own
        with self._environment.snapshot() as snapshot:
            position = load_position(snapshot)
        return own if position is None else position.definitions

    async def changes(
        self, cluster: str, shard: str, after: int, wait_s: float, why: str
    ) -> dict[str, Any]:
        """Return the first changes after a revision, waiting for one if there is none.

        `shard`: the member that asks and has all up to `after`; `why`: what hinders it from more.
        Raises ConflictError: `not_arbiter`, `other_cluster`, `arbiter_behind`,
        NotFoundError(code="unknown_shard"), ValidationError(code="invalid_revision").
        """
        self._check(cluster, shard)
        if not 0 <= after <= INT64_MAX:
            raise ValidationError(
                f"'after' is {after}, which is no revision",
                code="invalid_revision",
                hint="0 at first, then that of the last change.",
            )
        until_s = time.monotonic() + min(max(wait_s, 0.0), WAIT_MAX_S)
        while (newest := self.revision()) <= after and time.monotonic() < until_s:
            self._followers[shard] = _Follower(after, time.monotonic(), why, after)
            await asyncio.sleep(LOOK_S)
        if newest < after:
            raise ConflictError(
                f"the arbiter is at revision {newest}, shard {shard} at {after}",
                code="arbiter_behind",
                hint="It was restored from an older backup: what it lacks is on the members alone.",
                details={"revision": newest},
            )
        found = await asyncio.to_thread(self._read, after) if newest > after else []
        given = found[-1][0] if found else after
        self._followers[shard] = _Follower(after, time.monotonic(), why, given)
        leader = [0, 0] if self._lease is None else [*self._lease]
        return {"revision": newest, "leader": leader, "changes": found}

    async def spread(self, revision: int) -> None:
        """Wait until all members that follow have come to a revision, SPREAD_S at most."""
        until_s = time.monotonic() + SPREAD_S
        while time.monotonic() < until_s and self._awaited(revision):  # noqa: ASYNC110 - by time, too
            await asyncio.sleep(LOOK_S)

    async def settle(self) -> None:
        """Wait until all members that follow have what is here now, SPREAD_S at most."""
        await self.spread(self.revision())

    def describe(self) -> dict[str, Any]:
        """Return whether this daemon is the `arbiter`, its revision, and who follows."""
        with self._environment.snapshot() as snapshot:
            newest, position = newest_revision(snapshot), load_position(snapshot)
        now_s = time.monotonic()
        arbiter = self.arbiter
        if arbiter is not None:
            followed = 0 if position is None else position.revision
            return {"arbiter": arbiter.name, "revision": followed, "why": self.hindrance()}
        member = self._ownership.member
        return {
            "arbiter": None if member is None else member.shard,
            "revision": newest,
            "followers": {
                name: {
                    "revision": f.revision,
                    "asked_s": round(now_s - f.asked_s, 3),
                    "why": f.why,
                }
                for name, f in sorted(self._followers.items())
            },
        }

    async def adopt(self) -> None:
        """Give revisions to what was there before there were any, and take the lease; at start."""
        if self.revision() == 0:
            await self._writer.write(_adopt)
        await self.lead()

    def _check(self, cluster: str, shard: str) -> None:
        member = self._ownership.member
        if member is None or not self.decides:
            raise ConflictError(
                "this daemon is not the arbiter of a cluster",
                code="not_arbiter",
                hint="Fetch the map: the first shard in it is.",
            )
        if member.shard_map.cluster != cluster:
            raise ConflictError(
                f"this shard belongs to cluster {member.shard_map.cluster}, not {cluster}",
                code="other_cluster",
            )
        member.shard_map.shard(shard)

    def _awaited(self, revision: int) -> bool:
        """Tell whether a member that follows hasn't come to a revision yet.

        One that is new in the map has SILENT_S to be heard of.
        """
        now_s = time.monotonic()
        for shard in self._ownership.others():
            follower = self._followers.get(shard.name)
            if follower is None:
                if now_s - self._awaited_since.setdefault(shard.name, now_s) < SILENT_S:
                    return True
            elif follower.revision < revision and not follower.why:
                patience_s = SPREAD_S if follower.given > follower.revision else SILENT_S
                if now_s - follower.asked_s < patience_s:
                    return True
        return False

    def _read(self, after: int) -> list[list[Any]]:
        with self._environment.snapshot() as snapshot:
            found = changes_after(snapshot, after, ROWS_MAX, BYTES_MAX)
        return [[c.revision, str(c.table), c.key, _told(c)] for c in found]


def _told(change: Change) -> Any:
    """Return what is told of a row: of definitions their version and document, else its bytes."""
    if change.table is not Table.DEFINITIONS or change.value is None:
        return change.value
    state: Mapping[str, Any] = read_state(change.value)
    return [state["version"], state["document"]]


def _adopt(txn: WriteTransaction) -> None:
    if txn.get(Table.DEFINITIONS, CURRENT_KEY) is not None:
        note(txn, Table.DEFINITIONS, CURRENT_KEY)
    for key, _ in list(txn.scan(Table.MODELS, b"e", b"f")):
        note(txn, Table.MODELS, key)
    for key, _ in list(txn.scan(Table.EXPERIMENTS)):
        if b"\x00" not in key:  # a point of a timeline
            note(txn, Table.EXPERIMENTS, key)
    for key, _ in list(txn.scan(Table.ROUTES)):
        note(txn, Table.ROUTES, key)
