"""Handlers of erasures: an entity removed from everything, receipts; docs/paths/erase.md."""

from aiohttp import web

from mlpd.core.errors import ConflictError
from mlpd.daemon.app import Daemon
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import read_fields, respond

ORDER = Shape(
    {
        "entity": Field("text", "The entity, as defined.", required=True),
        "keys": Field("table", "1 to 100 keys, as rows or columns.", required=True),
        "id": Field("text", "Of the order, 32 hex digits, never used before; drawn by default."),
    }
)
RECEIPT = Shape(
    {
        "id": Field("text", "Of the order."),
        "entity": Field("text", "The entity."),
        "keys": Field("integer", "How many keys the order had."),
        "requested": Field("time", "When it was asked for."),
        "through_sequence": Field("integer", "The cut: later events are new ones and stay."),
        "key_digests": Field("texts", "Per key the SHA-256 of `id:entity bytes`."),
        "finished": Field("time", "When nothing was left."),
        "sources": Field("object", "Per source rows, first_sequence and last_sequence."),
        "online_rows": Field("integer", "Online rows removed at once."),
        "tile_rows": Field("integer", "Rows of older tiles removed at once."),
        "event_ids": Field("integer", "Event ids removed."),
        "predictions": Field("integer", "Served predictions removed."),
        "labels": Field("integer", "Labels of these removed."),
        "outcomes": Field("integer", "Outcomes of such units of experiments removed."),
        "files_rewritten": Field("integer", "Segments written anew."),
        "files_removed": Field("integer", "Segments of which nothing was left."),
        "views_rebuilt": Field("texts", "Views of other entities, built anew from the log."),
        "caveats": Field("texts", "What the daemon does not reach."),
        "digest": Field("text", "SHA-256 of the canonical JSON of all other fields."),
    }
)
ERASURE = Shape(
    {
        "order": Field("object", "An order under way, with the step that comes next, or null."),
        "receipt": Field("object", "Its receipt once nothing is left, or null."),
    }
)
ERASURES = Shape(
    {
        "open": Field("rows", "Orders under way, with the step that comes next."),
        "receipts": Field("rows", "All receipts, the oldest first."),
    }
)


class EraseHandlers:
    """Erases entities."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def erase(self, request: web.Request) -> web.Response:
        """Remove entities from the log, segments, features and served predictions.

        Answers with the receipt when nothing is left.  An order that was registered is carried out
        whatever happens: after a failure, or a crash, it goes on by itself.
        """
        fields = await read_fields(request, ORDER)
        moves = self._daemon.ownership.moves
        if moves.leaving is not None or moves.arriving is not None:
            raise ConflictError(
                "slots move just now: what was erased here could come back with them",
                code="move_under_way",
                hint="When the move is done, send the order again to every shard, also to those "
                "that have carried it out: the entity may have come back there.",
            )
        order = fields["entity"], fields["keys"]
        receipt = await self._daemon.erase.run(*order, order_id=fields["id"])
        return await respond(request, receipt)

    async def list(self, request: web.Request) -> web.Response:
        """Return orders under way and all receipts."""
        return await respond(request, self._daemon.erase.list())

    async def show(self, request: web.Request) -> web.Response:
        """Return a receipt, or how far its order has come."""
        return await respond(request, self._daemon.erase.get(request.match_info["order"]))
