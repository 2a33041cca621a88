"""Following the shard map: what a running HAProxy goes by is compared with it, and made right.

Nothing is kept that HAProxy or the cluster couldn't tell again, so it may be killed at any moment.
"""

import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mlpd.cluster.haproxy.config import (
    SPARE,
    Files,
    Front,
    address_of,
    map_rows,
    spare,
    write_files,
)
from mlpd.cluster.haproxy.runtime import Haproxy, Running
from mlpd.cluster.members import Connect, fetch_map
from mlpd.core.errors import MlpdError, UnavailableError
from mlpd.core.shards import Shard, ShardMap

ASKED_MAX = 5
"""Members that are asked for the map in one look."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What makes a running HAProxy go by a map.

    `added` and `readdressed`: shard, backend, address.  `unplaced`: shards that need a reload.
    `rows`: the whole map; `moved`: how many of them are others than now.
    """

    added: tuple[tuple[str, str, str], ...]
    readdressed: tuple[tuple[str, str, str], ...]
    unplaced: tuple[str, ...]
    rows: dict[str, str]
    moved: int


@dataclass(frozen=True, slots=True)
class Done:
    """What was done for an epoch; `slots`: set to another backend; `files`: written anew."""

    epoch: int
    pid: int
    slots: int
    added: tuple[str, ...]
    readdressed: tuple[str, ...]
    reload_needed: tuple[str, ...]
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)


def make_plan(
    shard_map: ShardMap, running: Running, spares: int, resolve: Callable[[str], str]
) -> Plan:
    """Return what is to be done; `resolve` gives the numeric HOST:PORT of an address."""
    taken = {server.backend for server in running.servers.values()}
    names = map(spare, range(1, spares + 1))
    free = iter([name for name in names if name in running.backends and name not in taken])
    backends: dict[str, str] = {}
    added, readdressed, unplaced = [], [], []
    for shard in shard_map.shards:
        address = resolve(address_of(shard))
        server = running.servers.get(shard.name)
        backend = next(free, None) if server is None else server.backend
        if backend is None:
            unplaced.append(shard.name)
            continue
        backends[shard.name] = backend
        if server is None or (server.backend.startswith(SPARE) and not server.ready):
            added.append((shard.name, backend, address))
        if server is None or server.address == _kind(address):
            continue
        if "unix" in (_kind(address), server.address):
            unplaced.append(shard.name)
        else:
            readdressed.append((shard.name, backend, address))
    # Slots of a shard that has no backend stay with whoever has them.
    rows = {**running.rows, **map_rows(shard_map, backends)}
    moved = sum(running.rows.get(key) != backend for key, backend in rows.items())
    return Plan(tuple(added), tuple(readdressed), tuple(unplaced), rows, moved)


def apply_plan(plan: Plan, haproxy: Haproxy) -> None:
    """Carry a plan out: servers first, then all slots at once."""
    for shard, backend, address in plan.added:
        haproxy.add_server(backend, shard, address)
    for shard, backend, address in plan.readdressed:
        haproxy.set_address(backend, shard, address)
    if plan.moved:
        haproxy.replace_map(plan.rows)


class Follower:
    """Looks once per `step`; `fetch` gives the newest map that it can."""

    def __init__(
        self, files: Files, front: Front, haproxy: Haproxy, fetch: Callable[[], ShardMap]
    ) -> None:
        self._files, self._front, self._haproxy, self._fetch = files, front, haproxy, fetch
        self._seen: tuple[int, int] | None = None

    def step(self) -> Done | None:
        """Make haproxy and the files go by the newest map; None if they did already.

        10 ms with nothing new, 30 ms with a new map.  Raises MlpdError: see `Haproxy` and `fetch`.
        """
        shard_map = self._fetch()
        if (self._haproxy.pid(), shard_map.epoch) == self._seen:
            return None
        running = self._haproxy.load()
        plan = make_plan(shard_map, running, self._front.spares, resolve)
        apply_plan(plan, self._haproxy)
        files = write_files(shard_map, self._front, self._files)
        self._seen = running.pid, shard_map.epoch
        return Done(
            epoch=shard_map.epoch,
            pid=running.pid,
            slots=plan.moved,
            added=tuple(shard for shard, _, _ in plan.added),
            readdressed=tuple(shard for shard, _, _ in plan.readdressed),
            reload_needed=plan.unplaced,
            files=tuple(map(str, files)),
        )


class Newest:
    """Fetches the newest map of a cluster, from its arbiter or whoever answers."""

    def __init__(self, shard_map: ShardMap, connect: Connect) -> None:
        self._known, self._connect = shard_map, connect

    def __call__(self) -> ShardMap:
        """Return the newest map seen; raises the arbiter's error if no member answers."""
        first: MlpdError | None = None
        for shard in self._members():
            try:
                found = fetch_map(self._connect(shard.url), shard.url)
            except MlpdError as error:
                first = first or error
                continue
            if found.cluster == self._known.cluster:
                self._known = max(self._known, found, key=lambda shard_map: shard_map.epoch)
                return self._known
        raise first or UnavailableError("the members of this cluster belong to another one now")

    def _members(self) -> Iterator[Shard]:
        return iter(self._known.shards[:ASKED_MAX])


def resolve(address: str) -> str:
    """Return the numeric HOST:PORT of an address, a socket's as it is; asks DNS for names.

    Raises UnavailableError(code="unknown_host").
    """
    if address.startswith("unix@"):
        return address
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise UnavailableError(
            f"nobody knows where {host} is: {error.strerror or error}",
            code="unknown_host",
            hint="The map has it as a shard's URL; DNS or /etc/hosts should know it.",
        ) from None
    numeric = str(found[0][4][0])
    return f"[{numeric}]:{port}" if ":" in numeric else f"{numeric}:{port}"


def _kind(address: str) -> str:
    """Return an address as HAProxy shows it: sockets without their path."""
    return "unix" if address.startswith("unix@") else address
