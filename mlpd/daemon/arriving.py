"""Verb arrive: the target's side of moving slots; docs/decisions/moving-slots.md tells the order.

Each step is one transaction, and may be asked for again.
"""

import asyncio
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlpd.core.columns import Columns
from mlpd.core.errors import ConflictError, MlpdError, StorageFullError, ValidationError
from mlpd.core.shards import parse_runs
from mlpd.daemon.leaving import (
    check_definitions,
    digest_of,
    move_done,
    no_move,
    show_moves,
    under_way,
    write_move,
)
from mlpd.daemon.moved_events import Received, decode_chunk
from mlpd.daemon.moved_rows import holds_any, remove_rows
from mlpd.daemon.ownership import Ownership
from mlpd.daemon.part import Moves
from mlpd.daemon.state import CatalogState
from mlpd.features.catalog import Catalog
from mlpd.features.event_ids import remember_ids
from mlpd.features.ingest import apply_batch, conform
from mlpd.features.stamps import Stamps
from mlpd.features.tombstones import concat_events
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.horizons import Horizon, move_horizon
from mlpd.storage.lineage import Import, next_number, read_imports
from mlpd.storage.log import LogRecord, RecordKind, append
from mlpd.storage.moves_store import Arriving, load_arriving, load_leaving, store_arriving
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

FREE_BYTES_MIN = 256 << 20
"""What stays free at the target beside twice what the source holds."""


class Arrivals:
    """Takes slots in; one instance per daemon."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        state: CatalogState,
        ownership: Ownership,
        paths: DataDirectory,
    ) -> None:
        self._environment = environment
        self._writer = writer
        self._state = state
        self._ownership = ownership
        self._paths = paths

    async def begin(
        self,
        move: str,
        text: str,
        shard: str,
        *,
        definitions: str,
        size_bytes: int = 0,
        dry_run: bool = False,
    ) -> dict[str, Any]:
        """Begin to take slots from a shard.

        Raises ConflictError: `move_under_way`, `owned_already`, `definitions_differ`, `no_cluster`;
        NotFoundError(code="unknown_shard"), StorageFullError(code="target_full").
        """
        slots = tuple(parse_runs(text))
        self._ownership.check_member(shard)
        asked = (self._ownership.moves.arriving, move, slots, shard, definitions)
        self._check_new(*asked)
        await asyncio.to_thread(self._check_room, size_bytes)
        if dry_run:
            return self.show()
        with self._environment.snapshot() as snapshot:
            left = holds_any(snapshot, (Table.ONLINE, Table.TILES), slots)
        if left and self._ownership.moves.arriving is None:  # of a move that was cancelled
            await remove_rows(self._writer, slots)

        def begin(txn: WriteTransaction) -> None:
            if self._check_new(load_arriving(txn), move, slots, shard, definitions):
                return
            number = next_number(txn)
            Import(number, slots, since=int(txn.sequence)).store(txn)
            self._note(txn, Arriving(move, slots, shard, definitions, number))

        await self._write(begin)
        return self.show()

    async def take(self, move: str, data: bytes) -> dict[str, Any]:
        """Append a chunk of history, and update rows and tiles; what came before is passed over.

        Raises ValidationError(code="damaged_chunk") and "known_time_ahead", ConflictError(
        code="import_gap", "move_state").
        """
        try:
            chunk = await asyncio.to_thread(decode_chunk, data)
        except (MlpdError, ValueError, KeyError, TypeError, IndexError) as error:
            raise ValidationError(
                f"the history that came is damaged: {error}", code="damaged_chunk"
            ) from None
        await self._write(lambda txn: self._take(txn, _of(load_arriving(txn), move), chunk))
        return self.show()

    async def seal(self, move: str, through: int, horizons: Mapping[str, int]) -> dict[str, Any]:
        """Note that all is here; from now on events that concern the slots are refused.

        `through`: the last sequence that the source needs; `horizons`: of its sources.  Raises
        ConflictError: `import_gap`, `definitions_changed`.
        """

        def seal(txn: WriteTransaction) -> None:
            found = _of(load_arriving(txn), move)
            if found.state == "sealed":
                return
            if found.through < through:
                raise _gap(found.through, through)
            check_definitions(found.definitions, self._state.catalog_in(txn))
            for source, before_us in horizons.items():
                move_horizon(txn, source, Horizon(int(before_us), 0))
            one = next(one for one in read_imports(txn) if one.number == found.number)
            replace(one, live_from=int(txn.sequence)).store(txn)
            self._note(txn, replace(found, state="sealed"))

        await self._write(seal)
        return self.show()

    async def cancel(self, move: str) -> dict[str, Any]:
        """Forget an import and remove its rows and tiles; its rows of the log count for nothing.

        Raises ConflictError(code="move_done") once the map gives the slots to this shard.
        """
        found = self._ownership.moves.arriving
        if found is None or found.move != move:
            return self.show()

        def forget(txn: WriteTransaction) -> None:
            if self._ownership.owns(found.slots):
                raise move_done()
            one = next(one for one in read_imports(txn) if one.number == found.number)
            replace(one, live_from=None).store(txn)
            self._note(txn, None)

        await self._write(forget)
        await remove_rows(self._writer, found.slots)
        return self.show()

    async def finish(self, move: str) -> dict[str, Any]:
        """Forget a move whose slots are here; raises ConflictError(code="move_state") else."""
        found = self._ownership.moves.arriving
        if found is None or found.move != move:
            return self.show()

        def finish(txn: WriteTransaction) -> None:
            if not self._ownership.owns(found.slots):
                raise ConflictError(
                    "the map doesn't give the slots to this shard", code="move_state"
                )
            self._note(txn, None)

        await self._write(finish)
        return self.show()

    def show(self) -> dict[str, Any]:
        """Return what leaves and what arrives."""
        return show_moves(self._ownership.moves)

    def _take(self, txn: WriteTransaction, found: Arriving, chunk: Received) -> None:
        """On the writer thread: log records, views and how far it came, in one transaction."""
        if chunk.through <= found.through:
            return
        if found.state != "importing" or chunk.after != found.through:
            raise _gap(found.through, chunk.after)
        catalog = self._state.catalog_in(txn)
        txn.finish()  # what came before in this group: all is applied in the order of the log
        one = next(one for one in read_imports(txn) if one.number == found.number)
        stored: dict[str, list[tuple[Columns, Stamps]]] = {}
        for record, columns in chunk.records:
            first, last = _append(txn, catalog, record, columns)
            one = one.with_rows(first, last)
            if record.source in catalog.schemas:
                of_schema = conform(columns, catalog.schemas[record.source], record.count)
                sequences = np.arange(first, last + 1, dtype=np.int64)
                stamps = Stamps(record.event_us, record.known_us, sequences)
                stored.setdefault(record.source, []).append((of_schema, stamps))
        for source, parts in stored.items():
            stamps = Stamps(*map(np.concatenate, zip(*(s for _, s in parts), strict=True)))
            views, columns = (
                catalog.views_by_source.get(source, ()),
                concat_events([c for c, _ in parts]),
            )
            apply_batch(txn, views, columns, stamps, txn.newest_known_us, found.flags)
        one.store(txn)
        rows = found.rows + sum(record.count for record, _ in chunk.records)
        self._note(txn, replace(found, through=chunk.through, rows=rows))

    def _check_new(
        self,
        found: Arriving | None,
        move: str,
        slots: Sequence[int],
        shard: str,
        definitions: str,
    ) -> bool:
        """Tell whether just this move is under way; raises if another one is, or can't be."""
        if found is not None:
            if (found.move, found.slots, found.shard) == (move, slots, shard):
                return True
            raise under_way("arrive at", found.slots, f"from {found.shard}")
        if self._ownership.owns_any(slots):
            raise ConflictError(
                "some of the slots are here already", code="owned_already",
                hint="mlpd shard list shows who owns what.",
            )  # fmt: skip
        if digest_of(self._state.catalog) != definitions:
            raise ConflictError(
                "the two shards run different definitions",
                code="definitions_differ",
                hint="Bring both to the same: mlpd apply DIR --url URL.",
            )
        return False

    def _check_room(self, size_bytes: int) -> None:
        free = shutil.disk_usage(self._paths.root).free
        needed = 2 * size_bytes + FREE_BYTES_MIN
        if free < needed:
            raise StorageFullError(
                f"the target has {free >> 20} MiB free, the move may need {needed >> 20} MiB",
                code="target_full",
                hint="Free some space there, or move fewer slots; nothing was moved.",
            )

    async def _write(self, op: Callable[[WriteTransaction], None]) -> None:
        await write_move(self._environment, self._writer, self._ownership, op)

    def _note(self, txn: WriteTransaction, arriving: Arriving | None) -> None:
        store_arriving(txn, arriving)
        self._ownership.go_by(Moves(load_leaving(txn), arriving))


def _of(found: Arriving | None, move: str) -> Arriving:
    if found is None or found.move != move:
        raise no_move(move)
    return found


def _append(
    txn: WriteTransaction, catalog: Catalog, record: LogRecord, columns: Columns
) -> tuple[int, int]:
    """Append a record under new sequences, known as it was; remember its events' ids."""
    source = catalog.definitions.sources.get(record.source)
    if source is not None and source.event_id is not None:
        remember_ids(txn, source, conform(columns, source.schema, record.count))
    return append(
        txn,
        kind=RecordKind.EVENTS,
        source=record.source,
        columns=columns,
        event_us=record.event_us,
        known_us=record.known_us,
    )


def _gap(through: int, wanted: int) -> ConflictError:
    return ConflictError(
        f"the history is here up to sequence {through} of the source, not {wanted}",
        code="import_gap",
        hint="Run the same mlpd shard move again: it goes on where this shard is.",
        details={"through": through},
    )
