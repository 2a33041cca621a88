"""The configuration by which HAProxy computes our slots, and its map file; both canonical text.

docs/paths/haproxy.md describes it.  HAProxy 2.6 or newer; 3 ms to build.
"""

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from mlpd.core.config import LOOPBACK
from mlpd.core.errors import ConfigurationError, ConflictError, UnavailableError
from mlpd.core.keys import MAX_ENTITY_BYTES
from mlpd.core.shards import Shard, ShardMap
from mlpd.storage.files import atomic_write

ANY = "any"
"""Key in the map file of the backend for requests without a key."""

CHECKS = "check inter 500ms fastinter 250ms fall 2 rise 1"
"""Of every server; two failures in a row, and it gets no requests."""

SPARE = "spare_"
"""How names of spare backends begin."""

MARK = "# Written by mlpd shard haproxy"
TEMPLATE = Path(__file__).with_name("template.cfg")
"""All but the backends, with @names@ to be replaced."""

_PATH = re.compile(r"/[A-Za-z0-9_./+-]+")
_SOCKET_BYTES_MAX = 90
"""A unix socket's path has 107; HAProxy binds it under a longer name first."""


@dataclass(frozen=True, slots=True)
class Files:
    """Where things lie, absolute: the configuration, the map beside it, the runtime socket."""

    config: Path
    socket: Path

    @property
    def map(self) -> Path:
        """The map file."""
        return self.config.with_suffix(".map")


@dataclass(frozen=True, slots=True)
class Front:
    """`bind`: HOST:PORT to listen at.  `spares`: backends for shards that come later."""

    bind: str
    spares: int


def parse_files(config: str, socket: str | None) -> Files:
    """Return absolute paths; raises ConfigurationError(code="invalid_path")."""
    path = Path(config).absolute()
    files = Files(path, Path(socket).absolute() if socket else path.with_suffix(".sock"))
    if path.suffix in (".map", ".sock", ""):
        raise _invalid_path(str(path), "it has no ending such as .cfg")
    for name in map(str, (files.config, files.socket)):
        if not _PATH.fullmatch(name):
            raise _invalid_path(name, "HAProxy takes letters, digits and . _ + - in paths")
    if len(str(files.socket)) > _SOCKET_BYTES_MAX:
        problem = f"a socket's path has at most {_SOCKET_BYTES_MAX} characters"
        raise _invalid_path(str(files.socket), problem)
    return files


def check_bind(bind: str) -> str:
    """Return `HOST:PORT` as it is; raises ConfigurationError(code="invalid_bind")."""
    try:
        parts = urlsplit(f"//{bind}")
        if parts.hostname in LOOPBACK and parts.port and parts.netloc == bind and "@" not in bind:
            return bind
    except ValueError:
        pass
    raise ConfigurationError(
        f"{bind!r:.100} is not a loopback address and a port",
        code="invalid_bind",
        hint="Write 127.0.0.1:8790.  There are no tokens yet, so nothing listens elsewhere.",
    )


def backend_of(shard: str) -> str:
    """Return the name of a shard's own backend."""
    return f"shard_{shard}"


def spare(number: int) -> str:
    """Return the name of a spare backend, counted from 1."""
    return f"{SPARE}{number}"


def address_of(shard: Shard) -> str:
    """Return a shard's address as HAProxy writes it."""
    if shard.url.startswith("unix:"):
        return "unix@" + shard.url.removeprefix("unix:")
    parts = urlsplit(shard.url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{host}:{parts.port or 80}"


def render_map(rows: Mapping[str, str]) -> str:
    """Return the text of a map file: key and backend, a row a line."""
    return "".join(f"{key} {backend}\n" for key, backend in rows.items())


def map_rows(shard_map: ShardMap, backends: Mapping[str, str]) -> dict[str, str]:
    """Return the backend of every slot, and of ANY; `backends`: by shard.  1 ms.

    Slots of shards without a backend are left out.
    """
    names = [backends.get(shard.name) for shard in shard_map.shards]
    rows = {str(slot): names[owner] for slot, owner in enumerate(shard_map.owners)}
    rows[ANY] = names[0]
    return {key: name for key, name in rows.items() if name is not None}


def own_backends(shard_map: ShardMap) -> dict[str, str]:
    """Return each shard's own backend, by shard."""
    return {shard.name: backend_of(shard.name) for shard in shard_map.shards}


def render_config(shard_map: ShardMap, front: Front, files: Files) -> str:
    """Return the configuration's text; it says nothing that changes when slots alone move."""
    own = [
        _backend(backend_of(s.name), f"server {s.name} {address_of(s)}") for s in shard_map.shards
    ]
    spares = [_backend(spare(number), "") for number in range(1, front.spares + 1)]
    values = {
        "@mark@": f"{MARK} for cluster {shard_map.cluster}",
        "@socket@": str(files.socket),
        "@map@": str(files.map),
        "@checks@": CHECKS,
        "@bind@": front.bind,
        "@arbiter@": backend_of(shard_map.arbiter.name),
        "@any@": ANY,
        "@bytes_max@": str(MAX_ENTITY_BYTES),
        **_ANSWERS,
    }
    head = TEMPLATE.read_text()
    for name, value in values.items():
        head = head.replace(name, value)
    return head + "\n".join([*own, *spares])


def write_files(shard_map: ShardMap, front: Front, files: Files) -> list[Path]:
    """Write what differs, the configuration first: a map never names a backend without a server.

    Returns what was replaced, each as a whole.  Raises ConflictError(code="not_ours"),
    UnavailableError(code="not_written").
    """
    rows = map_rows(shard_map, own_backends(shard_map))
    texts = {
        files.config: render_config(shard_map, front, files),
        files.map: f"{MARK}, epoch {shard_map.epoch}\n{render_map(rows)}",
    }
    try:
        with _locked(files.config.parent):
            stale = [path for path, text in texts.items() if _read_ours(path) != text]
            for path in stale:
                atomic_write(path, texts[path].encode(), mode=0o644)
            return stale
    except OSError as error:
        raise UnavailableError(
            f"{files.config} and its map can't be written: {error.strerror or error}",
            code="not_written",
            hint="They need a folder that this user may write to, and some room.",
        ) from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep others from writing here meanwhile: `atomic_write` takes one writer at a time."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read_ours(path: Path) -> str | None:
    """Return a file's text, None if there is none; raises ConflictError(code="not_ours")."""
    try:
        text = path.read_text("utf-8", "replace")
    except FileNotFoundError:
        return None
    if not text.startswith(MARK):
        raise ConflictError(
            f"{path} is there, and this command has not written it",
            code="not_ours",
            hint="Name another file by --out, or move that one away.",
        )
    return text


def _backend(name: str, server: str) -> str:
    return f"backend {name}\n" + (f"    {server}\n" if server else "")


def _answer(code: str, message: str, hint: str) -> str:
    """Return an error's body, as an argument of HAProxy's that is a log format."""
    body = {"error": {"code": code, "message": message, "hint": hint, "details": {}}}
    return "'" + json.dumps(body) + "'"


def _invalid_path(path: str, problem: str) -> ConfigurationError:
    return ConfigurationError(
        f"{path!r:.200} can't be used: {problem}",
        code="invalid_path",
        hint="mlpd shard haproxy --out /etc/haproxy/mlpd.cfg --socket /run/haproxy/mlpd.sock",
    )


_LOST = "Whether it did what was asked is not known.  Look, or send it under its Idempotency-Key."

_KEY_HINT = (
    "Send one of x-mlpd-key (percent-encoded text), x-mlpd-key-int (decimal), "
    "x-mlpd-key-bytes (base64url of entity bytes); docs/paths/haproxy.md has examples."
)

_ANSWERS = {
    "@bad_key@": _answer("invalid_key_header", "the key in the header has no slot", _KEY_HINT),
    "@lost@": _answer("shard_lost", "the shard closed the connection", _LOST),
    "@down@": _answer("shard_down", "%b does not answer", "It may be back in a moment."),
    "@late@": _answer("deadline_exceeded", "the shard took too long", "Ask for less at once."),
}
