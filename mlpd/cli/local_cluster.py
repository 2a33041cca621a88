"""A cluster on one machine: daemons and a router, started, made one, watched and stopped."""

import time
import tomllib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from mlpd.cli.processes import DaemonProcess, RouterProcess, ServerProcess
from mlpd.cluster.members import connections, give_map, plan_cluster
from mlpd.core.errors import ConfigurationError, ConflictError, UnavailableError
from mlpd.core.names import check_name
from mlpd.core.shards import Shard, decode_map

PLAN_FILE: Final = "shards.toml"
ROUTER_LOG: Final = "router.log"
LOCAL_SHARDS_MAX: Final = 16
SETTLE_S: Final = 120.0
"""What shards may take to come to a change: compiling new definitions takes the most of it."""
SETTLE_POLL_S: Final = 0.02
_PORT_MAX: Final = 65_535
_ROUTER_PORT: Final = 8700


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """What is started: TCP ports by the names of shards, that of the router; 0 for any free one.

    `config`: settings of all daemons, a file like conf/default.toml.
    """

    ports: Mapping[str, int]
    router_port: int = _ROUTER_PORT
    config: Path | None = None

    @classmethod
    def of(cls, count: int, router_port: int = _ROUTER_PORT) -> Self:
        """Return shards a, b, c, ... at the ports behind the router's; any, if that is any."""
        names = [chr(ord("a") + i) for i in range(count)]
        ports = {name: router_port and router_port + i for i, name in enumerate(names, 1)}
        return cls(ports, router_port)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return what a file like conf/shards.toml says; raises ConfigurationError."""
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _invalid(path, f"it can't be read: {error}") from None
        router, shards = document.get("router", {}), document.get("shards")
        unknown = document.keys() - {"router", "shards", "config"}
        if unknown or not isinstance(router, dict) or router.keys() - {"port"}:
            raise _invalid(path, "it has config, [router] with port, and [shards]; nothing else")
        if not isinstance(shards, dict) or not 1 <= len(shards) <= LOCAL_SHARDS_MAX:
            raise _invalid(path, f"[shards] has 1 to {LOCAL_SHARDS_MAX} names, each with its port")
        for name in shards:
            check_name(name, "shard")
        ports = [router.get("port", _ROUTER_PORT), *shards.values()]
        if any(type(port) is not int or not 0 <= port <= _PORT_MAX for port in ports):
            raise _invalid(path, f"a port is a number from 0 to {_PORT_MAX}")
        taken = [port for port in ports if port]
        if len({*taken}) < len(taken):
            raise _invalid(path, "a port is there twice")
        config = document.get("config")
        if config is not None and not isinstance(config, str):
            raise _invalid(path, "config is the path of a file")
        return cls(shards, ports[0], None if config is None else path.parent / config)

    def to_toml(self) -> str:
        """Return the file that says the same; names of shards need no quotes but for dots."""
        shards = "".join(f'"{name}" = {port}\n' for name, port in self.ports.items())
        config = "" if self.config is None else f'config = "{self.config.resolve()}"\n\n'
        return f"{config}[router]\nport = {self.router_port}\n\n[shards]\n{shards}"


class LocalCluster:
    """Daemons, each in a folder of `root` by its name, and a router over them.

    All outlive this process unless `stop` is called.  `check`: called while it waits; what it
    raises ends the start.
    """

    def __init__(
        self, root: Path, plan: ClusterPlan, check: Callable[[], None] = lambda: None
    ) -> None:
        self.root, self.plan = root.resolve(), plan
        self.daemons: dict[str, DaemonProcess] = {}
        self.router: RouterProcess | None = None
        self._check = check

    @property
    def url(self) -> str:
        """The router's."""
        return "" if self.router is None else self.router.url

    @property
    def address(self) -> str:
        """Where clients ask: the router's URL."""
        return self.url

    @property
    def processes(self) -> list[ServerProcess]:
        """All that was started, the router first."""
        return [*([] if self.router is None else [self.router]), *self.daemons.values()]

    @property
    def pids(self) -> list[int]:
        """Their process ids."""
        return [process.pid for process in self.processes]

    def start(self) -> None:
        """Start all and make them one cluster; what was started is stopped if that fails.

        Raises UnavailableError(code="daemon_failed") for one that doesn't start, ConflictError(
        code="other_cluster_here") if the data in `root` is of shards at other URLs.
        """
        try:
            for name, port in self.plan.ports.items():
                folder = self.root / name
                folder.mkdir(parents=True, exist_ok=True)
                self.daemons[name] = DaemonProcess(
                    folder, port, name=f"shard {name}", config=self.plan.config
                )
            for daemon in self.daemons.values():
                daemon.wait_listening(self._check)
            urls = {name: daemon.url for name, daemon in self.daemons.items()}
            make_one(urls)
            self.settle()
            log = self.root / ROUTER_LOG
            self.router = RouterProcess([*urls.values()], self.plan.router_port, log)
            self.router.wait_listening(self._check)
            with connections("mlpd shard serve") as connect:
                connect(self.router.url).wait_ready()
        except BaseException:
            self.stop()
            raise

    def settle(self) -> None:
        """Wait until all shards have what the first one has: definitions, models, routes.

        A change waits for that by itself, but not for ever, nor for who was silent just then.
        Raises UnavailableError(code="not_following").
        """
        deadline_s = time.monotonic() + SETTLE_S
        first, *others = (self.daemons[name] for name in sorted(self.daemons))
        with connections("mlpd shard serve") as connect:
            shared = connect(first.url).status()["shared"]
            newest = shared["revision"]
            while not _has_heard(shared, self.daemons) or any(
                connect(other.url).status()["shared"]["revision"] < newest for other in others
            ):
                self._check()
                if time.monotonic() > deadline_s:
                    raise UnavailableError(
                        f"some shards don't come to what {first.name} has",
                        code="not_following",
                        hint=f"mlpd shard status --url {first.url} says why.",
                    )
                time.sleep(SETTLE_POLL_S)
                shared = connect(first.url).status()["shared"]

    def running_plan(self) -> ClusterPlan:
        """Return the plan with the ports that are in use, to start it again by."""
        ports = {name: _port_of(daemon.url) for name, daemon in self.daemons.items()}
        return ClusterPlan(ports, _port_of(self.url), self.plan.config)

    def check_running(self) -> None:
        """Raise UnavailableError(code="member_ended") with the end of its log if one has ended."""
        for process in self.processes:
            if not process.is_running:
                raise UnavailableError(
                    f"{process.name} has ended; {process.describe_end()}",
                    code="member_ended",
                    hint="The others are stopped, too. Start them again when it is mended: "
                    "nothing that was acknowledged is lost.",
                )

    def stop(self) -> None:
        """End all gracefully, the router first, and wait for them; idempotent."""
        if self.router is not None:
            self.router.stop()
        for daemon in self.daemons.values():
            daemon.ask_to_stop()
        for daemon in self.daemons.values():
            daemon.stop()

    def leave_running(self) -> None:
        """Let go of all."""
        for process in self.processes:
            process.leave_running()

    def to_dict(self) -> dict[str, Any]:
        """Return what --json prints of it."""
        shards = [
            {"name": name, "url": d.url, "pid": d.pid, "data_dir": str(d.paths.root)}
            for name, d in self.daemons.items()
        ]
        router = None if self.router is None else self.router.pid
        return {"url": self.url, "router_pid": router, "shards": shards}


def _has_heard(shared: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Tell whether every other member has asked the first one for changes."""
    return {*names} <= {*shared["followers"], shared["arbiter"]}


def make_one(urls: Mapping[str, str]) -> None:
    """Give new daemons, URLs by name, their first map; check that those that have one are these.

    Raises ConflictError(code="other_cluster_here"), and what `plan_cluster` raises.
    """
    shards = [Shard(name, url) for name, url in urls.items()]
    with connections("mlpd shard serve") as connect:
        for url in urls.values():
            connect(url).wait_ready()
        found = [connect(shard.url).cluster.map()["map"] for shard in shards]
        known = max((decode_map(m) for m in found if m), key=lambda m: m.epoch, default=None)
        if known is not None:
            theirs = {shard.name: shard.url for shard in known.shards}
            if theirs != dict(urls):
                raise _other_urls(theirs, urls)
        if not all(found):
            made = plan_cluster(shards, connect)
            give_map(made, connect, lambda _: None)


def _other_urls(theirs: Mapping[str, str], ours: Mapping[str, str]) -> ConflictError:
    differ = sorted({*theirs.items()} ^ {*ours.items()})
    name = differ[0][0]
    return ConflictError(
        f"by the map of this cluster shard {name} is {_at(theirs, name)}, here {_at(ours, name)}",
        code="other_cluster_here",
        hint="Name the same shards at the same ports as before: "
        + ", ".join(f"{name} = {_port_of(url)}" for name, url in theirs.items())
        + "; or choose another --data-dir.",
        details={"map": dict(theirs)},
    )


def _at(urls: Mapping[str, str], name: str) -> str:
    return f"at {urls[name]}" if name in urls else "no member"


def _port_of(url: str) -> int:
    with suppress(ValueError):
        return int(url.rpartition(":")[2])
    return 0


def _invalid(path: Path, problem: str) -> ConfigurationError:
    return ConfigurationError(
        f"{path} is no plan of shards: {problem}",
        code="invalid_shards_file",
        hint="conf/shards.toml is an example.",
    )
