"""Verb leave: the source's side of moving slots; docs/decisions/moving-slots.md tells the order.

Each step is one transaction, and may be asked for again.
"""

import asyncio
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ConflictError, MlpdError, NotFoundError
from mlpd.core.hashing import SLOTS, definition_hash
from mlpd.core.shards import format_runs, parse_runs
from mlpd.daemon.experiments import Experiments, digest_of
from mlpd.daemon.moved_events import tail_chunk, touched_slots, wanted_of
from mlpd.daemon.moved_predictions import (
    TAIL,
    Served,
    base_chunk,
    digest_served,
    outcomes_of,
    tail_of_changes,
)
from mlpd.daemon.moved_rows import (
    LOADED_ROWS_MAX,
    SERVED,
    count_rows,
    digest_rows,
    holds_any,
    load_rows,
    remove_rows,
    too_many_rows,
)
from mlpd.daemon.offline import offline_request
from mlpd.daemon.ownership import Ownership
from mlpd.daemon.part import Moves
from mlpd.daemon.predictions import PredictionLog
from mlpd.daemon.process import Child
from mlpd.daemon.recount import Recount
from mlpd.daemon.served_files import load_files
from mlpd.daemon.served_left import note_left
from mlpd.daemon.state import CatalogState
from mlpd.features.catalog import Catalog
from mlpd.storage.compactor import Compactor
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.horizons import load_horizons
from mlpd.storage.lineage import load_lineage
from mlpd.storage.moved_keys import CHANGED, read_changed_keys, remove_list
from mlpd.storage.moves_store import (
    Leaving,
    LeavingState,
    load_arriving,
    load_leaving,
    store_leaving,
    to_fields,
)
from mlpd.storage.tables import Table
from mlpd.storage.transactions import Snapshot, WriteTransaction
from mlpd.storage.writer import Writer

PART_ROWS = 10_000
"""Online rows that one move brings over: what is compared in its pause, some 100 ms."""
PART_PREDICTIONS = 20_000
"""Likewise predictions."""
REMOVED_OUTCOMES = 500
"""Outcomes that go with one write."""

_NEXT: dict[str, tuple[LeavingState, ...]] = {
    "paused": ("copying", "paused"),
    "leaving": ("paused", "leaving"),
    "cancelling": ("copying", "paused", "leaving", "cancelling"),
}
"""From which states a move may come into another."""


@dataclass(frozen=True, slots=True)
class Since:
    """Slots that were `touched` behind a sequence and a position of the predictions, or not."""

    sequence: int
    served: bytes
    touched: bool


class Departures:
    """Lets slots go; one instance per daemon."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        state: CatalogState,
        ownership: Ownership,
        paths: DataDirectory,
        experiments: Experiments,
        recount: Recount,
        predictions: PredictionLog,
        compactor: Compactor,
    ) -> None:
        self._environment = environment
        self._writer = writer
        self._state = state
        self._ownership = ownership
        self._experiments = experiments
        self._recount = recount
        self._predictions = predictions
        self._compactor = compactor
        self._paths = paths
        self._lock = asyncio.Lock()
        self._files: dict[str, tuple[str, _Places]] = {}
        """Of which move a file is, and by `after` where its chunks lie: offset and size."""

    async def survey(self, text: str) -> dict[str, Any]:
        """Return what moving slots would move, in `parts`: slots, online rows of each.

        Raises what `begin` would raise for them.
        """
        slots = parse_runs(text)
        self._check_owned(slots)
        with self._environment.snapshot() as snapshot:
            catalog = self._state.read_catalog(snapshot)
            lineage = load_lineage(snapshot)
        rows = await asyncio.to_thread(count_rows, self._environment, slots)
        if max(rows.values(), default=0) > LOADED_ROWS_MAX:
            raise too_many_rows()
        served = await asyncio.to_thread(count_rows, self._environment, slots, Table.PREDICTIONS)
        groups = [slots] if lineage is None else lineage.origins(slots)
        parts = [part for group in groups for part in _parts(group, rows, served)]
        return {
            "parts": [
                {
                    "slots": format_runs(part),
                    "rows": sum(rows.get(slot, 0) for slot in part),
                    "predictions": sum(served.get(slot, 0) for slot in part),
                }
                for part in parts
            ],
            "rows": sum(rows.values()),
            "predictions": sum(served.values()),
            "size_bytes": await asyncio.to_thread(self._size_bytes),
            "definitions": definitions_digest(catalog),
        }

    async def begin(self, move: str, text: str, shard: str) -> dict[str, Any]:
        """Begin to copy slots to a shard.

        Raises ConflictError: `move_under_way`, `not_owned`, `no_cluster`, `mixed_origins`,
        NotFoundError(code="unknown_shard").
        """
        slots = parse_runs(text)
        self._check_owned(slots)
        self._ownership.check_member(shard)
        wanted = tuple(slots)

        def begin(txn: WriteTransaction) -> None:
            found = load_leaving(txn)
            if found is not None and (found.move, found.slots, found.shard) == (
                move,
                wanted,
                shard,
            ):
                return
            if found is not None:
                raise under_way("leave", found.slots, f"for {found.shard}")
            self._check_owned(slots)
            catalog = self._state.catalog_in(txn)
            lineage = load_lineage(txn)
            if lineage is not None and len(lineage.origins(slots)) > 1:
                raise ConflictError(
                    "these slots came here by different moves",
                    code="mixed_origins",
                    hint="They leave one by one as they came; mlpd shard move does so.",
                )
            self._note(txn, Leaving(move, wanted, shard, definitions_digest(catalog)))

        await self._write(begin)
        return await self._show_all()

    async def go_on(self, move: str, state: LeavingState) -> dict[str, Any]:
        """Bring a move into another state: `paused`, `leaving` or `cancelling`.

        Of a paused one all is stored that was answered before.
        """
        self._predictions.flush()

        def change(txn: WriteTransaction) -> None:
            found = _of(load_leaving(txn), move)
            if found.state not in _NEXT[state]:
                raise ConflictError(
                    f"the move is {found.state}, it can't become {state}",
                    code="move_state",
                    hint="mlpd shard status shows it; run mlpd shard move or cancel again.",
                )
            if not self._ownership.owns(found.slots):
                raise move_done()
            if found.state == state:
                return
            if state != "cancelling":
                catalog = self._state.catalog_in(txn)
                check_definitions(found.definitions, catalog)
            sequence = int(txn.sequence) if state == "paused" else found.sequence
            self._note(txn, replace(found, state=state, sequence=sequence))

        await self._write(change)
        if state == "paused":
            await self._predictions.settle()
            return await self._show_all()
        return self.show()

    async def _show_all(self) -> dict[str, Any]:
        """Return the notes, and what experiments the units take part in, by digest."""
        known = self._experiments.known()
        digests = await asyncio.to_thread(
            lambda: {kept.spec.name: digest_of(kept) for kept in known}
        )
        return {**self.show(), "experiments": digests}

    async def finish(self, move: str) -> dict[str, Any]:
        """Forget a move: remove the rows of slots that are gone, or open those of a cancelled one.

        Raises ConflictError(code="move_state") for one that is neither.
        """
        found = _of(self._ownership.moves.leaving, move)
        gone = not self._ownership.owns(found.slots)
        if not gone and found.state != "cancelling":
            raise ConflictError(
                "the slots are still here, and the move isn't cancelled", code="move_state"
            )
        removed = await self._remove(found) if gone else 0
        await remove_list(self._writer, CHANGED)
        await self._write(lambda txn: self._note(txn, None))
        await asyncio.to_thread(shutil.rmtree, self._paths.moves, ignore_errors=True)
        return {**self.show(), "removed": removed}

    async def _remove(self, found: Leaving) -> int:
        """Remove what slots hold that are gone, after it is counted no more."""
        await self._writer.write(lambda txn: note_left(txn, found.slots))
        await self._recount.run()
        outcomes = await asyncio.to_thread(outcomes_of, self._environment, found.slots)
        for start in range(0, len(outcomes), REMOVED_OUTCOMES):
            part = outcomes[start : start + REMOVED_OUTCOMES]
            await self._writer.write(partial(_delete, table=Table.UNITS, keys=part))
        return await remove_rows(self._writer, found.slots)

    async def events(self, move: str, after: int) -> bytes:
        """Return the chunk of history after a sequence: at least what is here now, in the end."""
        found = _of(self._ownership.moves.leaving, move)
        async with self._lock:
            written = self._written("history", move)
            if after not in written:
                chunk = await asyncio.to_thread(self._tail, found, after)
                if chunk is not None:
                    return chunk
                written = await self._write_file(found, "history", after)
                if after not in written:  # nothing of it was compacted any more
                    chunk = await asyncio.to_thread(self._tail, found, after)
                    assert chunk is not None
                    return chunk
            return await asyncio.to_thread(_read, self._path("history"), *written[after])

    async def predictions(self, move: str, after: bytes) -> bytes:
        """Return the chunk of the prediction log behind a position; at the end one without rows."""
        found = _of(self._ownership.moves.leaving, move)
        if after >= TAIL:
            return await asyncio.to_thread(self._changes, found, after)
        async with self._lock:
            written = self._written("predictions", move)
            if after not in written and not await asyncio.to_thread(self._has_files, found):
                chunk = await asyncio.to_thread(base_chunk, self._environment, found.slots, after)
                return self._for_target(found, chunk)
            if after not in written:
                async with self._compactor.paused():  # no file is written from here on
                    written = await self._write_file(found, "predictions", after)
            return await asyncio.to_thread(_read, self._path("predictions"), *written[after])

    def _changes(self, found: Leaving, after: bytes) -> bytes:
        return self._for_target(found, tail_of_changes(self._environment, found.flags, after))

    def _for_target(self, found: Leaving, chunk: Served) -> bytes:
        """Return a chunk; once paused, no event of the slots is newer than the pause."""
        if found.state != "copying":
            chunk.needs = min(chunk.needs, found.sequence)
        return chunk.encode()

    def _has_files(self, found: Leaving) -> bool:
        """Tell whether vectors of the slots' predictions may lie in files."""
        with self._environment.snapshot() as snapshot:
            return bool(load_files(snapshot)) and holds_any(snapshot, SERVED, found.slots)

    async def digest(
        self, text: str, at_us: int | None, since: Since | None = None
    ) -> dict[str, Any]:
        """Return what `digest_rows` finds of slots at a moment, by default now; and horizons.

        `since`: of which of the slots; the answer has them.  Raises TooLargeError(
        code="too_many_rows").
        """
        return await asyncio.to_thread(self._digest, parse_runs(text), at_us, since)

    def _digest(
        self, asked: Sequence[int], at_us: int | None, since: Since | None
    ) -> dict[str, Any]:
        with self._environment.read_at() as (snapshot, t_us):
            catalog, slots = self._state.read_catalog(snapshot), asked
            if since is not None:
                touched = _touched(snapshot, catalog, asked, since)
                slots = [slot for slot in asked if touched[slot] == since.touched]
            horizons = {name: one.before_us for name, one in load_horizons(snapshot).items()}
            rows = load_rows(snapshot, slots)
            served, predictions = digest_served(snapshot, slots)
        at_us = t_us if at_us is None else at_us
        digest, count = digest_rows(catalog, rows, at_us)
        return {
            "slots": format_runs(slots),
            "digest": digest,
            "rows": count,
            "at": at_us,
            "horizons": horizons,
            "served": served,
            "predictions": predictions,
        }

    def show(self) -> dict[str, Any]:
        """Return what leaves and what arrives."""
        return show_moves(self._ownership.moves)

    def _path(self, what: str) -> Path:
        return self._paths.moves / what

    def _written(self, what: str, move: str) -> "_Places":
        of, places = self._files.get(what, ("", {}))
        return places if of == move else {}

    async def _write(self, op: Callable[[WriteTransaction], None]) -> None:
        await write_move(self._environment, self._writer, self._ownership, op)

    def _note(self, txn: WriteTransaction, leaving: Leaving | None) -> None:
        store_leaving(txn, leaving)
        self._ownership.go_by(Moves(leaving, load_arriving(txn)))

    def _check_owned(self, slots: Sequence[int]) -> None:
        if not slots or not self._ownership.owns(slots):
            raise ConflictError(
                f"slots {format_runs(slots)[:60]!r} are not all of this shard",
                code="not_owned",
                hint="mlpd shard list shows who owns what.",
            )

    def _size_bytes(self) -> int:
        """Return about what the history takes: of all slots, as it isn't sorted by them."""
        with self._environment.snapshot() as snapshot:
            return sum(snapshot.table_bytes(t) for t in (Table.LOG, Table.ONLINE, Table.TILES))

    def _tail(self, found: Leaving, after: int) -> bytes | None:
        with self._environment.snapshot() as snapshot:
            wanted = wanted_of(
                self._state.read_catalog(snapshot), [*found.slots], load_lineage(snapshot)
            )
        chunk = tail_chunk(self._environment, wanted, after)
        return None if chunk is None else chunk.encode()

    async def _write_file(self, found: Leaving, what: str, after: int | bytes) -> "_Places":
        """Write chunks of what a child alone can read; a daemon that was killed writes it anew.

        Of `history` that is what is compacted after a sequence, of `predictions` all rows behind a
        position but for what changes.
        """
        with self._environment.snapshot() as snapshot:
            catalog, through = self._state.read_catalog(snapshot), int(snapshot.sequence)
        await asyncio.to_thread(self._paths.moves.mkdir, 0o700, parents=True, exist_ok=True)
        places: _Places = {}
        request = {
            "work": what,
            **offline_request(self._paths, catalog, through),
            "slots": format_runs(found.slots),
            "after": after,
            "path": str(self._path(what)),
        }
        async with Child("moves", request) as child:
            async for message in child.messages():
                if message["kind"] == "chunk":
                    places[message["after"]] = message["offset"], message["size"]
        self._files[what] = found.move, places
        return places


async def write_move(
    environment: Environment,
    writer: Writer,
    ownership: Ownership,
    op: Callable[[WriteTransaction], None],
) -> None:
    """Run an operation that changes the moves under way, and what this daemon goes by with them.

    It may run twice, so it looks at the transaction alone; if it fails, what is stored counts.
    """
    try:
        await writer.write(op)
    except MlpdError:
        with environment.snapshot() as snapshot:
            ownership.load(snapshot)
        raise


_Places = dict[int | bytes, tuple[int, int]]


def _of(found: Leaving | None, move: str) -> Leaving:
    if found is None or found.move != move:
        raise no_move(move)
    return found


def definitions_digest(catalog: Catalog) -> str:
    """Return the digest of the definitions that run: two shards compare it."""
    return definition_hash(dict(catalog.document))


def check_definitions(expected: str, catalog: Catalog) -> None:
    """Raise ConflictError(code="definitions_changed") if others run than when the move began."""
    if definitions_digest(catalog) != expected:
        raise ConflictError(
            "the definitions changed during the move",
            code="definitions_changed",
            hint="It was cancelled; apply the same definitions to both, then move again.",
        )


def show_moves(moves: Moves) -> dict[str, Any]:
    """Return the wire form of what leaves and what arrives."""
    notes = {"leaving": moves.leaving, "arriving": moves.arriving}
    return {name: None if note is None else to_fields(note) for name, note in notes.items()}


def under_way(verb: str, slots: Sequence[int], where: str) -> ConflictError:
    """Return the error for a second move."""
    return ConflictError(
        f"slots {format_runs(slots)[:60]} {verb} this shard {where} already",
        code="move_under_way",
        hint="Finish it by the same mlpd shard move, or mlpd shard cancel it.",
        details={"slots": format_runs(slots)},
    )


def no_move(move: str) -> NotFoundError:
    """Return the error for a move that isn't under way."""
    return NotFoundError(
        f"no move {move!r:.60} is under way here", code="unknown_move", hint="mlpd shard status"
    )


def move_done() -> ConflictError:
    """Return the error for a step back after the map changed."""
    return ConflictError(
        "the slots have moved: the map gives them to the other shard",
        code="move_done",
        hint="Finish it by the same mlpd shard move.",
    )


def _parts(group: Sequence[int], rows: dict[int, int], served: dict[int, int]) -> list[list[int]]:
    """Return ascending slots in parts of as many rows as may be, or one slot alone."""
    parts: list[list[int]] = [[]]
    size = 0.0
    for slot in group:
        share = rows.get(slot, 0) / PART_ROWS + served.get(slot, 0) / PART_PREDICTIONS
        size += share
        if parts[-1] and size > 1:
            parts.append([])
            size = share
        parts[-1].append(slot)
    return parts


def _touched(
    snapshot: Snapshot, catalog: Catalog, slots: Sequence[int], since: Since
) -> NDArray[np.bool_]:
    """Return per slot whether it was touched; all of them where that can't be told."""
    wanted = wanted_of(catalog, slots, None)
    touched = touched_slots(snapshot, wanted, since.sequence)
    if touched is None or since.served < TAIL:
        return np.ones(SLOTS, np.bool_)
    for key in read_changed_keys(snapshot, since.served.removeprefix(TAIL)):
        touched[key[0] << 8 | key[1]] = True
    return touched


def _delete(txn: WriteTransaction, *, table: Table, keys: Sequence[bytes]) -> None:
    for key in keys:
        txn.delete(table, key)


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
