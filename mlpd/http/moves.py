"""Handlers of moving slots: what leaves this shard, and what arrives.

`mlpd shard move` calls them in the order that docs/decisions/moving-slots.md tells.
"""

from typing import Any

from aiohttp import web

from mlpd.core.convert import INT64_MAX
from mlpd.core.errors import ConflictError, ValidationError
from mlpd.core.names import check_name
from mlpd.core.time import parse_time
from mlpd.daemon.app import Daemon
from mlpd.daemon.leaving import Since
from mlpd.daemon.moved_predictions import BASE, POSITION_BYTES_MAX, TAIL
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import read_fields, respond
from mlpd.storage.moves_store import LeavingState

_SLOTS = Field("text", "Ascending slots and runs of them: 0-99 200.", required=True)
_MOVE = Field("text", "The move's id.", required=True)
_STATES: dict[str, LeavingState] = {"pause": "paused", "leave": "leaving", "cancel": "cancelling"}

MOVES = Shape(
    {
        "leaving": Field("object", "What leaves: move, slots, shard, state, sequence; or null."),
        "arriving": Field("object", "What arrives: the same, through, rows; or null."),
    }
)
LEFT = Shape(
    {
        **MOVES.fields,
        "experiments": Field("object", "Digests of those with units here, to begin and to pause."),
        "removed": Field("integer", "Rows that went, to finish."),
    }
)
SURVEY = Shape({"slots": _SLOTS})
SURVEYED = Shape(
    {
        "parts": Field("rows", "What moves at once: slots, their online rows, predictions."),
        "rows": Field("integer", "Online rows in all."),
        "predictions": Field("integer", "Served rows in all."),
        "size_bytes": Field("integer", "About what the log and online rows take here."),
        "definitions": Field("text", "Digest of those that run."),
    }
)
DIGEST = Shape(
    {
        "slots": _SLOTS,
        "at": Field("time", "Of the reads; by default now."),
        "since": Field("integer", "Sequence behind which slots count as touched."),
        "after": Field("text", "Likewise the position of predictions; needed with `since`."),
        "touched": Field("flag", "With `since`: of touched slots alone; else of the others."),
    }
)
DIGESTED = Shape(
    {
        "slots": Field("text", "Of which slots it is."),
        "digest": Field("text", "16 hex digits over all that can be read of the slots."),
        "rows": Field("integer", "Online rows of views that run."),
        "at": Field("time", "The moment of the reads."),
        "horizons": Field("object", "By source, before which time history is gone."),
        "served": Field("text", "16 hex digits over predictions and labels of the slots."),
        "predictions": Field("integer", "How many of both there are."),
    }
)
LEAVING = Shape(
    {
        "step": Field(
            "text",
            "What is to be done.",
            required=True,
            choices=("begin", "pause", "leave", "cancel", "finish"),
        ),
        "move": _MOVE,
        "slots": Field("text", "To begin: which."),
        "shard": Field("text", "To begin: where they go."),
    }
)
PREDICTIONS = Shape(
    {"move": _MOVE, "after": Field("text", "Position behind which it begins.", required=True)}
)
HISTORY = Shape(
    {"move": _MOVE, "after": Field("integer", "Sequence behind which it begins.", required=True)}
)
CHUNK = Shape({"chunk": Field("any", "Records of the history, as bytes.")})
ARRIVING = Shape(
    {
        "step": Field(
            "text",
            "What is to be done.",
            required=True,
            choices=("begin", "seal", "cancel", "finish"),
        ),
        "move": _MOVE,
        "slots": Field("text", "To begin: which."),
        "shard": Field("text", "To begin: where they come from."),
        "definitions": Field("text", "To begin: digest of those of the source."),
        "experiments": Field("object", "To begin, to seal: digests of the source's, by name."),
        "size_bytes": Field("integer", "To begin: about what the source holds."),
        "dry_run": Field("flag", "To begin: change nothing, say what would be refused."),
        "through": Field("integer", "To seal: the last sequence of the source that is needed."),
        "horizons": Field("object", "To seal: those of the source."),
        "served": Field("text", "To seal: position of the source's last prediction."),
    }
)
IMPORT = Shape({"move": _MOVE, "chunk": Field("any", "What `history` answered.", required=True)})


class MoveHandlers:
    """Moves slots between shards."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def show(self, request: web.Request) -> web.Response:
        """Return what leaves this shard and what arrives, and how far it is."""
        return await respond(request, self._daemon.departures.show())

    async def survey(self, request: web.Request) -> web.Response:
        """Return what moving slots away would move, or why they can't; changes nothing."""
        fields = await read_fields(request, SURVEY)
        return await respond(request, await self._daemon.departures.survey(fields["slots"]))

    async def digest(self, request: web.Request) -> web.Response:
        """Return a digest over all features of all entities in slots; equal where reads are."""
        fields, since = await read_fields(request, DIGEST), None
        if fields["since"] is not None:
            sequence = _sequence("since", fields["since"])
            since = Since(sequence, _position(fields["after"] or ""), bool(fields["touched"]))
        found = await self._daemon.departures.digest(fields["slots"], fields["at"], since)
        return await respond(request, found)

    async def leave(self, request: web.Request) -> web.Response:
        """Make the source take a step of a move; one that was taken may be asked for again."""
        fields = await read_fields(request, LEAVING)
        step, move, departures = fields["step"], fields["move"], self._daemon.departures
        if step == "begin":
            self._refuse_erasures()
            asked = _needed(fields, "slots", "shard")
            return await respond(request, await departures.begin(move, *asked))
        if step == "finish":
            return await respond(request, await departures.finish(move))
        return await respond(request, await departures.go_on(move, _STATES[step]))

    async def history(self, request: web.Request) -> web.Response:
        """Return the history of the slots that leave, behind a sequence, chunk by chunk."""
        fields = await read_fields(request, HISTORY)
        after = _sequence("after", fields["after"])
        chunk = await self._daemon.departures.events(fields["move"], after)
        return await respond(request, {"chunk": chunk})

    async def predictions(self, request: web.Request) -> web.Response:
        """Return the prediction log of the slots that leave, behind a position, by chunks."""
        fields = await read_fields(request, PREDICTIONS)
        after = _position(fields["after"])
        chunk = await self._daemon.departures.predictions(fields["move"], after)
        return await respond(request, {"chunk": chunk})

    async def arrive(self, request: web.Request) -> web.Response:
        """Make the target take a step of a move; one that was taken may be asked for again."""
        fields = await read_fields(request, ARRIVING)
        step, move, arrivals = fields["step"], fields["move"], self._daemon.arrivals
        if step == "begin":
            self._refuse_erasures()
            slots, shard, definitions = _needed(fields, "slots", "shard", "definitions")
            answer = await arrivals.begin(
                move,
                slots,
                shard,
                definitions=definitions,
                experiments=fields["experiments"],
                size_bytes=fields["size_bytes"] or 0,
                dry_run=bool(fields["dry_run"]),
            )
        elif step == "seal":
            (through,) = _needed(fields, "through")
            horizons = _horizons(fields["horizons"] or {})
            answer = await arrivals.seal(
                move,
                _sequence("through", through),
                horizons,
                served=_position(fields["served"] or "").hex(),
                experiments=fields["experiments"],
            )
        elif step == "cancel":
            answer = await arrivals.cancel(move)
        else:
            answer = await arrivals.finish(move)
        return await respond(request, answer)

    async def take(self, request: web.Request) -> web.Response:
        """Store a chunk of history of slots that arrive; durable when answered."""
        fields = await read_fields(request, IMPORT)
        return await respond(
            request, await self._daemon.arrivals.take(fields["move"], fields["chunk"])
        )

    def _refuse_erasures(self) -> None:
        if self._daemon.erase.list()["open"]:
            raise ConflictError(
                "an entity is being erased here",
                code="erasure_under_way",
                hint="Wait for it, mlpd features erasures shows it, and begin again.",
            )


def _needed(fields: dict[str, Any], *names: str) -> list[Any]:
    for name in names:
        if fields[name] is None:
            raise ValidationError(f"{name!r} is missing for this step", code="missing_field")
    return [fields[name] for name in names]


def _sequence(name: str, value: int) -> int:
    if not 0 <= value <= INT64_MAX:
        raise ValidationError(
            f"{name!r} is {value}, which is no sequence",
            code="invalid_sequence",
            hint="0, for none, up to the newest one of the source.",
        )
    return value


def _position(text: str) -> bytes:
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b"?"
    if found and (found[:1] not in (BASE, TAIL) or len(found) > POSITION_BYTES_MAX):
        raise ValidationError(
            f"{text[:60]!r} is no position",
            code="invalid_position",
            hint="Empty, to begin, or the one that the chunk before ended at, in hex.",
        )
    return found


def _horizons(given: dict[str, Any]) -> dict[str, int]:
    return {
        check_name(source, "source"): parse_time(before, f"the horizon of {source!r}")
        for source, before in given.items()
    }
