"""What `mlpd fsck --repair` mends: lost records of the registry, leftovers of killed work."""

from collections.abc import Iterable, Sequence
from functools import partial

import msgpack

from mlpd.core.errors import ConflictError
from mlpd.core.time import system_clock
from mlpd.daemon.state import CURRENT_KEY, RESERVED_KEY
from mlpd.features.check import view_id_of
from mlpd.registry.exports import export, require_records
from mlpd.registry.layout import Layout
from mlpd.registry.rebuild import rebuild
from mlpd.storage.check import scan_parts
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.tables import Table
from mlpd.storage.transactions import Snapshot, WriteTransaction
from mlpd.storage.unnamed import remove_orphans
from mlpd.storage.writer import Writer

DELETED_TOGETHER = 20_000
UNAPPLIED = "online_unapplied"
"""The problem of rows that the next apply would take for its own."""

EMPTY_STATE = msgpack.packb({"next_view_id": 1})
EXPORTS = frozenset(("layout", "index_differs", "journal_differs"))
"""Problems of the registry that rebuilding its records, or writing its exports anew, mends."""


def repair(data: DataDirectory, problems: Iterable[tuple[str, str]], done: list[str]) -> None:
    """Mend what can be mended, given (section, code) of what was found; `done` gets what was.

    Only on a stopped directory whose pages are sound.  Raises ConflictError when LMDB and the
    registry contradict each other: nothing is written then.
    """
    found = set(problems)
    environment = Environment.open(data.lmdb, clock=system_clock)
    try:
        done += _remove_files(environment, data, found)
        if ("online", UNAPPLIED) in found:
            done += _remove_unapplied(environment)
        if any(section == "registry" and code in EXPORTS for section, code in found):
            done += _mend_registry(environment, data)
    finally:
        environment.close()


def _remove_files(
    environment: Environment, data: DataDirectory, found: set[tuple[str, str]]
) -> list[str]:
    # Where manifests are damaged, a file that none names may be the only copy of its rows.
    if any(section in ("log", "segments") for section, _ in found):
        return []
    with environment.snapshot() as snapshot:
        removed = remove_orphans(snapshot, data.segments)
    return [f"removed segments/{path.relative_to(data.segments)}" for path in sorted(removed)]


def _remove_unapplied(environment: Environment) -> list[str]:
    """Remove the rows of view ids beyond the last: an apply was killed as it built them."""
    with environment.snapshot() as snapshot:
        next_view_id = free_view_id(snapshot)
    keys = [
        key
        for part in scan_parts(environment, Table.ONLINE)
        for key, _ in part.rows
        if view_id_of(key) >= next_view_id
    ]
    writer = Writer(environment)
    try:
        for start in range(0, len(keys), DELETED_TOGETHER):
            writer.write_blocking(partial(_delete, keys=keys[start : start + DELETED_TOGETHER]))
    finally:
        writer.close()
    return [f"removed {len(keys)} online rows of an apply that was killed"]


def free_view_id(snapshot: Snapshot) -> int:
    """Return the first view id under which the next apply may build a view."""
    state = msgpack.unpackb(snapshot.get(Table.DEFINITIONS, CURRENT_KEY) or EMPTY_STATE)
    reserved = snapshot.get(Table.DEFINITIONS, RESERVED_KEY) or b""
    return max(int(state["next_view_id"]), int.from_bytes(reserved, "big"))


def _delete(txn: WriteTransaction, keys: Sequence[bytes]) -> None:
    for key in keys:
        txn.delete(Table.ONLINE, key)
        txn.delete(Table.TILES, key)


def _mend_registry(environment: Environment, data: DataDirectory) -> list[str]:
    writer = Writer(environment)
    try:
        count = rebuild(environment, writer, data.registry)
    except ConflictError as error:
        if error.code != "journal_damaged":
            raise
        # A damaged journal is written anew from LMDB, unless that lacks a version that is tagged.
        layout = Layout(data.registry)
        require_records(environment, layout)
        export(environment, layout)
        count = 0
    finally:
        writer.close()
    back = [f"brought {count} records of the registry back into LMDB"] if count else []
    return [*back, "wrote registry/index.json and its journal anew from LMDB"]
