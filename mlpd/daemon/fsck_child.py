"""Child entry `fsck`: checks a data directory section by section; docs/paths/backup.md lists them.

The report: `problems` [{section, code, subject, message, hint}], `more` (those beyond the bound),
`checked` {section: counts}, `skipped` {section: why}, `repaired` [what was done].
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgpack

from mlpd.core.document import parse_document
from mlpd.core.errors import MlpdError
from mlpd.core.hashing import canonical_json
from mlpd.core.time import system_clock
from mlpd.daemon.child import Send
from mlpd.daemon.predictions import Label, decode_prediction
from mlpd.daemon.repair import UNAPPLIED, free_view_id, repair
from mlpd.daemon.replay_check import compare_with_replay
from mlpd.daemon.served_check import check_served
from mlpd.daemon.state import CURRENT_KEY
from mlpd.daemon.unit_outcomes import split_key
from mlpd.features.catalog import Catalog, build_catalog, read_state
from mlpd.features.check import find_faults, view_id_of
from mlpd.features.event_ids import decode_seen
from mlpd.features.kernels import load_feature_kernels
from mlpd.features.view import ViewPlan
from mlpd.registry.fsck import Report
from mlpd.registry.fsck import check as check_registry
from mlpd.storage.check import check_log, check_pages, scan_parts
from mlpd.storage.check_segments import check_segments
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.log import DEFINITIONS_ONLY, read_records
from mlpd.storage.tables import Table
from mlpd.training.runs import Run

PROBLEMS_MAX = 1_000
"""Problems that a report lists; the rest is counted."""

VERSION_PREFIX = b"v"
"""Of the keys of kept versions in the table DEFINITIONS."""

CONFIRMATIONS = 3
_CONFIRM_S = 0.5
"""How often, and how long after each other, a registry that others change is checked."""

SECTIONS = (
    *("pages", "log", "segments", "definitions", "online", "tables", "predictions"),
    *("registry", "replay"),
)

_RESTORE = "Restore from a backup: mlpd restore BACKUP --data-dir DIR."
_REPAIR = "Stop the daemon and run mlpd fsck --repair."
HINTS = {
    "manifest_copy": "LMDB's is the one that counts; only rebuilding by hand would need the copy.",
    "log_behind_segments": "Bring lmdb and segments back from one backup.",
    UNAPPLIED: "Run mlpd fsck --repair before the next mlpd apply.",
    "blob_writable": "chmod 0444 it: blobs never change.",
    "index_differs": "The next start, or --repair, writes it anew.",
    "journal_differs": f"{_REPAIR}  Where LMDB is whole the next start writes it anew.",
    "layout": "The next start, or --repair, writes it anew.",
    "alias_not_ready": "mlpd models rollback, or register the model again.",
    "online_damaged": "mlpd apply the view under another name: it is built anew from the log.",
    "replay_differs": "mlpd apply the view under another name: it is built anew from the log.",
}
"""What to do, by code; everything else takes a backup."""


@dataclass
class Findings:
    """Collects what the sections find."""

    problems: list[dict[str, str]] = field(default_factory=list)
    more: int = 0
    checked: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    repaired: list[str] = field(default_factory=list)

    def add(self, section: str, code: str, subject: str, message: str, hint: str = "") -> None:
        """Note a problem; beyond `PROBLEMS_MAX` it is counted alone."""
        if len(self.problems) >= PROBLEMS_MAX:
            self.more += 1
            return
        hint = hint or HINTS.get(code, _RESTORE)
        found = {"section": section, "code": code, "subject": subject, "message": message}
        self.problems.append({**found, "hint": hint})

    def skip(self, why: str, *sections: str) -> None:
        """Note that sections were not checked, and why."""
        self.skipped.update(dict.fromkeys(sections, why))

    def to_dict(self) -> dict[str, Any]:
        """Return the report."""
        return {
            "clean": not self.problems,
            "problems": self.problems,
            "more": self.more,
            "checked": self.checked,
            "skipped": self.skipped,
            "repaired": self.repaired,
        }


def run(request: dict[str, Any], send: Send) -> dict[str, Any]:
    """Check `directory`; `online` beside a writing daemon, else its lock is held for us.

    `deep`: compare with a replay of the log, too; not `online`.  `repair`: mend, then check again.
    """
    data = DataDirectory(Path(request["directory"]))
    found = Findings()
    online, deep = request["online"], request["deep"]
    check_directory(data, found, online=online, deep=deep and not request["repair"], send=send)
    if request["repair"] and "log" in found.checked:
        send({"kind": "progress", "section": "repair"})
        again = Findings()
        _repair(data, found, again)
        check_directory(data, again, online=False, deep=deep, send=send)
        found = again
    return found.to_dict()


def _repair(data: DataDirectory, found: Findings, again: Findings) -> None:
    codes = [(problem["section"], problem["code"]) for problem in found.problems]
    try:
        repair(data, codes, again.repaired)
    except MlpdError as error:
        again.add("registry", error.code, "repair", error.message, error.hint)


def check_directory(
    data: DataDirectory, found: Findings, *, online: bool, deep: bool, send: Send
) -> None:
    """Check every section; damaged pages keep the others from being read."""

    def tell(section: str) -> None:
        send({"kind": "progress", "section": section})

    if online:
        found.skip("pages can be verified only while no daemon writes them", "pages")
    else:
        tell("pages")
        if not _check_pages(data, found):
            found.skip("LMDB's pages are damaged: reading on could crash", *SECTIONS[1:])
            return
    with Environment.open(data.lmdb, clock=system_clock, readonly=True) as environment:
        tell("log")
        _check_log(environment, found)
        tell("segments")
        _check_segments(environment, data, found)
        tell("definitions")
        catalog = _check_definitions(environment, data, found)
        tell("online")
        if catalog is None:
            found.skip("without definitions rows have no meaning", "online")
        else:
            _check_online(environment, catalog, found, online=online)
        tell("tables")
        _check_tables(environment, found)
        tell("predictions")
        _check_served(environment, data, found)
        tell("registry")
        _check_registry(environment, data, found, online=online)
        if deep and catalog is not None:
            tell("replay")
            _check_replay(environment, data, catalog, found)


def _check_pages(data: DataDirectory, found: Findings) -> bool:
    problems = check_pages(data)
    for problem in problems:
        found.add("pages", problem.code, problem.subject, problem.message)
    found.checked["pages"] = {"bytes": (data.lmdb / "data.mdb").stat().st_size}
    return not problems


def _check_log(environment: Environment, found: Findings) -> None:
    for problem in check_log(environment):
        found.add("log", problem.code, problem.subject, problem.message)
    with environment.snapshot() as snapshot:
        counts = {"sequence": int(snapshot.sequence), "records": snapshot.count(Table.LOG)}
    found.checked["log"] = counts


def _check_segments(environment: Environment, data: DataDirectory, found: Findings) -> None:
    report = check_segments(environment, data)
    for problem in report.problems:
        found.add("segments", problem.code, problem.subject, problem.message)
    found.checked["segments"] = {
        "segments": report.segments,
        "rows": report.rows,
        "bytes": report.size_bytes,
        "unnamed_files": len(report.unnamed),
    }


def _check_definitions(
    environment: Environment, data: DataDirectory, found: Findings
) -> Catalog | None:
    """Return the catalog that runs, None if it can't be built."""
    stored = {k: v for part in scan_parts(environment, Table.DEFINITIONS) for k, v in part.rows}
    current = stored.get(CURRENT_KEY)
    stored = {key: value for key, value in stored.items() if key[:1] == VERSION_PREFIX}
    found.checked["definitions"] = {"versions": len(stored)}
    for key, value in stored.items():
        _decoded(found, "definitions", _version_name(key), _parse_state, value)
    if current is None:
        if stored:
            found.add("definitions", "definitions_missing", "current", "there is no current state")
        return None if stored else _build(_EMPTY_STATE, data)
    state = _decoded(found, "definitions", "current", _parse_state, current)
    if state is None:
        return None
    newest, applied = max(stored, default=b""), {key[:5] for key in stored}
    if stored.get(newest) != current or len(applied) != state["version"]:
        message = f"version {state['version']} is current, {len(applied)} versions are kept"
        found.add("definitions", "definitions_versions", "current", message)
    if _logged_document(environment) != canonical_json(state["document"]).decode():
        found.add("definitions", "definitions_log", "current", "the log's newest are others")
    catalog: Catalog | None = _decoded(
        found, "definitions", "current", lambda stored: _build(stored, data), state
    )
    return catalog


_EMPTY_STATE = {
    "document": {"format": 1},
    "version": 0,
    "revision": 0,
    "view_ids": {},
    "next_view_id": 1,
    "pinned": {},
}


def _version_name(key: bytes) -> str:
    version, revision = int.from_bytes(key[1:5], "big"), int.from_bytes(key[5:], "big")
    return f"version {version}" + (f", revision {revision}" if revision else "")


def _parse_state(value: bytes) -> dict[str, Any]:
    state = read_state(value)
    for document in (state["document"], *state["pinned"].values()):
        parse_document(document)
    return {name: state[name] for name in _EMPTY_STATE}


def _build(state: Mapping[str, Any], data: DataDirectory) -> Catalog:
    kernels = load_feature_kernels()
    return build_catalog(**state, kernels=kernels, cache=data.cache / "kernels")


def _logged_document(environment: Environment) -> str | None:
    with environment.snapshot() as snapshot:
        records = [*read_records(snapshot, 1, kinds=DEFINITIONS_ONLY)]
    return str(records[-1].columns()["document"].to_list()[0]) if records else None


def _check_online(
    environment: Environment, catalog: Catalog, found: Findings, *, online: bool
) -> None:
    views = {view.view_id: view for view in catalog.running}
    with environment.snapshot() as snapshot:
        next_view_id = free_view_id(snapshot)
    rows = former = unapplied = size_bytes = split = 0
    for part in scan_parts(environment, Table.ONLINE, Table.TILES):
        found_rows = [(*row, older) for row, older in zip(part.rows, part.beside, strict=True)]
        rows += len(part.rows)
        split += sum(older is not None for older in part.beside)
        size_bytes += sum(len(value) + len(older or b"") for _, value, older in found_rows)
        former += sum(view_id_of(key) not in views for key, _ in part.rows)
        unapplied += sum(view_id_of(key) >= next_view_id for key, _ in part.rows)
        for key, fault in find_faults(views, found_rows, part.head.known_us + 1):
            found.add("online", "online_damaged", _row_name(views.get(view_id_of(key)), key), fault)
    if unapplied and not online:  # beside a daemon they may be those of an apply under way
        message = f"{unapplied} rows of views that were never applied: the next apply counts them"
        found.add("online", UNAPPLIED, "an apply that was killed", message)
    counts = {"rows": rows, "with_older_tiles": split, "of_former_views": former}
    found.checked["online"] = {**counts, "bytes": size_bytes}
    for part in scan_parts(environment, Table.TILES, Table.ONLINE):
        for (key, _), recent in zip(part.rows, part.beside, strict=True):
            if recent is None:
                subject = _row_name(views.get(view_id_of(key)), key)
                found.add("online", "online_damaged", subject, "older tiles without recent ones")


def _row_name(view: ViewPlan | None, key: bytes) -> str:
    name = f"view {view_id_of(key)}" if view is None else view.view.name
    return f"{name} key {key.hex()}"


def _check_replay(
    environment: Environment, data: DataDirectory, catalog: Catalog, found: Findings
) -> None:
    if any(p["section"] in ("log", "segments") for p in found.problems):
        found.skip("the log is damaged", "replay")
        return

    def differs(view: ViewPlan, key: bytes, difference: str) -> None:
        found.add("replay", "replay_differs", _row_name(view, key), difference)

    found.checked["replay"] = compare_with_replay(environment, data, catalog, differs)


def _check_tables(environment: Environment, found: Findings) -> None:
    counts: dict[str, int] = {}
    for table, decode in _DECODERS.items():
        counts[str(table)] = 0
        for part in scan_parts(environment, table):
            counts[str(table)] += len(part.rows)
            for row in part.rows:
                _decoded(found, "tables", f"{table} key {row[0].hex()}", decode, row)
    found.checked["tables"] = counts


_DECODERS: dict[Table, Callable[[tuple[bytes, bytes]], Any]] = {
    Table.PREDICTIONS: lambda row: decode_prediction(*row),
    Table.LABELS: lambda row: Label.decode(row[1]),
    Table.RUNS: lambda row: Run.decode(row[1]),
    Table.ROUTES: lambda row: msgpack.unpackb(row[1]),
    Table.JOBS: lambda row: msgpack.unpackb(row[1]),
    Table.EXPERIMENTS: lambda row: msgpack.unpackb(row[1]),
    Table.UNITS: lambda row: (split_key(row[0]), msgpack.unpackb(row[1])),
    Table.EVENT_IDS: lambda row: decode_seen(*row),
    Table.IDEMPOTENCY: lambda row: row[0][:1] == b"t" or msgpack.unpackb(row[1]),
}


def _decoded(
    found: Findings, section: str, subject: str, decode: Callable[[Any], Any], value: Any
) -> Any:
    """Return the decoded value, or None after noting why it can't be."""
    try:
        return decode(value)
    except MlpdError as error:
        found.add(section, f"{section}_damaged", subject, error.message)
    except Exception as error:  # noqa: BLE001 - a damaged value may fail in any way
        found.add(section, f"{section}_damaged", subject, f"it can't be decoded: {error!r}")
    return None


def _check_served(environment: Environment, data: DataDirectory, found: Findings) -> None:
    report = check_served(environment, data.predictions)
    for problem in report.problems:
        found.add("predictions", problem.code, problem.subject, problem.message)
    found.checked["predictions"] = report.counts


def _check_registry(
    environment: Environment, data: DataDirectory, found: Findings, *, online: bool
) -> None:
    report = check_registry(environment, data.registry)
    if online:
        report = _confirmed(report, environment, data)
    for problem in report.problems:
        found.add("registry", problem.kind, problem.subject, problem.message)
    found.checked["registry"] = {
        "versions": report.versions,
        "blobs": report.blobs,
        "bytes": report.blob_bytes,
        "orphans": len(report.orphans),
    }


def _confirmed(report: Report, environment: Environment, data: DataDirectory) -> Report:
    """Keep the problems that are found again: others are changes under way."""
    for _ in range(CONFIRMATIONS):
        if not report.problems:
            break
        time.sleep(_CONFIRM_S)
        again = check_registry(environment, data.registry)
        seen = {(problem.kind, problem.subject) for problem in report.problems}
        kept = tuple(p for p in again.problems if (p.kind, p.subject) in seen)
        report = replace(again, problems=kept)
    return report
