"""The ROUTES table: routes as they serve, their history, and how far their canaries have come."""

from collections.abc import Callable, Mapping
from typing import Any

import msgpack

from mlpd.core.errors import ConflictError, NotFoundError
from mlpd.core.time import format_time
from mlpd.serving.routes import RouteSpec, diff_routes
from mlpd.serving.trial import Trial
from mlpd.storage.changes import note
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

HISTORY_MAX = 100
_CURRENT, _HISTORY, _TRIAL = b"c", b"h", b"t"
LOADED = b"l"
"""Before the names of models that are loaded explicitly, which lie in the same table."""
_HISTORY_END = b"\x00" + bytes(4)
_VERSIONS_MAX = 1 << 32
"""A version is stored in four bytes."""


Fence = Callable[[WriteTransaction], None]
"""Raises in a transaction that may not change routes."""


class RouteStore:
    """Keeps routes; a change, its history and its canary's beginning are one transaction."""

    def __init__(self, environment: Environment, writer: Writer, fence: Fence) -> None:
        self._fence = fence
        self._environment = environment
        self._writer = writer

    def load(self) -> tuple[list[RouteSpec], dict[str, Trial]]:
        """Return every route, and the last trial of each that had one."""
        with self._environment.snapshot() as snapshot:
            stored = [value for _, value in snapshot.scan(Table.ROUTES, _CURRENT, _after(_CURRENT))]
            tried = [*snapshot.scan(Table.ROUTES, _TRIAL, _after(_TRIAL))]
        trials = {key[1:].decode(): Trial.decode(msgpack.unpackb(value)) for key, value in tried}
        return [RouteSpec.from_dict(msgpack.unpackb(value)) for value in stored], trials

    def newest_version(self, name: str) -> int:
        """Return the last number that the route's history used; it outlives deletion."""
        prefix = _history_prefix(name)
        with self._environment.snapshot() as snapshot:
            newest = snapshot.scan(Table.ROUTES, prefix, prefix + b"\xff" * 5, reverse=True)
            return next((int.from_bytes(key[-4:], "big") for key, _ in newest), 0)

    def history(self, name: str) -> list[dict[str, Any]]:
        """Return a route's versions, newest first, each with what it changed."""
        prefix = _history_prefix(name)
        found: list[dict[str, Any]] = []
        with self._environment.snapshot() as snapshot:
            for _, value in snapshot.scan(Table.ROUTES, prefix, prefix + b"\xff" * 5, reverse=True):
                entry = msgpack.unpackb(value)
                found.append({**entry, "at": format_time(entry["at"])})
                if len(found) == HISTORY_MAX:
                    break
        return found

    def document(self, name: str, version: int) -> Mapping[str, Any]:
        """Return what a route was at a version.

        Raises NotFoundError(code="unknown_route_version"), ConflictError(code="route_deleted").
        """
        value = None
        if 0 < version < _VERSIONS_MAX:
            with self._environment.snapshot() as snapshot:
                value = snapshot.get(Table.ROUTES, _history_key(name, version))
        if value is None:
            raise NotFoundError(
                f"route {name!r} has no version {version}", code="unknown_route_version"
            )
        document: Mapping[str, Any] | None = msgpack.unpackb(value)["route"]
        if document is None:
            raise ConflictError(
                f"version {version} of route {name!r} was its deletion",
                code="route_deleted",
                hint="mlpd routes delete removes it; any other version can come back.",
            )
        return document

    async def put(
        self, old: RouteSpec | None, spec: RouteSpec, trial: Trial | None, by: str
    ) -> None:
        """Store a route's next version with its trial, None removes what is stored of one."""
        key = spec.name.encode()

        def write(txn: WriteTransaction) -> None:
            self._fence(txn)
            txn.put(Table.ROUTES, _CURRENT + key, msgpack.packb(spec.to_dict()))
            _write_history(txn, old, spec, spec.version, by)
            if trial is None:
                txn.delete(Table.ROUTES, _TRIAL + key)
            else:
                txn.put(Table.ROUTES, _TRIAL + key, msgpack.packb(trial.encode()))
            for kind in (_TRIAL, _CURRENT):
                note(txn, Table.ROUTES, kind + key)

        await self._writer.write(write)

    async def delete(self, old: RouteSpec, by: str) -> None:
        """Remove a route and its trial; its history stays."""

        def write(txn: WriteTransaction) -> None:
            self._fence(txn)
            for kind in (_TRIAL, _CURRENT):
                txn.delete(Table.ROUTES, kind + old.name.encode())
                note(txn, Table.ROUTES, kind + old.name.encode())
            _write_history(txn, old, None, old.version + 1, by)

        await self._writer.write(write)

    async def keep(self, trials: Mapping[str, Trial]) -> None:
        """Store how far trials have come."""
        rows = {_TRIAL + n.encode(): msgpack.packb(t.encode()) for n, t in trials.items()}

        def write(txn: WriteTransaction) -> None:
            for key, value in rows.items():
                txn.put(Table.ROUTES, key, value)

        await self._writer.write(write)


def route_of(key: bytes) -> str | None:
    """Return the route that a row of the table is of, None for another row."""
    kind, name = key[:1], key[1:]
    if kind == _HISTORY:
        name = name[: -len(_HISTORY_END)]
    return name.decode() if kind in (_CURRENT, _HISTORY, _TRIAL) else None


def _write_history(
    txn: WriteTransaction, old: RouteSpec | None, new: RouteSpec | None, version: int, by: str
) -> None:
    name = (new or old).name  # type: ignore[union-attr]  # one of them is there
    entry = {
        "version": version,
        "at": txn.known_us,
        "by": by,
        "changes": diff_routes(old, new),
        "route": None if new is None else new.to_dict(),
    }
    txn.put(Table.ROUTES, _history_key(name, version), msgpack.packb(entry))
    note(txn, Table.ROUTES, _history_key(name, version))


def _after(prefix: bytes) -> bytes:
    return bytes([prefix[0] + 1])


def _history_prefix(name: str) -> bytes:
    return _HISTORY + name.encode() + b"\x00"


def _history_key(name: str, version: int) -> bytes:
    return _history_prefix(name) + version.to_bytes(4, "big")
