"""A world: nodes, clients, people who move slots, and what goes wrong; all of it by one seed."""

import asyncio
import hashlib
import random
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self
from unittest import mock

from mlpd.client.requests import call
from mlpd.cluster import members, moving
from mlpd.cluster.leftovers import forget, leftovers
from mlpd.cluster.membership import add_member, check_removable, drain_moves, remove_member
from mlpd.cluster.moving import cancel, carry_out, newest_map, pending, plan_moves, wanted_moves
from mlpd.cluster.placement import first_map
from mlpd.cluster.placement import moves as moves_of
from mlpd.cluster.placement import rebalance as place
from mlpd.core.errors import ConflictError, MlpdError
from mlpd.core.names import TimeUs
from mlpd.core.shards import Shard, ShardMap, parse_runs
from mlpd.daemon.part import Moves
from mlpd.storage.changes import Position, store_position
from tests.cluster import moving as documents
from tests.cluster.clock import START_US, Killed, Loop, StuckError, Turns, run
from tests.cluster.histories.checks import (
    EVENTS_MAX,
    History,
    Key,
    Owners,
    check_end,
    slot,
)
from tests.cluster.histories.network import (
    LATE_S,
    DriversClient,
    Network,
    SimulatedClient,
    Weather,
)
from tests.cluster.histories.nodes import SOURCE, Node, WatchedOwnership

NAMES, SPARE = "abc", "d"
"""The members of the first map, and a daemon that has none yet."""
USERS, SHOPS = [f"u{i}" for i in range(4)], [f"s{i}" for i in range(3)]
KEYS: list[Key] = [*(("user", u) for u in USERS), *(("shop", s) for s in SHOPS)]
STEPS = (
    *("leaving begin", "leaving pause", "arriving seal", "leaving leave", "map"),
    *("leaving cancel", "arriving cancel", "arriving finish", "leaving finish"),
)
"""Of moves: clients send and read when one of them comes to a member."""
FATAL = (
    *(("arriving begin",), ("leaving pause",), ("leaving leave",), ("leaving finish",)),
    *(("leaving leave", "map"), ("leaving leave", "map"), ("leaving cancel", "map")),
    *(("leaving cancel",), ("arriving cancel",)),
)
"""The last one of these steps of a command is late, and its driver doesn't live on."""
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
LONG_S = 3600.0


@dataclass
class Outcome:
    """What came of a seed: what was wrong, a digest of all that happened, and how much that was."""

    seed: int
    violations: list[str]
    digest: str
    requests: int
    events: int
    crashes: int
    moves: int
    added: int
    removed: int
    codes: dict[str, int] = field(default_factory=dict)
    trace: list[str] = field(default_factory=list)


class World:
    """One history; `main` runs it."""

    def __init__(self, seed: int, root: Path, loop: Loop, *, keep_trace: bool) -> None:
        self.rng = random.Random(seed)
        self.loop = loop
        self.history = History()
        self._digest = hashlib.blake2b(digest_size=8)
        self.trace: list[str] | None = [] if keep_trace else None
        self.slow_disk = 0.0
        self.crashes = self.moves = self.added = self.removed = self._number = 0
        self.nodes = {
            name: Node(name, root / name, partial(self._clock, skew), self._disk_s)
            for name, skew in zip(NAMES + SPARE, self._skews(), strict=True)
        }
        self.map = member_map()
        self.network = Network(self.nodes, self.rng)
        self.network.told = self.tell
        self.owners = Owners(self.nodes, self.history)
        self._template = root.parent / "template"
        loop.lag_s = self._disk_s

    async def _turn(self, mean_s: float) -> None:
        """Wait for a while, more often than not for a step of a move."""
        if self.rng.random() < 0.3:
            await asyncio.sleep(self.rng.expovariate(1.0) * mean_s)
            return
        anywhere = False
        with suppress(TimeoutError):
            async with asyncio.timeout(2 * mean_s):
                if anywhere := self.rng.random() < 0.5:
                    await self.network.step("leaving begin")
                else:
                    await self.network.step(self.rng.choice(STEPS))
        wide_s = 0.02 if anywhere else self.rng.choice((0.0005, 0.005, 0.05))
        await asyncio.sleep(self.rng.expovariate(1.0) * wide_s)

    def tell(self, *what: Any) -> None:
        """Note what happens."""
        line = f"{self.loop.now_s:.6f} " + " ".join(map(str, what))
        self._digest.update(line.encode())
        if self.trace is not None:
            self.trace.append(line)

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def _skews(self) -> list[int]:
        wide = 200_000 if self.rng.random() < 0.2 else 2_000
        return [self.rng.randrange(-wide, wide) for _ in NAMES + SPARE]

    def _clock(self, skew_us: int) -> TimeUs:
        return TimeUs(START_US + int(self.loop.now_s * 1e6) + skew_us)

    def _disk_s(self) -> float:
        slow = self.rng.random() < self.slow_disk
        return self.rng.expovariate(1.0) * (0.15 if slow else 0.0003)

    def _changed(self) -> None:
        self.owners.check()

    # What goes on.

    async def main(self) -> None:
        rng = self.rng
        WatchedOwnership.watcher = staticmethod(self._changed)
        try:
            self.start(NAMES)
            self.network.weather = _weather(rng)
            self.slow_disk = rng.choice((0.0, 0.0, 0.02, 0.3))
            span_s = rng.choice((1.0, 2.0, 4.0))
            clients = [self._write(i, span_s) for i in range(2)]
            clients += [self._read(span_s)]
            troubles = [self._trouble(span_s)] if rng.random() < 0.7 else []
            drivers = [self._drive(f"driver{i}", span_s) for i in range(rng.choice((1, 1, 2)))]
            await self._all([*clients, *troubles, *drivers])
            await self._heal()
            await self._end()
        except* StuckError as error:
            self.history.blame(f"it never ends: {error.exceptions[0]}")
        finally:
            WatchedOwnership.watcher = staticmethod(lambda: None)
            for node in self.nodes.values():
                if node.daemon is not None:
                    node.crash()
            await asyncio.sleep(0)

    async def _all(self, works: Sequence[Any]) -> None:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(work)

    def start(self, names: Sequence[str]) -> None:
        for name in names:
            self.nodes[name].start()
            self.tell("starts", name)
        self.owners.check()

    def client(self, sender: str, timeout_s: float = 8.0) -> SimulatedClient:
        urls = [self.nodes[name].url for name in NAMES]
        self.rng.shuffle(urls)
        return SimulatedClient(self.network, sender, urls, self.rng, timeout_s)

    async def _write(self, index: int, span_s: float) -> None:
        rng, client = self.rng, self.client(f"writer{index}")
        while self.loop.now_s < span_s and self._number < EVENTS_MAX:
            count = min(rng.choice((1, 4, 8)), EVENTS_MAX - self._number)
            numbers = range(self._number, self._number + count)
            self._number += count
            rows = [self._row(number) for number in numbers]
            try:
                answer = await client.events.send(SOURCE, rows, idempotency_key=f"k{numbers[0]}")
            except MlpdError as error:
                self.history.codes[error.code] += 1
                self.tell("not acknowledged", numbers, error.code)
            else:
                if answer["accepted"] != count:
                    self.history.blame(f"{answer['accepted']} of {count} events were accepted")
                self.history.acknowledge(numbers)
                self.history.note_sequences(answer["sequence"], numbers)
                self.tell("acknowledged", numbers)
            await self._turn(span_s / 4)

    def _row(self, number: int) -> dict[str, Any]:
        user, shop = self.rng.choice(USERS), self.rng.choice(SHOPS)
        self.history.sent[number] = ("user", user), ("shop", shop)
        at = START_US + int(self.loop.now_s * 1e6) - 1_000_000
        return {"at": at, "user": user, "shop": shop, "n": 1 << number}

    async def _read(self, span_s: float) -> None:
        client = self.client("reader")
        while self.loop.now_s < span_s:
            kind = self.rng.choice(("user", "shop"))
            keys = [key for key in KEYS if key[0] == kind]
            if self.rng.random() < 0.5:
                await self._read_at_least(kind, keys)
            else:
                await self._read_once(client, kind, keys, "a read")
            await self._turn(span_s / 7)

    async def _read_at_least(self, kind: str, keys: list[Key]) -> None:
        """Ask a member for keys of its own as of a sequence that it may not have come to yet."""
        node = self.nodes[self.rng.choice(NAMES)]
        if node.daemon is None or node.ownership.member is None:
            return
        owned = node.ownership.member.flags
        keys = [key for key in keys if owned[slot(key)]]
        with node.daemon.environment.snapshot() as snapshot:
            sequence = int(snapshot.sequence) + self.rng.randrange(6)
        if not keys or not sequence:
            return
        fields = {
            "service": f"{kind}s",
            "entities": [{kind: name} for _, name in keys],
            "min_sequence": sequence,
        }
        client = SimulatedClient(self.network, "reader", node.url, self.rng, 3.0)
        try:
            found = await client.send(call("POST", "v1", "features", "read", fields=fields))
        except MlpdError as error:
            self.history.codes[f"read {error.code}"] += 1
            return
        if found["sequence"] < sequence:
            self.history.blame(f"a read from {sequence} on is of {found['sequence']}")
        totals = found["columns"][f"by_{kind}.n_sum_1d"]
        shown = {
            key: {n for n in range(EVENTS_MAX) if int(total or 0) >> n & 1}
            for key, total in zip(keys, totals, strict=True)
        }
        self.history.sequenced.append((node.name, sequence, shown))
        self.tell("read", node.name, "from", sequence, sorted(shown))

    async def _read_once(
        self, client: SimulatedClient, kind: str, keys: list[Key], where: str
    ) -> dict[Key, tuple[int, int]]:
        due = self.history.due(keys)
        try:
            found = await client.read_features(
                f"{kind}s", entities=[{kind: name} for _, name in keys]
            )
        except MlpdError as error:
            self.history.codes[f"read {error.code}"] += 1
            return {}
        failed = {error["index"] for error in found.get("errors", ())}
        counts, totals = (found["columns"][f"by_{kind}.{f}_1d"] for f in ("count", "n_sum"))
        shown: dict[Key, tuple[int, int]] = {}
        for i, key in enumerate(keys):
            if i not in failed:
                shown[key] = counts[i] or 0, int(totals[i] or 0)
                self.history.check_read(key, due[key], *shown[key], where)
        self.tell("read", kind, sorted(shown.items()))
        return shown

    async def _trouble(self, span_s: float) -> None:
        """Crash nodes and cut them off, and mend that."""
        rng = self.rng
        while self.loop.now_s < span_s:
            await self._turn(span_s / 3)
            node = self.nodes[rng.choice(NAMES + SPARE)]
            if node.daemon is None:
                continue
            if rng.random() < 0.7:
                self.crash(node)
                await asyncio.sleep(rng.expovariate(1.0) * 0.3)
                if node.daemon is None:
                    self.start([node.name])
            else:
                senders = rng.choice((("driver0", "driver1"), ("writer0", "reader")))
                cut = {(sender, node.name) for sender in senders}
                self.network.cut |= cut
                self.tell("cut", *senders, node.name)
                await asyncio.sleep(rng.expovariate(1.0) * 0.5)
                self.network.cut -= cut

    def crash(self, node: Node) -> None:
        self.crashes += 1
        self.tell("crashes", node.name)
        node.crash()

    async def _drive(self, name: str, span_s: float) -> None:
        """Run commands, one after the other, some of which are killed on their way."""
        rng, dead = self.rng, False
        while self.loop.now_s < span_s:
            if dead and rng.random() < 0.6:  # somebody sees at once that it didn't live on
                command: Callable[[str], None] = rng.choice((self._move, self._cancel))
            else:
                await asyncio.sleep(rng.expovariate(1.0) * span_s / 3)
                command = self._command()
            dead = False
            task = asyncio.ensure_future(Turns(partial(command, name)).to_end())
            self.network.fates.pop(name, None)
            if (end := rng.random()) < 0.3:
                self.loop.call_later(rng.expovariate(1.0) * 0.05, task.cancel)
            elif end < 0.5:
                self.network.fates[name] = rng.choice(FATAL), task.cancel
            try:
                await task
            except MlpdError as error:
                self.history.codes[f"{command.__name__} {error.code}"] += 1
                if error.code == "checksum_differs":
                    self.history.blame(error.message)
                self.tell(name, command.__name__, error.code, error.message)
            except asyncio.CancelledError:
                dead = True
                self.tell(name, "is killed")
            except Exception as error:  # noqa: BLE001 - nothing else may be raised
                self.history.blame("".join(traceback.format_exception(error)[-3:]))

    def _command(self) -> Callable[[str], None]:
        if self.rng.random() < 0.7:
            return self.rng.choice((self._move, self._move, self._cancel))
        return self.rng.choice((self._add, self._drain, self._remove))

    # Commands: in code that takes turns with the loop.

    def _connect(self, name: str) -> Callable[[str], Any]:
        clients: dict[str, DriversClient] = {}

        def connect(url: str) -> DriversClient:
            if url not in clients:
                clients[url] = DriversClient(self.network, name, url, self.rng)
            return clients[url]

        return connect

    def _move(self, name: str) -> None:
        """Move slots of some keys, or what somebody else left off."""
        connect = self._connect(name)
        newest = newest_map(self.map, connect)
        if (begun := list(pending(newest, connect))) and self.rng.random() < 0.6:
            part = self.rng.choice(begun)
            self._carry_out(newest, connect, parse_runs(part.slots), part.target)
            return
        chosen = self.rng.sample(KEYS, self.rng.randrange(1, 4))
        target = self.rng.choice(newest.shards).name
        self._carry_out(newest, connect, sorted({slot(key) for key in chosen}), target)

    def _carry_out(
        self, newest: ShardMap, connect: Any, slots: Sequence[int], target: str
    ) -> ShardMap:
        return self._carry_out_all(newest, connect, wanted_moves(newest, slots, target))

    def _carry_out_all(self, newest: ShardMap, connect: Any, wanted: Any) -> ShardMap:
        plan = plan_moves(newest, wanted, connect)
        for _ in carry_out(plan, connect, lambda *_: None):
            self.moves += 1
        return newest_map(newest, connect)

    def _add(self, name: str) -> None:
        """Make a daemon a member, with its share; one that was one before is empty again."""
        connect = self._connect(name)
        newest = newest_map(self.map, connect)
        known = {shard.name for shard in newest.shards}
        gone = [node for node in self.nodes.values() if node.name not in known]
        if not gone:
            return
        node = self.rng.choice(gone)
        if node.daemon is None or node.ownership.member is not None:
            self.tell("begins anew", node.name)
            node.begin_anew(self._template / SPARE)
            self.owners.forget(node.name)
        grown = add_member(newest, Shard(node.name, node.url), connect, dry_run=False)
        self.added += 1
        self._carry_out_all(grown, connect, moves_of(grown, place(grown, grown.shards)))

    def _drain(self, name: str) -> None:
        connect = self._connect(name)
        newest = newest_map(self.map, connect)
        gone = self.rng.choice(newest.shards).name
        self._carry_out_all(newest, connect, drain_moves(newest, gone))

    def _remove(self, name: str) -> None:
        connect = self._connect(name)
        newest = newest_map(self.map, connect)
        gone = self.rng.choice(newest.shards[1:] or newest.shards).name
        check_removable(newest, gone)
        newest = self._carry_out_all(newest, connect, drain_moves(newest, gone))
        remove_member(newest, gone, connect)
        self.removed += 1

    def _cancel(self, name: str) -> None:
        connect = self._connect(name)
        newest = newest_map(self.map, connect)
        for part in list(pending(newest, connect)):
            newest = cancel(newest, part, connect)
        for part in list(leftovers(newest, connect)):
            forget(newest, part, connect)

    # The end.

    async def _heal(self) -> None:
        """Let all that is late arrive, and mend what is broken."""
        self.network.weather, self.slow_disk = Weather(), 0.0
        self.network.cut.clear()
        begun = [node for node in self.nodes.values() if node.directory.exists()]
        self.start([node.name for node in begun if node.daemon is None])
        await asyncio.sleep(2 * LATE_S)
        assert not self.network.on_the_way
        self.tell("healed")

    async def _end(self) -> None:
        """What was begun can be ended, slots can move, and everything is there."""
        try:
            await Turns(self._settle).to_end()
        except MlpdError as error:
            self.history.blame(f"can't be settled: {error.code}: {error.message}")
        client, reads = self.client("reader"), {}
        for kind in ("user", "shop"):
            keys = [key for key in KEYS if key[0] == kind]
            reads |= await self._read_once(client, kind, keys, "the last read")
        if len(reads) != len(KEYS):
            self.history.blame(f"only {len(reads)} of {len(KEYS)} keys can be read")
        self.history.check_sequences()
        member = self.nodes["a"].ownership.member
        assert member is not None
        for shard in member.shard_map.shards:
            if (left := self.nodes[shard.name].ownership.moves) != Moves():
                self.history.blame(f"{shard.name} is left with {left}"[:300])
        check_end(self.nodes, member.shard_map, reads, self.history)

    def _settle(self) -> None:
        connect = self._connect("settler")
        newest = newest_map(self.map, connect)
        for part in list(pending(newest, connect)):
            is_lost = part.target not in {shard.name for shard in newest.shards}
            if part.state == "cancelling" or is_lost or self.rng.random() < 0.5:
                try:
                    newest = cancel(newest, part, connect)
                    continue
                except ConflictError as error:
                    if error.code != "move_done":
                        raise
            try:
                newest = self._carry_out(newest, connect, parse_runs(part.slots), part.target)
            except ConflictError as error:
                if error.code != "move_under_way":  # the target was taken: it never began there
                    raise
                newest = cancel(newest, part, connect)
        for part in list(leftovers(newest, connect)):
            forget(newest, part, connect)
        chosen = slot(self.rng.choice(KEYS))
        others = [s.name for s in newest.shards if s != newest.owner(chosen)]
        if others:
            self._carry_out(newest, connect, [chosen], self.rng.choice(others))


def _weather(rng: random.Random) -> Weather:
    def some(most: float) -> float:
        return rng.choice((0.0, 0.0, most / 5, most))

    parts = {"lost": 0.15, "late": 0.08, "mute": 0.15, "twice": 0.1}
    return Weather(slow=some(0.2), **{name: some(most) for name, most in parts.items()})


def member_map() -> ShardMap:
    """Return the first map of the cluster."""
    return first_map("0f" * 16, [Shard(name, f"http://{name}:1") for name in NAMES])


_FOLLOWED = Position(member_map().cluster, revision=1)
"""All have the definitions, and nobody changes what members share: no history follows that."""


@contextmanager
def prepared() -> Iterator[Path]:
    """Yield a folder with data directories of members: with definitions, and the first map."""
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="mlpd-simulation-") as root:
        made = Path(root) / "template"
        loop = Loop()
        nodes = [
            Node(n, made / n, lambda: TimeUs(START_US - 10_000_000), lambda: 0.0)
            for n in NAMES + SPARE
        ]

        async def prepare() -> None:
            for node in nodes:
                node.directory.mkdir(parents=True)
                node.start()
                assert node.daemon is not None
                await node.daemon.definitions.apply(documents.DOCUMENT)
                if node.name in NAMES:
                    await node.ownership.install(member_map().to_dict(), node.name, 0)
                await node.daemon.writer.write(lambda txn: store_position(txn, _FOLLOWED))
                node.crash()
            await asyncio.sleep(0)

        run(loop, prepare())
        yield Path(root)


def simulate(root: Path, seed: int, *, keep_trace: bool = False) -> Outcome:
    """Return what comes of a seed; `root` is of `prepared`."""
    place = root / "running"
    for name in NAMES:
        shutil.copytree(root / "template" / name, place / name)
    loop = Loop()
    world = World(seed, place, loop, keep_trace=keep_trace)
    token = SimpleNamespace(token_hex=lambda n: world.rng.randbytes(n).hex())
    try:
        with (
            mock.patch.object(moving, "secrets", token),
            mock.patch.object(members, "ThreadPoolExecutor", _Pool),
            mock.patch.object(moving, "ThreadPoolExecutor", _Pool),
        ):
            run(loop, world.main())
    finally:
        shutil.rmtree(place)
    return Outcome(
        seed, world.history.violations, world.digest, world.network.asked, world._number,
        world.crashes, world.moves, world.added, world.removed, dict(world.history.codes),
        world.trace or [],
    )  # fmt: skip


class _Pool:
    """In place of a pool of threads: work that takes turns, all of it at once."""

    def __init__(self, _: int) -> None:
        self._tasks: list[asyncio.Task[Any]] = []

    def submit(self, work: Any, *args: Any, **fields: Any) -> SimpleNamespace:
        turns = Turns(partial(work, *args, **fields))
        task = asyncio.get_running_loop().create_task(turns.to_end())
        self._tasks.append(task)
        return SimpleNamespace(result=lambda: Turns.wait(lambda: task))

    def map(self, work: Any, *columns: Any) -> Iterator[Any]:
        found = [self.submit(work, *args) for args in zip(*columns, strict=True)]
        return (one.result() for one in found)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is Killed:
            for task in self._tasks:
                task.cancel()
        elif self._tasks:
            Turns.wait(lambda: asyncio.wait(self._tasks))
            for task in self._tasks:
                task.exception()  # so that it counts as heard of
