"""Verb erase: an entity is removed from everything that the daemon holds; docs/paths/erase.md.

An order goes through its steps one by one.  Each ends in a transaction that also stores how far the
order has come, and can be done again, so a start goes on where a kill has left it.
"""

import asyncio
import logging
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import msgpack

from mlpd.core.columns import DType
from mlpd.core.convert import column_of
from mlpd.core.errors import (
    ConflictError,
    MlpdError,
    NotFoundError,
    OverloadedError,
    ValidationError,
)
from mlpd.core.hashing import canonical_json, sha256_digest
from mlpd.core.keys import encode_entity, online_keys
from mlpd.core.time import Clock, format_time
from mlpd.daemon.definitions import DefinitionsVerb
from mlpd.daemon.dropped import DroppedViews
from mlpd.daemon.prediction_files import PredictionFiles
from mlpd.daemon.predictions import Prediction, PredictionLog, prediction_key, scan_predictions
from mlpd.daemon.process import Child
from mlpd.daemon.state import CatalogState
from mlpd.daemon.unit_outcomes import forget_units
from mlpd.features.event_ids import forget
from mlpd.storage.compactor import Compactor
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.segments import Manifest, decode_manifest, remove_files, replace_manifests
from mlpd.storage.tables import Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

KEYS_MAX = 100
"""Keys of one order: their online rows go in one transaction, ten views' in 15 ms."""
WAITING_MAX = 16
"""Orders that wait for each other."""
PREDICTIONS_PER_WRITE = 64
IDS_PER_WRITE = 500
PAUSE_S = 0.02
"""Between two writes: what waits for the writer goes first."""
RETRY_S = 60.0
"""How long to wait after a failure, such as a full disk."""

CAVEATS = (
    "Backups taken before, and restores of them, still hold it.",
    "LMDB's free pages and the disk may hold former bytes until they are used again.",
    "Models trained before keep what they learned, and categories by name; so do folders of runs.",
    "Answers kept for a retry may quote refused rows for a day.",
    "Audits of other entities' predictions served before may differ where those rows counted.",
)
"""What the daemon does not reach: docs/paths/erase.md."""

T = TypeVar("T")
_PREFIX = b"erase/"
_ID = re.compile(r"[0-9a-f]{32}")
_log = logging.getLogger("mlpd.erase")


@dataclass(frozen=True, slots=True)
class Order:
    """An order under way; `step` is the one that comes next, `through` the cut."""

    id: str
    entity: str
    columns: list[list[str]]
    """Names of the key columns, each with its type."""
    keys: list[list[Any]]
    requested_us: int
    through: int = 0
    step: str = "rewrite"
    cleared: list[int] = field(default_factory=list)
    """Ids of views whose rows of these keys the registration removed."""
    online_rows: int = 0
    tile_rows: int = 0
    event_ids: int = 0
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    files_rewritten: int = 0
    files_removed: int = 0
    stale: list[str] = field(default_factory=list)
    """Files that no manifest names any more."""
    views: list[str] = field(default_factory=list)
    predictions: int = 0
    labels: int = 0
    outcomes: int = 0

    @property
    def cause(self) -> str:
        """What manifests call it."""
        return f"erase {self.id}"

    def entities(self) -> list[bytes]:
        """Return the entity bytes of the keys."""
        types = [DType(dtype) for _, dtype in self.columns]
        found = [encode_entity(types, key, self.entity) for key in self.keys]
        return [entity for entity in found if entity is not None]

    def is_of(self, prediction: Prediction) -> bool:
        """Tell whether a prediction was asked with one of the keys, or assigned by it."""
        given = [prediction.given.get(name) for name, _ in self.columns]
        return given in self.keys or [prediction.unit] in self.keys

    def units(self) -> list[str]:
        """Return the units of experiments that the keys are: those of one column, as text."""
        return [str(key[0]) for key in self.keys if len(key) == 1]

    def store(self, txn: WriteTransaction) -> "Order":
        """Keep the order as it is now; returns it."""
        txn.put(Table.META, _PREFIX + self.id.encode(), msgpack.packb(asdict(self)))
        return self


class Erase:
    """Carries orders out, one at a time; one instance per daemon, on the loop."""

    def __init__(
        self,
        environment: Environment,
        writer: Writer,
        state: CatalogState,
        definitions: DefinitionsVerb,
        compactor: Compactor,
        dropped: DroppedViews,
        predictions: PredictionLog,
        files: PredictionFiles,
        paths: DataDirectory,
        clock: Clock,
    ) -> None:
        self._environment = environment
        self._writer = writer
        self._state = state
        self._definitions = definitions
        self._compactor = compactor
        self._dropped = dropped
        self._predictions = predictions
        self._files = files
        self._paths = paths
        self._clock = clock
        self._tasks: set[asyncio.Task[dict[str, Any]]] = set()
        self._failed = asyncio.Event()

    async def run(
        self, entity: str, keys: Sequence[Mapping[str, Any]], *, order_id: str | None = None
    ) -> dict[str, Any]:
        """Erase entities by their keys, one object of key columns each; return the receipt.

        `order_id`: 32 hex digits, by which all members of a cluster know the order; None: drawn.
        Goes on if the caller goes away.  Raises NotFoundError(code="unknown_entity"),
        ValidationError, ConflictError(code="known_erasure"),
        OverloadedError(code="erase_queue_full"), and what a step raises: the order stays then, with
        its id in the error's details, and is tried again.
        """
        order = self._order(entity, keys, secrets.token_hex(16) if order_id is None else order_id)
        if len(self._tasks) >= WAITING_MAX:
            raise OverloadedError(
                f"{WAITING_MAX} orders to erase are waiting", code="erase_queue_full"
            )
        task = asyncio.create_task(self._carry_out(order))
        self._tasks.add(task)
        task.add_done_callback(self._end)
        return await asyncio.shield(task)

    async def resume_forever(self) -> None:
        """Finish what a former process, or a failure, has left; cancel it at any time."""
        while True:
            self._failed.clear()
            try:
                await self.resume()
            except MlpdError as error:
                _log.warning("an erasure could not go on: %s", error.message)
                await asyncio.sleep(RETRY_S)
            else:
                await self._failed.wait()

    async def resume(self) -> None:
        """Finish all orders that are registered."""
        for found in self.list()["open"]:
            async with self._definitions.exclusive(), self._compactor.paused():
                stored = self._load(found["id"])
                if "step" in stored:
                    await self._finish(Order(**stored))

    async def stop(self) -> None:
        """Leave what is under way to the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def list(self) -> dict[str, Any]:
        """Return orders under way, without their keys, and all receipts, the oldest first."""
        with self._environment.snapshot() as snapshot:
            rows = [value for _, value in snapshot.scan(Table.META, _PREFIX, _PREFIX + b"g")]
        found = [msgpack.unpackb(value) for value in rows]
        receipts = [fields for fields in found if "step" not in fields]
        return {
            "open": [_progress(fields) for fields in found if "step" in fields],
            "receipts": sorted(receipts, key=lambda receipt: receipt["finished"]),
        }

    def get(self, order_id: str) -> dict[str, Any]:
        """Return an `order` under way, or its `receipt`; raises NotFoundError."""
        fields = self._load(order_id)
        if "step" in fields:
            return {"order": _progress(fields), "receipt": None}
        return {"order": None, "receipt": fields}

    def _load(self, order_id: str) -> dict[str, Any]:
        with self._environment.snapshot() as snapshot:
            stored = snapshot.get(Table.META, _PREFIX + order_id.encode()[:64])
        if stored is None:
            raise NotFoundError(
                f"there is no erasure {order_id!r}",
                code="unknown_erasure",
                hint="GET /v1/erase lists all.",
            )
        fields: dict[str, Any] = msgpack.unpackb(stored)
        return fields

    def _order(self, entity: str, keys: Sequence[Mapping[str, Any]], order_id: str) -> Order:
        if not _ID.fullmatch(order_id):
            raise ValidationError(
                f"the id of an order is {order_id[:60]!r}, not 32 hex digits",
                code="wrong_order_id",
                hint="Leave it out, and one is drawn.",
            )
        spec = self._state.catalog.definitions.entity(entity)
        if not 1 <= len(keys) <= KEYS_MAX:
            raise ValidationError(
                f"an order has 1 to {KEYS_MAX} keys, this one {len(keys)}",
                code="wrong_number_of_keys",
                hint="Send several orders.",
            )
        for key in keys:
            if key.keys() != set(spec.columns):
                raise ValidationError(
                    f"a key of entity {entity!r} has {', '.join(spec.columns)}, "
                    f"got {', '.join(map(str, key)) or 'nothing'}",
                    code="wrong_entity_key",
                )
        columns = [
            column_of(dtype, [key[name] for key in keys], f"key {name!r}").to_list()
            for name, dtype in spec.keys
        ]
        rows = [*map(list, dict.fromkeys(zip(*columns, strict=True)))]
        if any(None in row for row in rows):
            raise ValidationError(
                f"a key of entity {entity!r} is null", code="wrong_entity_key", hint="It is none."
            )
        typed = [[name, str(dtype)] for name, dtype in spec.keys]
        return Order(order_id, entity, typed, rows, self._clock())

    def _end(self, task: "asyncio.Task[dict[str, Any]]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failed.set()

    async def _carry_out(self, order: Order) -> dict[str, Any]:
        async with self._definitions.exclusive(), self._compactor.paused():
            self._predictions.flush()
            registered = await self._writer.write(partial(self._register, order=order))
            try:
                return await self._finish(registered)
            except MlpdError as error:
                error.details["erasure"] = order.id
                raise

    def _register(self, txn: WriteTransaction, *, order: Order) -> Order:
        """Fix the cut, and remove the rows of the entity's own views as of it."""
        if txn.get(Table.META, _PREFIX + order.id.encode()) is not None:
            raise ConflictError(
                f"there is an erasure {order.id} already",
                code="known_erasure",
                hint="GET /v1/erase/{order} shows it; to erase once more leave the id out.",
            )
        keys = tuple(tuple(column) for column in order.columns)
        own = [
            view.view_id
            for view in self._state.catalog_in(txn).running
            if tuple((name, str(dtype)) for name, dtype in view.entity.keys) == keys
        ]
        rows = online_keys(own, order.entities())
        online = sum(txn.delete(Table.ONLINE, key) for key in rows)
        tiles = sum(txn.delete(Table.TILES, key) for key in rows)
        return replace(
            order, through=txn.sequence, cleared=own, online_rows=online, tile_rows=tiles
        ).store(txn)

    async def _finish(self, order: Order) -> dict[str, Any]:
        if order.step == "rewrite":
            order = await self._rewrite(order)
        if order.step == "rebuild":
            order = await self._rebuild(order)
        await self._dropped.run()
        order = await self._remove_predictions(order)
        order = await self._writer.write(partial(_remove_outcomes, order=order))
        receipt = self._receipt(order)
        key, packed = _PREFIX + order.id.encode(), msgpack.packb(receipt)
        await self._writer.write(lambda txn: txn.put(Table.META, key, packed))
        return receipt

    async def _rewrite(self, order: Order) -> Order:
        await self._compactor.compact_through(order.through)
        sources = self._state.catalog.definitions.sources
        request = {
            "directory": str(self._paths.root),
            "columns": order.columns,
            "keys": order.keys,
            "through": order.through,
            "cause": order.cause,
            "event_ids": {
                name: [source.event_id, str(source.schema[source.event_id])]
                for name, source in sources.items()
                if source.event_id is not None
            },
        }
        done = await self._run_child(request)
        for source, ids in done["event_ids"].items():
            for part in _batched(ids, IDS_PER_WRITE):
                write = partial(_forget, order=order, source=source, ids=part)
                order = await self._writer.write(write)
                await asyncio.sleep(PAUSE_S)
        manifests = [decode_manifest(encoded) for encoded in done["manifests"]]
        return await self._writer.write(partial(_switch, order=order, manifests=manifests))

    async def _run_child(self, request: dict[str, Any]) -> dict[str, Any]:
        async with Child("erase", request) as child:
            done: dict[str, Any] = await child.result()
            return done

    async def _rebuild(self, order: Order) -> Order:
        """Remove the old files, and build anew the views of other entities that read them."""
        await self._compactor.remove_replaced()
        await asyncio.to_thread(remove_files, self._paths.segments, order.stale)
        views = {
            view.view_id: view.view.name
            for view in self._state.catalog.running
            if view.view.source in order.sources and view.view_id not in order.cleared
        }
        done = replace(order, step="predictions", stale=[], views=sorted(views.values()))
        if views:
            await self._definitions.rebuild(views, done.store)
        else:
            await self._writer.write(done.store)
        return done

    async def _remove_predictions(self, order: Order) -> Order:
        await self._writer.write(lambda _: None)  # what was flushed is stored now
        found = scan_predictions(self._environment)
        while (rows := await asyncio.to_thread(next, found, None)) is not None:
            ids = [p.prediction_id for p, _ in rows if order.is_of(p)]
            order = await self._remove_ids(order, ids)
        # Those in files last: a kill before the switch finds them there again.
        ids, files = await self._files.erase([name for name, _ in order.columns], order.keys)
        order = await self._remove_ids(order, ids)
        await self._files.switch(files)
        return order

    async def _remove_ids(self, order: Order, ids: Sequence[str]) -> Order:
        for part in _batched(ids, PREDICTIONS_PER_WRITE):
            order = await self._writer.write(partial(_remove, order=order, ids=part))
            await asyncio.sleep(PAUSE_S)
        return order

    def _receipt(self, order: Order) -> dict[str, Any]:
        salt = order.id.encode() + b":"
        fields: dict[str, Any] = {
            "id": order.id,
            "entity": order.entity,
            "keys": len(order.keys),
            "key_digests": [sha256_digest(salt + entity) for entity in order.entities()],
            "requested": format_time(order.requested_us),
            "finished": format_time(self._clock()),
            "through_sequence": order.through,
            **{name: getattr(order, name) for name in _COUNTED},
            "views_rebuilt": order.views,
            "caveats": [*CAVEATS],
        }
        return {**fields, "digest": sha256_digest(canonical_json(fields))}


_COUNTED = (
    *("sources", "online_rows", "tile_rows", "event_ids", "predictions", "labels", "outcomes"),
    *("files_rewritten", "files_removed"),
)


def _remove_outcomes(txn: WriteTransaction, *, order: Order) -> Order:
    removed = forget_units(txn, order.units())
    return replace(order, outcomes=order.outcomes + removed).store(txn)


def _forget(txn: WriteTransaction, *, order: Order, source: str, ids: list[bytes]) -> Order:
    known = forget(txn, source, ids)
    return replace(order, event_ids=order.event_ids + known).store(txn)


def _switch(txn: WriteTransaction, *, order: Order, manifests: Sequence[Manifest]) -> Order:
    stale = replace_manifests(txn, manifests)
    new = sum(s.path.endswith(f".{m.revision}.parquet") for m in manifests for s in m.segments)
    old = sum(path.endswith(".parquet") for path in stale)
    return replace(
        order,
        step="rebuild",
        sources=_sources(order.cause, manifests),
        files_rewritten=new,
        files_removed=old - new,
        stale=stale,
    ).store(txn)


def _sources(cause: str, manifests: Sequence[Manifest]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for removal in (r for manifest in manifests for r in manifest.removed if r.cause == cause):
        known = found.get(removal.source)
        found[removal.source] = {
            "rows": removal.rows + (known["rows"] if known else 0),
            "first_sequence": min(
                removal.first_sequence, known["first_sequence"] if known else removal.first_sequence
            ),
            "last_sequence": max(
                removal.last_sequence, known["last_sequence"] if known else removal.last_sequence
            ),
        }
    return found


def _remove(txn: WriteTransaction, *, order: Order, ids: list[str]) -> Order:
    keys = [prediction_key(prediction_id) for prediction_id in ids]
    predictions = sum(txn.delete(Table.PREDICTIONS, key) for key in keys)
    labels = sum(txn.delete(Table.LABELS, key) for key in keys)
    return replace(
        order, predictions=order.predictions + predictions, labels=order.labels + labels
    ).store(txn)


def _batched(items: Sequence[T], size: int) -> Iterator[list[T]]:
    return ([*items[start : start + size]] for start in range(0, len(items), size))


def _progress(fields: Mapping[str, Any]) -> dict[str, Any]:
    requested = format_time(fields["requested_us"])
    return {
        "id": fields["id"],
        "entity": fields["entity"],
        "keys": len(fields["keys"]),
        "requested": requested,
        "through_sequence": fields["through"],
        "step": fields["step"],
    }
