"""Verb history: a point-in-time join over all acknowledged events, in a child process.

A join has a folder of its own: what was sent as a file lies there, what the child can't keep in
memory, and the answer, which is whole before its first byte is sent.  The folder goes with the
join; what a killed daemon leaves is removed when the next one starts.
"""

import asyncio
import secrets
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mlpd.core.closure import build_closure
from mlpd.core.columns import Columns, DType, encode_columns, height
from mlpd.core.errors import (
    MisdirectedError,
    OverloadedError,
    StorageFullError,
    ValidationError,
)
from mlpd.core.media import ARROW
from mlpd.core.routing import key_slots
from mlpd.core.specs import Closure, ServiceSpec
from mlpd.daemon.gathering import Gathering
from mlpd.daemon.offline import offline_request
from mlpd.daemon.ownership import Ownership
from mlpd.daemon.part import Part
from mlpd.daemon.process import Child
from mlpd.daemon.spines import check_rows, check_spine
from mlpd.daemon.state import CatalogState
from mlpd.features.on_stale import OnStale
from mlpd.features.winners import Closed, Mode
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory

JOINS_MAX = 2
"""Children at once; each has up to 700 MB in memory."""
OPEN_MAX = 16
"""Joins that are being sent, wait, are computed or are being answered: their files are on disk."""
SPINE_BYTES_MAX = 1 << 30

MODES: tuple[Mode, ...] = ("as_known", "as_corrected", "as_of_sequence")
CLOSED: tuple[Closed, ...] = ("right", "left")


@dataclass(frozen=True, slots=True)
class SpineFile:
    """A spine as it was sent: a file and its media type, one of `SPINE_FILES`."""

    path: Path
    kind: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A joined frame in a file, which is closed with its join."""

    file: IO[bytes]
    rows: int


@dataclass(frozen=True, slots=True)
class Question:
    """What is joined: a service or single features, and how."""

    service: str | None = None
    features: Sequence[str] = ()
    request: Mapping[str, DType] | None = None
    mode: Mode = "as_known"
    closed: Closed = "right"
    statuses: bool = False
    on_stale: OnStale = "null"


class History:
    """Answers spines; one instance per daemon."""

    def __init__(
        self,
        environment: Environment,
        state: CatalogState,
        ownership: Ownership,
        gathering: Gathering,
        paths: DataDirectory,
    ) -> None:
        self._environment = environment
        self._state = state
        self._ownership = ownership
        self._gathering = gathering
        self._paths = paths
        self._slots = asyncio.Semaphore(JOINS_MAX)
        self._open = 0

    def sweep(self) -> None:
        """Remove what joins of a killed daemon left; before the first one of this."""
        shutil.rmtree(self._paths.joins, ignore_errors=True)

    @asynccontextmanager
    async def open(self) -> "AsyncIterator[Join]":
        """Begin a join; its files are there until the block ends.

        Raises OverloadedError(code="too_many_joins").
        """
        if self._open >= OPEN_MAX:
            raise OverloadedError(
                f"{OPEN_MAX} joins are under way", code="too_many_joins",
                hint="Try again when one is done.", details={"retry_after_s": 5.0},
            )  # fmt: skip
        self._open += 1
        join = Join(self, self._paths.joins / secrets.token_hex(8))
        try:
            await asyncio.to_thread(_make_folder, join.folder)
            yield join
        finally:
            self._open -= 1
            await join.close()

    def closure(
        self, service: str | None, features: Sequence[str], request: Mapping[str, DType]
    ) -> Closure:
        """Return what the spine must bring; raises for an unknown service or feature."""
        definitions = self._state.catalog.definitions
        if service is not None:
            return build_closure(definitions, definitions.service(service))
        return build_closure(definitions, ServiceSpec("features", tuple(features), request))

    async def join(
        self,
        folder: Path,
        spine: Columns | SpineFile,
        closure: Closure,
        question: Question,
        kind: str,
    ) -> tuple[Path, int]:
        """Join in `folder`; return the answer's file and rows.  See `Join.run`.

        A spine with keys of other shards is joined to the events of all of them.
        """
        with self._environment.snapshot() as snapshot:
            through = snapshot.sequence
            catalog = self._state.read_catalog(snapshot)
        path, part = folder / "answer", self._ownership.part
        if isinstance(spine, SpineFile):
            rows: dict[str, Any] = {"spine_file": str(spine.path), "spine_format": spine.kind}
        else:
            rows = {"spine": await asyncio.to_thread(encode_columns, spine)}
        message = {
            **offline_request(self._paths, catalog, through),
            **rows,
            "folder": str(folder),
            "answer": str(path),
            "format": kind,
            "service": question.service,
            "features": list(question.features),
            "request": {name: str(dtype) for name, dtype in (question.request or {}).items()},
            "mode": question.mode,
            "closed": question.closed,
            "statuses": question.statuses,
            "on_stale": question.on_stale,
            "part": None if part is None else part.to_request(),
        }
        async with self._slots:
            # Sequences are each shard's own: what all of them have knows no moment by one.
            is_own = question.mode == "as_of_sequence"
            if is_own or await asyncio.to_thread(_may_be_here, part, closure, spine):
                try:
                    return path, await _join(message)
                except MisdirectedError:
                    if is_own:
                        raise
            sources = {catalog.views[view].view.source for view in closure.view_features}
            gathered = await self._gathering.gather(catalog, sources, folder / "events")
            return path, await _join({**message, "part": None, "gathered": gathered})


class Join:
    """One join under way, and its files in `folder`."""

    def __init__(self, history: History, folder: Path) -> None:
        self._history = history
        self.folder = folder
        self._answer: IO[bytes] | None = None

    @property
    def spine(self) -> Path:
        """Where a spine may be put that was sent as a file."""
        return self.folder / "spine"

    async def run(
        self, spine: Columns | SpineFile, question: Question, kind: str = ARROW
    ) -> Answer:
        """Return a file of media type `kind`: the spine's columns and the features.

        `spine`: `event_time` (timestamp), key columns, request fields and, for `as_of_sequence`,
        `sequence` (int64).  Every event acknowledged before the call counts.  Raises
        ValidationError, TooLargeError, StorageFullError, ConflictError(code="stale_feature") for
        `on_stale` "error", and what `Gathering.gather` raises where keys are of other shards;
        MisdirectedError for those by `as_of_sequence`.
        """
        self._check(question)
        asked = (question.service, question.features, question.request or {})
        closure = self._history.closure(*asked)
        if not isinstance(spine, SpineFile):
            check_rows(height(spine))
            types = {name: column.dtype for name, column in spine.items()}
            check_spine(closure, types, question.mode)
        path, rows = await self._history.join(self.folder, spine, closure, question, kind)
        return Answer(await asyncio.to_thread(self._take, path), rows)

    def _take(self, path: Path) -> IO[bytes]:
        """Open the answer and remove the folder: while the file is sent it needs no name."""
        self._answer = path.open("rb")
        shutil.rmtree(self.folder, ignore_errors=True)
        return self._answer

    async def close(self) -> None:
        """Remove the files.

        Once there was an answer nobody waits for that: a client that has it closes its connection,
        which would cancel its handler and count as a client that went away.
        """
        if self._answer is not None:
            asyncio.get_running_loop().run_in_executor(None, self._answer.close)
        else:
            removed = asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)
            await asyncio.shield(removed)

    def _check(self, question: Question) -> None:
        for what, value, known in (
            ("mode", question.mode, MODES),
            ("closed", question.closed, CLOSED),
        ):
            if value not in known:
                raise ValidationError(
                    f"{what} {value!r} is unknown",
                    code=f"unknown_{what}",
                    hint=f"Known: {', '.join(known)}.",
                )


def _may_be_here(part: Part | None, closure: Closure, spine: Columns | SpineFile) -> bool:
    """Tell whether no key is known to be of another shard; those in files only the child sees."""
    if part is None or isinstance(spine, SpineFile):
        return True
    try:
        for entity in closure.entities:
            columns = {name: spine[name].to_list() for name in entity.columns}
            part.check_slots(key_slots(entity, columns, height(spine)).tolist(), "key")
    except MisdirectedError:
        return False
    return True


async def _join(message: Mapping[str, Any]) -> int:
    async with Child("history", message) as child:
        rows: int = await child.result()
        return rows


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise StorageFullError(
            f"the join can't write its files: {error}",
            hint="Free some space; a join needs room in the data directory.",
        ) from error
