"""Reads through the cache: rows that are kept are not asked for, the others are, and then kept."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from mlpd.client.scatter import Topology
from mlpd.cluster.router.cache import HotKeys, Row, join_rows, split_answer
from mlpd.core.errors import MlpdError
from mlpd.core.hashing import definition_hash
from mlpd.core.routing import NO_SLOT, distinct, key_slots

ROWS_MAX = 100
"""Reads of more rows than this pass the cache by: they are no hot keys."""

Ask = Callable[[Sequence[Mapping[str, Any]]], Awaitable[dict[str, Any]]]
"""Reads rows from the shards."""


def is_cached(cache: HotKeys, fields: Mapping[str, Any]) -> bool:
    """Tell whether a read may be answered from the cache: it takes any moment of late."""
    asks_more = fields.keys() & {"at", "min_sequence", "cells"}
    plain = not asks_more and fields.get("on_stale") != "error"
    return bool(cache.max_age_s) and plain and 0 < len(fields["entities"]) <= ROWS_MAX


async def read_cached(
    cache: HotKeys,
    topology: Topology | None,
    kind: str,
    names: Sequence[str],
    fields: Mapping[str, Any],
    ask: Ask,
) -> dict[str, Any]:
    """Return a read's answer, its rows kept or asked for.

    `kind` and `names`: where the routing has the entities.  A read of what it doesn't have is
    passed on.  Raises what asking raises if no row is there.
    """
    rows = fields["entities"]
    slots = None if topology is None else _slots(topology, kind, names, rows)
    if slots is None:
        return await ask(rows)
    keys = _keys(fields)
    found: list[Row | None] = [cache.find(key) for key in keys]
    missing = [i for i, row in enumerate(found) if row is None]
    if not missing:
        return join_rows(found, ())
    stamps = [cache.stamp(slots[i]) for i in missing]
    try:
        answer = await ask([rows[i] for i in missing])
    except MlpdError as error:
        if len(missing) == len(rows):
            raise
        return join_rows(found, [{"index": i, **error.to_dict()} for i in missing])
    for i, stamp, row in zip(missing, stamps, split_answer(answer, len(missing)), strict=True):
        found[i] = row
        if row is not None:
            cache.keep(keys[i], slots[i], stamp, row)
    if len({row.layout for row in found if row is not None}) > 1:  # an apply came in between
        cache.forget()
        return await ask(rows)
    errors = [{**e, "index": missing[e["index"]]} for e in answer.get("errors", ())]
    return join_rows(found, errors)


def _slots(
    topology: Topology, kind: str, names: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> list[tuple[int, ...]] | None:
    """Return the slots of each row's keys; None for what the routing doesn't know."""
    named = getattr(topology.routing, kind)
    if not all(name in named for name in names):
        return None
    entities = distinct(entity for name in names for entity in named[name])
    columns = {c: [row.get(c) for row in rows] for e in entities for c in e.columns}
    found = [key_slots(entity, columns, len(rows)).tolist() for entity in entities]
    return [
        tuple(sorted({of_entity[i] for of_entity in found} - {NO_SLOT})) for i in range(len(rows))
    ]


def _keys(fields: Mapping[str, Any]) -> list[bytes]:
    """Return what tells one row of a read from all others."""
    asked = [fields.get(name) for name in ("service", "features", "request", "on_stale")]
    head = definition_hash(asked).encode()
    return [head + repr(sorted(row.items())).encode() for row in fields["entities"]]
