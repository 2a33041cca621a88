"""What `mlpd fsck --repair` mends: the registry's records, and files of unfinished compactions."""

from collections.abc import Iterable

from mlpd.core.errors import ConflictError
from mlpd.core.time import system_clock
from mlpd.registry.exports import export, require_records
from mlpd.registry.layout import Layout
from mlpd.registry.rebuild import rebuild
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.segments import remove_orphans
from mlpd.storage.writer import Writer

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
