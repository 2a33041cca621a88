"""A running HAProxy through its runtime socket: what it goes by, and commands; blocking."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlpd.cluster.haproxy.config import CHECKS
from mlpd.core.errors import ConflictError, UnavailableError

TIMEOUT_S = 5.0
ANSWER_BYTES_MAX = 16 << 20
COMMAND_BYTES_MAX = 12_000
"""Of rows in one command, which has to fit into HAProxy's buffer of 16 KiB."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server of a backend; `address` as HOST:PORT, `unix` for any socket.

    Not `ready`: in maintenance, by hand, or added by a command that died before it enabled it.
    """

    backend: str
    address: str
    ready: bool = True


@dataclass(frozen=True, slots=True)
class Running:
    """What a HAProxy process goes by: `servers` by name, `rows` of its map, all `backends`."""

    pid: int
    servers: Mapping[str, Server]
    rows: Mapping[str, str]
    backends: frozenset[str]


class Haproxy:
    """Asks one runtime socket, a connection per command; keeps nothing open."""

    def __init__(self, path: Path, map_file: Path) -> None:
        self.path, self.map_file = path, map_file

    def pid(self) -> int:
        """Return the process id; it is another one after a reload.

        Raises UnavailableError: `no_haproxy`, `not_haproxy`.
        """
        lines = self.ask("show info").splitlines()
        pairs = dict(line.split(": ", 1) for line in lines if ": " in line)
        if pairs.get("Name") != "HAProxy" or not pairs.get("Pid", "").isdecimal():
            raise UnavailableError(
                f"what answers at {self.path} is not HAProxy's runtime socket",
                code="not_haproxy",
                hint="Name the 'stats socket' of its configuration by --socket.",
            )
        return int(pairs["Pid"])

    def load(self) -> Running:
        """Return what it goes by, 5 ms; raises ConflictError(code="other_haproxy") as well."""
        pid = self.pid()
        listed = self.ask(f"show map {self.map_file}")
        if listed.startswith("Unknown map"):
            raise ConflictError(
                f"the haproxy at {self.path} has no map {self.map_file}",
                code="other_haproxy",
                hint="Give --out and --socket of the configuration that it runs with.",
            )
        rows = (line.split() for line in listed.splitlines())
        return Running(
            pid,
            self._servers(),
            {row[1]: row[2] for row in rows if len(row) == _MAP_FIELDS},
            frozenset(self.ask("show backend").split()),
        )

    def replace_map(self, rows: Mapping[str, str]) -> None:
        """Let all requests from now on go by `rows`; until then all go by what was there.

        Killed half-way nothing has changed; the next time takes away what was left.
        """
        made = self.ask(f"prepare map {self.map_file}").split()
        if not made or not made[-1].isdecimal():
            raise self._refused("prepare map", " ".join(made))
        version = made[-1]
        for chunk in _chunks(rows):
            self.order(f"add map @{version} {self.map_file} <<\n{chunk}")
        self.order(f"commit map @{version} {self.map_file}")

    def add_server(self, backend: str, name: str, address: str) -> None:
        """Give a backend a checked server; it is taken for up until its first checks fail.

        One that is there already is enabled.
        """
        target = f"{backend}/{name}"
        said = self.ask(f"add server {target} {address} {CHECKS}")
        if "registered" not in said and "lready exists" not in said:
            raise self._refused("add server", said)
        self.order(f"enable health {target}")
        self.order(f"enable server {target}")

    def set_address(self, backend: str, name: str, address: str) -> None:
        """Let a server be at another HOST:PORT; requests under way end where they began."""
        host, _, port = address.rpartition(":")
        said = self.ask(f"set server {backend}/{name} addr {host.strip('[]')} port {port}")
        if "changed" not in said and "no need" not in said:
            raise self._refused("set server", said)

    def order(self, command: str) -> None:
        """Run a command that answers nothing; raises UnavailableError(`haproxy_refused`)."""
        if said := self.ask(command).strip():
            raise self._refused(command.partition(" <<")[0], said)

    def ask(self, command: str) -> str:
        """Return the answer to a command; raises UnavailableError(code="no_haproxy")."""
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(TIMEOUT_S)
                connection.connect(str(self.path))
                connection.sendall(f"{command}\n".encode())
                answer = bytearray()
                while (part := connection.recv(1 << 16)) and len(answer) < ANSWER_BYTES_MAX:
                    answer += part
        except OSError as error:
            raise UnavailableError(
                f"no haproxy answers at {self.path}: {error.strerror or error}",
                code="no_haproxy",
                hint="Start it with the configuration that --out names, or correct --socket.",
            ) from None
        return answer.decode("utf-8", "replace")

    def _servers(self) -> dict[str, Server]:
        found = {}
        header: list[str] = []
        for line in self.ask("show servers state").splitlines():
            if line.startswith("# "):
                header = line[2:].split()
            elif header and len(fields := line.split()) == len(header):
                row = dict(zip(header, fields, strict=True))
                address, port = row["srv_addr"], row["srv_port"]
                host = f"[{address}]" if ":" in address else address
                known = "unix" if address == "-" else f"{host}:{port}"
                ready = not int(row["srv_admin_state"]) & _MAINTENANCE
                found[row["srv_name"]] = Server(row["be_name"], known, ready)
        return found

    def _refused(self, command: str, said: str) -> UnavailableError:
        return UnavailableError(
            f"the haproxy at {self.path} refused '{command:.100}': {said.strip()[:200]}",
            code="haproxy_refused",
            hint="Its stats socket needs 'level admin', it must be 2.6 or newer, and whoever "
            "else sets this map at the same time comes first.",
        )


_MAP_FIELDS = 3
_MAINTENANCE = 1
"""Bit of srv_admin_state: forced into maintenance, where every added server begins."""


def _chunks(rows: Mapping[str, str]) -> list[str]:
    """Return rows as texts that fit into a command each."""
    chunks, size = [""], 0
    for key, backend in rows.items():
        line = f"{key} {backend}\n"
        if size + len(line) > COMMAND_BYTES_MAX:
            chunks.append("")
            size = 0
        chunks[-1] += line
        size += len(line)
    return chunks
