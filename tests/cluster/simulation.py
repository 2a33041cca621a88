"""A cluster in one thread: the code of roles, leases, maps and promotions on a clock, a network and
disks that a seed decides on.

Real: Roles, Lease, Promise, Ownership (its map and compare-and-set), RoleStore, FileMapStore, the
steps of a promotion, Puller, Companion, and the client's idea of who is the owner.  Simulated: what
carries their calls, the time that disks take, and the log, which is a list of numbers here.
"""

import asyncio
import random
import shutil
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from mlpd.cluster.replica import beside, pull
from mlpd.cluster.replica.promote import carry_out, give_up, plan_promotion
from mlpd.core.errors import ConflictError, MlpdError, NotFoundError, UnavailableError
from mlpd.core.shards import Shard, ShardMap, decode_map
from mlpd.daemon.feeding import Follower
from mlpd.daemon.ownership import Ownership
from mlpd.daemon.roles import Roles, elsewhere
from mlpd.daemon.tailing import Tailing
from mlpd.http.replica import ReplicaHandlers
from mlpd.storage.map_store import FileMapStore, Member
from mlpd.storage.roles import Role, RoleStore
from mlpd.storage.tables import EMPTY_HEAD, Head
from tests.cluster.clock import Loop, run

SLOTS = 8
"""Of the map, in place of 16,384: every map is made some hundred times."""
TIMEOUT_S = 1.0


class _Following:
    """A log of numbers, as `Tailing` applies one; staleness is the real thing's."""

    note, staleness_s = Tailing.note, Tailing.staleness_s
    check_fresh, now_s = Tailing.check_fresh, Tailing.now_s
    lag_rows = Tailing.lag_rows

    def __init__(self, node: "Node") -> None:
        self._node = node
        self._monotonic = node.clock
        self._fresh_s: float | None = None
        self._newest: Head | None = None
        self.trouble: str | None = None

    @property
    def head(self) -> Head:
        return head_of(self._node.log)

    def decode(self, data: tuple[Head, list[int]]) -> list[Any]:
        if data[0] != self.head:
            raise ConflictError("the commits don't follow what is here", code="feed_gone")
        return [data]

    def missing(self, _: Any) -> list[Any]:
        return []

    async def apply(self, commits: Any, size_bytes: int = 0) -> None:  # noqa: ARG002
        node = self._node
        async with node.writing:
            ((head, entries),) = commits
            await node.loop.run_in_executor(None, lambda: None)
            if head != self.head or not node.roles.role.follows:
                raise ConflictError("the commits don't follow what is here", code="feed_gone")
            node.log.extend(entries)


@dataclass
class Node:
    """A daemon: what is on its disk stays when it crashes, all else goes."""

    sim: "Simulation"
    url: str
    directory: Path
    drift: float
    log: list[int] = field(default_factory=list)
    """Its disk's: the number of each commit."""
    feed_from: int = 0
    alive: bool = False

    @property
    def loop(self) -> Loop:
        return self.sim.loop

    def clock(self) -> float:
        """This machine's monotonic clock, which is a little fast or slow."""
        return self.loop.now_s * self.drift

    def boot(self) -> None:
        """Start the process."""
        self.alive, self.tasks = True, set[asyncio.Task[Any]]()
        self.companion = beside.Companion(None, lambda _: None)
        self.spawn(self._live())

    async def _live(self) -> None:
        """Be one daemon after the other, as `serve` does."""
        while True:
            self.ready = False
            try:
                await self.companion.prepare(self.directory)
            except MlpdError:
                await asyncio.sleep(1.0)
                continue
            self._build()
            await asyncio.sleep(self.sim.rng.uniform(0.05, 0.5))
            self.ready = True
            beside_it = self.spawn(self.companion.run(self.daemon, self.url))
            await self.roles.changed.wait()
            self.ready = False
            beside_it.cancel()
            await asyncio.gather(beside_it, return_exceptions=True)

    def _build(self) -> None:
        self.writing = asyncio.Lock()
        self.roles = Roles(RoleStore(self.directory), self.sim.lease_us, self.clock)
        writer = SimpleNamespace(write=self._write_map)
        self.ownership = Ownership(FileMapStore(self.directory), writer, None)  # type: ignore[arg-type]  # it needs no more here
        self.roles.member = lambda: self.ownership.member
        self.roles.barrier = self._pass
        self.tailing = _Following(self)
        self.followers: dict[str, Follower] = {}
        if self.roles.is_owner:
            self.feed_from = len(self.log) if self.sim.forgets_feeds else 0
        self.daemon: Any = SimpleNamespace(
            roles=self.roles,
            ownership=self.ownership,
            tailing=self.tailing,
            feeding=SimpleNamespace(lags=self._lags),
            paths=SimpleNamespace(socket=self.directory / "s", root=self.directory),
        )
        self.handlers = ReplicaHandlers(self.daemon)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def crash(self) -> None:
        """Lose everything that isn't on disk."""
        self.alive = self.ready = False
        for task in list(self.tasks):
            task.cancel()

    async def _write_map(self, op: Any) -> Any:
        async with self.writing:
            self.roles.check_begin()
            return op(None)

    async def _pass(self) -> None:
        async with self.writing:
            return

    def _lags(self) -> dict[str, tuple[int, float]]:
        now_s, head = self.clock(), head_of(self.log)
        return {
            url: (
                int(head.sequence - one.head.sequence),
                0.0 if one.head == head and now_s - one.asked_s < 1 else now_s - one.fresh_s,
            )
            for url, one in self.followers.items()
        }

    async def handle(self, method: str, fields: dict[str, Any]) -> Any:
        """Answer a call, as the daemon's routes do."""
        if not self.ready:
            raise UnavailableError("starting", code="not_ready")
        found: Any = await getattr(self, f"_on_{method}")(**fields)
        return found

    async def _on_map(self) -> Any:
        return self.ownership.to_dict()

    async def _on_role(self) -> Any:
        return self.handlers._describe()

    async def _on_put_map(self, shard_map: Any, shard: str, expected: int) -> Any:
        if not self.roles.is_open:
            raise elsewhere(self.roles.role, self.ownership.member)
        return await self.ownership.install(shard_map, shard, expected)

    async def _on_step_role(self, step: str, **fields: Any) -> Any:
        if step == "pause":
            await self.handlers._pause(fields["url"], fields["token"])
        elif step == "resume":
            await self.roles.resume(fields.get("token"))
        elif step == "stand":
            await self.roles.stand()
        elif step == "fence":
            new = decode_map(fields["map"])
            await self.roles.fence(new, self.ownership.adopt, token=fields.get("token"))
        else:
            await self.handlers._promote(decode_map(fields["map"]), fields.get("head"))
            self.sim.note_promotion(self)
        return self.handlers._describe()

    async def _on_feed(
        self, after: str, follower: str, ticket: int | None = None, *, wait: bool = False
    ) -> Any:
        if self.roles.role.name not in ("owner", "paused"):
            raise elsewhere(self.roles.role, self.ownership.member)
        head, now_s = Head.parse(after), self.clock()
        self.roles.lease.renew(follower, ticket)
        if wait and head == head_of(self.log):
            await asyncio.sleep(0.25 + 0.25 * self.sim.rng.random())
        newest, at = head_of(self.log), int(head.sequence)
        is_prefix = at <= len(self.log) and head_of(self.log[:at]) == head
        if not is_prefix or (at < self.feed_from and head != newest):
            raise ConflictError("gone", code="feed_gone")
        known = self.followers.get(follower)
        fresh_s = now_s if head == newest or known is None else known.fresh_s
        self.followers[follower] = Follower(now_s, head, fresh_s)
        entries = self.log[at : at + 3]
        return {
            "commits": (head, entries) if entries else None,
            "head": newest.text,
            "epoch": self.ownership.epoch,
            "ticket": self.roles.lease.give(self.clock()),
            "lease_us": self.sim.lease_us,
        }

    async def _on_snapshot(self) -> Any:
        if self.roles.role.name != "owner":
            raise elsewhere(self.roles.role, self.ownership.member)
        return list(self.log), self.ownership.member

    async def _on_write(self, number: int) -> Any:
        if not self.roles.is_open:
            raise elsewhere(self.roles.role, self.ownership.member)
        async with self.writing:  # as a group commit: begin, disk, end
            self.roles.check_begin()
            await self.loop.run_in_executor(None, lambda: self.log.append(number))
            self.roles.check_end()
            return self.sim.acknowledge(self, number, len(self.log))

    async def _on_read(self, min_sequence: int) -> Any:
        role = self.roles.role
        if role.name == "fenced":
            raise elsewhere(role, self.ownership.member)
        if len(self.log) < min_sequence:
            raise UnavailableError("not here yet", code="sequence_not_reached")
        if role.follows and not min_sequence:
            self.tailing.check_fresh(10.0)
        return list(self.log)


def head_of(log: list[int]) -> Head:
    return Head(len(log), log[-1], log[-1], log[-1]) if log else EMPTY_HEAD  # type: ignore[arg-type]  # numbers


class _Client:
    """What `AsyncClient` is to the code under test."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.cluster = self
        self._call = call

    def __getattr__(self, method: str) -> Any:
        def ask(*args: Any, **fields: Any) -> Any:
            names = {"feed": ("after",), "step_role": ("step",)}.get(method, ())
            return self._call(method, {**dict(zip(names, args, strict=False)), **fields})

        return ask

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return


class Simulation:
    """One schedule; `run` it, then look at `problems`."""

    def __init__(self, seed: int, root: Path, *, lease: bool, lost: bool, shards: int) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.lease_us = 3_000_000 if lease else 0
        self.lost, self.forgets_feeds = lost, self.rng.random() < 0.3
        self.loop = Loop()
        self.loop.now_s = 1000.0  # clocks don't begin when a daemon does
        self.loop.lag_s = self._disk_s
        self.problems: list[str] = []
        self.acked: list[tuple[int, int, int, str, float]] = []
        """Number, sequence, epoch, who, when."""
        self.promotions: list[tuple[float, str, str, bool]] = []
        self.blocked: set[frozenset[str]] = set()
        self.calm = False
        self.nodes: dict[str, Node] = {}
        self.shards = shards
        self._number = 0
        for name in ("a1", "a2", "a3", "b1")[: 2 + shards]:
            url = f"http://{name}:1"
            drift = self.rng.uniform(0.991, 1.009)
            (root / name).mkdir(parents=True)
            self.nodes[url] = Node(self, url, root / name, drift)

    # What the code under test does goes through here.

    async def call(self, source: str, target: str, method: str, fields: dict[str, Any]) -> Any:
        rng = self.rng
        lossy = not self.calm
        await asyncio.sleep(rng.uniform(0.0005, 0.4 if lossy and rng.random() < 0.05 else 0.01))
        node = self.nodes.get(target)
        if node is None or not node.alive:
            raise UnavailableError("nobody is there", code="unreachable")
        cut = frozenset((source, target)) in self.blocked
        if cut or (lossy and rng.random() < 0.03):
            await asyncio.sleep(TIMEOUT_S)
            raise UnavailableError("it didn't answer", code="timeout")
        if lossy and rng.random() < 0.03:  # it comes twice
            again = self._deliver(node, method, fields, rng.uniform(0.0, 2.0))
            node.spawn(again)
        answering = node.spawn(self._deliver(node, method, fields, 0.0))
        done, _ = await asyncio.wait((answering,), timeout=TIMEOUT_S)
        lost = lossy and rng.random() < 0.03
        if not done or answering.cancelled() or lost or frozenset((source, target)) in self.blocked:
            raise UnavailableError("it didn't answer", code="timeout")
        error, found = answering.result()
        if error is not None:
            raise error
        return found

    async def _deliver(self, node: Node, method: str, fields: dict[str, Any], wait_s: float) -> Any:
        await asyncio.sleep(wait_s)
        try:
            return None, await node.handle(method, dict(fields))
        except MlpdError as error:
            return error, None

    def client(self, source: str, target: str) -> Any:
        return _Client(lambda method, fields: self.call(source, target, method, fields))

    async def start_following(
        self, directory: Path, url: str, told: Any, *, discard: bool, again: bool = False
    ) -> None:
        """As mlpd.cluster.replica.start does, all or nothing."""
        del told, discard, again
        node = next(one for one in self.nodes.values() if one.directory == directory)
        log, member = await self.call(node.url, url, "snapshot", {})

        def put() -> None:
            node.log = list(log)
            shutil.rmtree(directory)
            directory.mkdir()
            FileMapStore(directory).store(member, 0)
            RoleStore(directory).store(Role("follower", url, lease_us=self.lease_us))

        await asyncio.to_thread(put)

    # The schedule.

    def run(self, seconds: float = 25.0) -> None:
        with self._patched():
            run(self.loop, self._main(seconds))

    def _disk_s(self) -> float:
        return self.rng.uniform(0.0, 0.5 if self.rng.random() < 0.03 else 0.005)

    @contextmanager
    def _patched(self) -> Iterator[None]:
        """Put the simulation in the place of the network and of a task's own node."""
        kept = beside._client, pull._client, beside.start_following

        def client(target: str) -> Any:
            task = asyncio.current_task()
            source = next((n.url for n in self.nodes.values() if n.alive and task in n.tasks), "?")
            return self.client(source, target)

        beside._client = pull._client = client  # type: ignore[assignment]
        beside.start_following = self.start_following  # type: ignore[assignment]
        try:
            yield
        finally:
            beside._client, pull._client, beside.start_following = kept

    async def _main(self, seconds: float) -> None:
        try:
            self._boot()
            await self._live(self.loop.now_s + seconds)
            await self._settle()
        finally:
            for node in self.nodes.values():
                if node.alive:
                    node.crash()

    def _boot(self) -> None:
        urls = [*self.nodes]
        a, others = urls[0], urls[1:3]
        followers = others if self.rng.random() < 0.5 or self.shards > 1 else others[:1]
        names = [Shard("a", a, tuple(followers))]
        owners = [0] * SLOTS
        if self.shards > 1:  # b decides nothing; a's map counts.  Followers are b's then
            names = [Shard("a", urls[3]), Shard("b", a, tuple(followers))]
            owners = [0] * (SLOTS // 2) + [1] * (SLOTS // 2)
        self.name = names[-1].name
        made = ShardMap("0f" * 16, 1, tuple(names), tuple(owners))
        self.first_map = made
        for shard in made.shards:
            FileMapStore(self.nodes[shard.url].directory).store(Member(shard.name, made), 0)
        for url in followers:
            directory = self.nodes[url].directory
            FileMapStore(directory).store(Member(self.name, made), 0)
            RoleStore(directory).store(Role("follower", a, lease_us=self.lease_us))
        self.members = [a, *followers]
        self.all = list(dict.fromkeys([*(shard.url for shard in made.shards), *followers]))
        for url in self.all:
            self.nodes[url].boot()

    async def _live(self, until_s: float) -> None:
        works = [self._write(until_s), self._write(until_s), self._read(until_s)]
        works += [self._break(until_s), self._break(until_s), self._operate(until_s)]
        if not self.lost:  # of a lost owner one person decides
            works += [self._operate(until_s), self._operate(until_s)]
        await asyncio.gather(*works)

    async def _write(self, until_s: float) -> None:
        url = self.rng.choice(self.members)
        while self.loop.now_s < until_s:
            self._number += 1
            try:
                await self.call("client", url, "write", {"number": self._number})
            except MlpdError as error:
                named = error.details.get("url")
                url = named if named in self.nodes else self.rng.choice(self.members)
                await asyncio.sleep(self.rng.uniform(0.0, 0.3))
            await asyncio.sleep(self.rng.uniform(0.0, 0.3))

    async def _read(self, until_s: float) -> None:
        while self.loop.now_s < until_s:
            await asyncio.sleep(self.rng.uniform(0.0, 0.5))
            if not self.acked:
                continue
            number, sequence, *_ = self.rng.choice(self.acked[-20:])
            url = self.rng.choice(self.members)
            try:
                log = await self.call("client", url, "read", {"min_sequence": sequence})
            except MlpdError:
                continue
            if not self.lost and (len(log) < sequence or log[sequence - 1] != number):
                self.problems.append(f"a read at {url} of sequence {sequence} lacks {number}")

    async def _operate(self, until_s: float) -> None:
        """Promote now and then, and leave off anywhere, and give up."""
        while self.loop.now_s < until_s:
            await asyncio.sleep(self.rng.uniform(0.2, 4.0))
            kind = self.rng.random()
            try:
                if kind < 0.25:
                    await self._steps(give_up(self.first_map_now(), self.name))
                    continue
                lost = self.lost and kind < 0.5
                plan = await self._steps(plan_promotion(self.first_map_now(), self.name, lost=lost))
                tokens = iter(lambda: f"{self.rng.getrandbits(60):x}", None)
                steps = carry_out(plan, self.loop.time, lambda tokens=tokens: next(tokens))
                most = self.rng.choice((1, 2, 3, 5, 8, 1000))
                await asyncio.wait_for(self._steps(steps, most), 20.0)
            except (MlpdError, TimeoutError):
                continue

    def first_map_now(self) -> ShardMap:
        """Return some map of the cluster: a person's idea of it may be old."""
        url = self.rng.choice(self.all)
        member = FileMapStore(self.nodes[url].directory).load()
        return self.first_map if member is None else member.shard_map

    async def _steps(self, steps: Any, most: int = 1000) -> Any:
        """Carry out steps, `most` of them, as a command would that is killed then."""
        asked, answer, error = 0, None, None
        while True:
            try:
                step = steps.throw(error) if error is not None else steps.send(answer)
            except StopIteration as stop:
                return stop.value
            answer = error = None
            if isinstance(step, float):
                await asyncio.sleep(step)
                continue
            asked += 1
            if asked > most:
                steps.close()
                return None
            try:
                answer = await self.call("person", step.url, step.method, dict(step.fields))
            except MlpdError as failed:
                error = failed

    async def _break(self, until_s: float) -> None:
        """Crash daemons and cut the network, for a while each."""
        rng = self.rng
        while self.loop.now_s < until_s:
            await asyncio.sleep(rng.uniform(0.2, 4.0))
            if rng.random() < 0.5:
                node = self.nodes[rng.choice(self.all)]
                if node.alive:
                    node.crash()
                    await asyncio.sleep(rng.uniform(0.0, 5.0))
                    node.boot()
            else:
                cut = rng.choice([*self.all, *self.all, "client", "person"])
                odds = {"client": 0.2} if cut in self.nodes else {}
                others = [*self.nodes, "client", "person"]
                ends = {
                    frozenset((cut, other))
                    for other in others
                    if rng.random() < odds.get(other, 0.8)
                }
                self.blocked |= ends
                await asyncio.sleep(rng.uniform(0.1, 8.0))
                self.blocked -= ends

    async def _settle(self) -> None:
        """Let everything heal, finish what was begun, and look at what is there."""
        self.calm = True
        self.blocked.clear()
        owner: Node | None = None
        for _ in range(60):
            await asyncio.sleep(2.0)
            try:
                current = await self._steps(give_up(self.first_map_now(), self.name))
            except ConflictError as error:
                if error.code == "promotion_done":
                    await self._finish()
                continue
            except (MlpdError, NotFoundError):
                continue
            owner = self.nodes[current.shard(self.name).url]
            if owner.ready and owner.roles.is_open and self._agree(owner):
                break
        else:
            states = {n.url: n.roles.role for n in self.nodes.values() if n.url in self.members}
            self.problems.append(f"it never came to rest: {states}")
            return
        self._look(owner)

    async def _finish(self) -> None:
        try:
            plan = await self._steps(plan_promotion(self.first_map_now(), self.name))
            await self._steps(carry_out(plan, self.loop.time))
        except MlpdError:
            return

    def _agree(self, owner: Node) -> bool:
        """Tell whether exactly one daemon is the shard's owner, as the map says."""
        mine = [
            self.nodes[url]
            for url in self.members
            if self.nodes[url].ready and self.nodes[url].ownership.member.shard == self.name  # type: ignore[union-attr]
        ]
        return [node for node in mine if node.roles.role.name in ("owner", "paused")] == [owner]

    # What must hold.

    def acknowledge(self, node: Node, number: int, sequence: int) -> int:
        self.acked.append((number, sequence, node.ownership.epoch, node.url, self.loop.now_s))
        return sequence

    def note_promotion(self, node: Node) -> None:
        role = node.roles.role
        if role.name == "owner" and role.fence:
            self.promotions.append((self.loop.now_s, node.url, role.fence[0], bool(self.lease_us)))

    def _look(self, owner: Node) -> None:
        by_epoch: dict[int, set[str]] = {}
        for _, _, epoch, url, _ in self.acked:
            by_epoch.setdefault(epoch, set()).add(url)
        for epoch, urls in by_epoch.items():
            if len(urls) > 1:
                self.problems.append(f"{sorted(urls)} acknowledged writes in epoch {epoch}")
        if not self.lost:
            for number, sequence, _, url, _ in self.acked:
                if len(owner.log) < sequence or owner.log[sequence - 1] != number:
                    self.problems.append(f"{number}, sequence {sequence} of {url}, is lost")
                    break
        if self.lease_us:
            self._look_at_leases()

    def _look_at_leases(self) -> None:
        """Find writes that an owner acknowledged after another one had taken its place."""
        for at_s, _, former, _ in self.promotions:
            since = [p for p in self.promotions if p[0] > at_s and p[1] == former]
            again_s = since[0][0] if since else float("inf")
            late = [a for a in self.acked if a[3] == former and at_s < a[4] < again_s]
            if late:
                self.problems.append(f"{former} acknowledged {late[0]} after {at_s}")
