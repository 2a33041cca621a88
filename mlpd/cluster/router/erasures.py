"""Erasing over shards: an event with the key may lie on each of them, so the order goes to all."""

import secrets
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from mlpd.client import requests as r
from mlpd.cluster.router.everywhere import (
    LIST_S,
    Everywhere,
    listed,
    missing,
    whole,
    with_missing,
)
from mlpd.core.errors import ConflictError, MlpdError, NotFoundError
from mlpd.core.hashing import canonical_json, sha256_digest
from mlpd.http.erase import ERASURE, ERASURES, ORDER, RECEIPT
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import read_fields, respond

_SUMS = (
    *("online_rows", "tile_rows", "event_ids", "predictions", "labels", "outcomes"),
    *("files_rewritten", "files_removed"),
)
_SEND_AGAIN = (
    "The others carry it out. Send the order again, without an id, when mlpd shard status shows "
    "that shard: all get it, and what is erased already stays so."
)
RECEIPT_OVER = Shape(
    {
        **RECEIPT.fields,
        "through_sequence": Field("object", "The cut, by shard."),
        "sources": Field("object", "Per source the rows of all shards, with copies of an event."),
        "parts": Field("rows", "Each shard's receipt: shard, and its fields."),
    }
)
ERASURE_OVER = with_missing(
    Shape({**ERASURE.fields, "parts": Field("object", "By shard how far it has come.")})
)
ERASURES_OVER = with_missing(ERASURES)


class ErasureHandlers:
    """Sends orders to all shards, under one id."""

    def __init__(self, everywhere: Everywhere) -> None:
        self._everywhere = everywhere

    async def erase(self, request: web.Request) -> web.Response:
        """Remove entities from all shards; answers with the receipt of all of them.

        Those that have registered the order carry it out whatever happens; if one has not, the
        error says so, and the order is to be sent again: to all, as a new one.
        """
        fields = await read_fields(request, ORDER)
        order = fields.pop("id") or secrets.token_hex(16)
        asked = r.call("POST", "v1", "erase", fields={**fields, "id": order}, repeatable=False)
        found = await self._everywhere.each(request, asked, r.LONG_S)
        again = [e for e in found.values() if isinstance(e, MlpdError) and _is_again(e)]
        if again:
            raise again[0]
        receipts = whole(found, "the erasure", hint=_SEND_AGAIN, erasure=order)
        return await respond(request, merge_receipts(receipts))

    async def list(self, request: web.Request) -> web.Response:
        """Return orders under way and all receipts, each with its shard."""
        found = await self._everywhere.each(request, r.get("v1", "erase"), LIST_S)
        lists = {name: listed(found, name) for name in ("open", "receipts")}
        lists["receipts"].sort(key=lambda receipt: receipt["finished"])
        return await respond(request, {**lists, "missing": missing(found)})

    async def show(self, request: web.Request) -> web.Response:
        """Return the receipt of all shards, or of one order how far each has come."""
        order = request.match_info["order"]
        found = await self._everywhere.each(request, r.get("v1", "erase", order), LIST_S)
        if all(isinstance(error, NotFoundError) for error in found.values()):
            raise next(iter(found.values()))
        gone = missing({n: v for n, v in found.items() if not isinstance(v, NotFoundError)})
        known = {n: v for n, v in found.items() if not isinstance(v, MlpdError)}
        receipts = {n: v["receipt"] for n, v in known.items() if v["receipt"] is not None}
        parts = {name: _step(value) for name, value in found.items()}
        done = len(receipts) == len(found)
        under_way = next((v["order"] for v in known.values() if v["order"] is not None), None)
        answer = {
            "order": under_way,
            "receipt": merge_receipts(receipts) if done else None,
            "parts": parts,
            "missing": gone,
        }
        return await respond(request, answer)


def merge_receipts(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the receipt of one order by the receipts of all shards: amounts are sums.

    Rows of sources count on each shard that had a copy of the event; what lies on one shard alone
    (online rows, tiles, predictions, labels, outcomes) counts once.
    """
    first = next(iter(found.values()))
    receipts = found.values()
    fields: dict[str, Any] = {
        **{name: first[name] for name in ("id", "entity", "keys", "key_digests", "caveats")},
        **{name: sum(receipt[name] for receipt in receipts) for name in _SUMS},
        "requested": min(receipt["requested"] for receipt in receipts),
        "finished": max(receipt["finished"] for receipt in receipts),
        "through_sequence": {name: receipt["through_sequence"] for name, receipt in found.items()},
        "sources": _merge_sources(found),
        "views_rebuilt": sorted(
            {view for receipt in receipts for view in receipt["views_rebuilt"]}
        ),
        "parts": [{"shard": name, **receipt} for name, receipt in found.items()],
    }
    return {**fields, "digest": sha256_digest(canonical_json(fields))}


def _merge_sources(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for shard, receipt in found.items():
        for source, part in receipt["sources"].items():
            known = merged.setdefault(
                source, {"rows": 0, "first_sequence": {}, "last_sequence": {}}
            )
            known["rows"] += part["rows"]
            for end in ("first_sequence", "last_sequence"):
                known[end][shard] = part[end]
    return merged


def _step(value: Any) -> str:
    if isinstance(value, MlpdError):
        return value.code
    return "done" if value["order"] is None else str(value["order"]["step"])


def _is_again(error: MlpdError) -> bool:
    return isinstance(error, ConflictError) and error.code == "known_erasure"
