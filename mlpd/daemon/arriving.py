"""Verb arrive: the target's side of moving slots; docs/decisions/moving-slots.md tells the order.

Each step is one transaction, and may be asked for again.
"""

import asyncio
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np

from mlpd.core.columns import Columns
from mlpd.core.errors import ConflictError, MlpdError, StorageFullError, ValidationError
from mlpd.core.shards import parse_runs
from mlpd.daemon.experiments import Coming, Experiments
from mlpd.daemon.leaving import (
    check_definitions,
    definitions_digest,
    move_done,
    no_move,
    show_moves,
    under_way,
    write_move,
)
from mlpd.daemon.moved_events import Received, decode_chunk
from mlpd.daemon.moved_predictions import Served, decode_served
from mlpd.daemon.moved_rows import FEATURES, SERVED, holds_any, remove_rows
from mlpd.daemon.ownership import Ownership
from mlpd.daemon.part import Moves
from mlpd.daemon.recount import Recount
from mlpd.daemon.routing import concerned_by
from mlpd.daemon.served_left import note_left
from mlpd.daemon.state import CatalogState
from mlpd.daemon.took_predictions import Mapped, map_rows, remove_outcomes, store_rows
from mlpd.features.catalog import Catalog
from mlpd.features.event_ids import add_sequences, remember_ids
from mlpd.features.ingest import apply_batch, conform
from mlpd.features.stamps import Stamps
from mlpd.features.tombstones import concat_events
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.horizons import Horizon, move_horizon
from mlpd.storage.lineage import Import, next_number, read_imports
from mlpd.storage.log import LogRecord, RecordKind, append
from mlpd.storage.moved_keys import OUTCOMES, SEQUENCES, UNITS, note_sequences, remove_list
from mlpd.storage.moves_store import Arriving, load_arriving, load_leaving, store_arriving
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
        experiments: Experiments,
        recount: Recount,
    ) -> None:
        self._environment = environment
        self._writer = writer
        self._state = state
        self._ownership = ownership
        self._paths = paths
        self._experiments = experiments
        self._recount = recount

    async def begin(
        self,
        move: str,
        text: str,
        shard: str,
        *,
        definitions: str,
        experiments: Mapping[str, str] | None = None,
        size_bytes: int = 0,
        dry_run: bool = False,
    ) -> dict[str, Any]:
        """Begin to take slots from a shard.  `experiments`: digests of those with units there.

        Raises ConflictError: `move_under_way`, `owned_already`, `definitions_differ`,
        `experiments_differ`, `no_cluster`; NotFoundError(code="unknown_shard"), StorageFullError(
        code="target_full").
        """
        slots = tuple(parse_runs(text))
        self._ownership.check_member(shard)
        asked = (self._ownership.moves.arriving, move, slots, shard, definitions)
        self._check_new(*asked)
        self._experiments.check_same(experiments or {})
        await asyncio.to_thread(self._check_room, size_bytes)
        if dry_run:
            return self.show()
        with self._environment.snapshot() as snapshot:
            left = holds_any(snapshot, (*FEATURES, *SERVED), slots)
        if self._ownership.moves.arriving is None:  # what is there is of a move that was cancelled
            await self._remove_lists()
            if left:
                await self._writer.write(lambda txn: note_left(txn, slots))
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
        """Store a chunk of history or of the prediction log; what came before is passed over.

        Of history rows and tiles are updated.  Raises ValidationError(code="damaged_chunk") and
        "known_time_ahead", ConflictError(code="import_gap", "move_state").
        """
        with _damaged():
            chunk = await asyncio.to_thread(_decode, data)
        if isinstance(chunk, Served):
            await self._take_served(move, chunk)
        else:
            await self._write(lambda txn: self._take(txn, _of(load_arriving(txn), move), chunk))
        return self.show()

    async def _take_served(self, move: str, chunk: Served) -> None:
        found = _of(self._ownership.moves.arriving, move)
        if chunk.through <= bytes.fromhex(found.served):
            return
        if found.through < chunk.needs:
            raise _gap(found.through, chunk.needs)
        with _damaged():
            mapped = await asyncio.to_thread(map_rows, self._environment, found, chunk)
        await self._write(
            lambda txn: self._store_served(txn, _of(load_arriving(txn), move), chunk, mapped)
        )
        self._experiments.expect(
            Coming(experiment, unit, arm, phase) for experiment, unit, arm, phase in mapped.units
        )

    def _store_served(
        self, txn: WriteTransaction, found: Arriving, chunk: Served, mapped: Mapped
    ) -> None:
        if chunk.through <= bytes.fromhex(found.served):
            return
        if found.state != "importing" or chunk.after.hex() != found.served:
            raise _gap(found.through, chunk.needs)
        count = found.predictions + store_rows(txn, mapped)
        self._note(txn, replace(found, served=chunk.through.hex(), predictions=count))

    async def seal(
        self,
        move: str,
        through: int,
        horizons: Mapping[str, int],
        *,
        served: str = "",
        experiments: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Note that all is here; from now on events that concern the slots are refused.

        `through`: the last sequence that the source needs, `served`: the position of its last
        prediction; `horizons`: of its sources.  Raises ConflictError: `import_gap`,
        `definitions_changed`, `experiments_differ`.
        """
        self._experiments.check_same(experiments or {})

        def seal(txn: WriteTransaction) -> None:
            found = _of(load_arriving(txn), move)
            if found.state == "sealed":
                return
            if found.through < through or found.served < served:
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
            note_left(txn, found.slots)
            self._note(txn, None)

        await self._write(forget)
        self._experiments.expect_none()
        await remove_outcomes(self._writer)
        await remove_rows(self._writer, found.slots)
        await self._remove_lists()
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

        if self._ownership.owns(found.slots):
            await self._recount.run()
        await self._write(finish)
        await self._remove_lists()
        return self.show()

    async def _remove_lists(self) -> None:
        for prefix in (SEQUENCES, UNITS, OUTCOMES):
            await remove_list(self._writer, prefix)

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
        if len(chunk.sequences):
            note_sequences(txn, int(txn.sequence) + 1 - len(chunk.sequences), chunk.sequences)
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
        if definitions_digest(self._state.catalog) != definitions:
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


@contextmanager
def _damaged() -> Iterator[None]:
    """Raise ValidationError(code="damaged_chunk") for whatever rubbish brings about."""
    try:
        yield
    except (MlpdError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValidationError(
            f"the history that came is damaged: {error}",
            code="damaged_chunk",
            hint="Run the same mlpd shard move again: it fetches this part anew.",
        ) from None


def _decode(data: bytes) -> Received | Served:
    fields = msgpack.unpackb(data)
    return decode_served(fields) if "served" in fields else decode_chunk(fields)


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
        whole = conform(columns, source.schema, record.count)
        if len(concerned_by(catalog, record.source)) > 1:
            add_sequences(txn, source, whole, int(txn.sequence) + 1)
        else:
            remember_ids(txn, source, whole)
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
