"""Outcomes by unit over shards: each goes to the one member that has the unit, as all are asked."""

from collections.abc import Sequence
from typing import Any

from aiohttp import web

from mlpd.client import requests as r
from mlpd.client.scatter import Gathered, Piece, moved, raise_unconfirmed
from mlpd.client.topology import Calls
from mlpd.cluster.router.members import Members
from mlpd.cluster.router.rows import LARGE_ROWS, WRITE_S
from mlpd.cluster.router.upstream import Until
from mlpd.core.errors import InvalidRequestError, MlpdError, NotFoundError, TooLargeError
from mlpd.core.shards import Shard
from mlpd.daemon.unit_outcomes import UNKNOWN, check_number, is_sound
from mlpd.http.experiments import OUTCOMES
from mlpd.http.wire import read_deadline, read_fields, respond

_WRONG = (InvalidRequestError, NotFoundError, TooLargeError)
"""Errors of a call as a whole: every member would say the same."""


class OutcomeHandlers:
    """Sends outcomes on; one per router."""

    def __init__(self, members: Members) -> None:
        self._members = members

    async def send(self, request: web.Request) -> web.Response:
        """Store what became of units, each where its predictions are.

        A unit that is nowhere is refused, if all members could be asked.
        """
        until = Until.after(WRITE_S, read_deadline(request))
        outcomes = (await read_fields(request, OUTCOMES))["outcomes"]
        check_number(outcomes)
        large = len(outcomes) > LARGE_ROWS
        calls = send_outcomes(self._members.shards(), request.match_info["name"], outcomes)
        answer = await self._members.run(calls, until, large=large)
        return await respond(request, answer, large=large or None)


def send_outcomes(
    shards: Sequence[Shard], name: str, outcomes: Sequence[Any]
) -> Calls[dict[str, Any]]:
    """Store outcomes of an experiment; `shards`: all, in the order of the map.

    Where several have a unit, the one that holds an outcome of its id takes it, else the first: so
    the same id replaces what it said before.  Raises what a daemon does for all of them, and the
    first failure where a member that couldn't be asked may have a unit, naming the outcomes.
    """
    if len(shards) == 1:
        (outcome,) = yield [(shards[0].url, _store(name, outcomes))]
        if isinstance(outcome, MlpdError):
            raise outcome
        return dict(outcome)
    done = Gathered()
    pieces = yield from _place(shards, name, outcomes, done)
    answers = yield [(piece.shard.url, piece.request) for piece in pieces]
    for piece, answer in zip(pieces, answers, strict=True):
        if isinstance(answer, _WRONG):
            raise answer
        if isinstance(answer, MlpdError):
            done.fail(piece.rows, answer)
        else:
            done.add(piece, answer)
    raise_unconfirmed(done, len(outcomes), "outcomes")
    merged: dict[str, Any] = {
        count: sum(answer[count] for _, answer in done.answers)
        for count in ("accepted", "replaced")
    }
    rejected = [row for p, answer in done.answers for row in moved(answer["rejected"], p.rows)]
    return {**merged, "rejected": sorted(rejected, key=lambda row: row["index"])}


def _place(
    shards: Sequence[Shard], name: str, outcomes: Sequence[Any], done: Gathered
) -> Calls[list[Piece]]:
    """Return who gets which; outcomes that a silent member may be waiting for fail in `done`."""
    sound = [row for row, outcome in enumerate(outcomes) if is_sound(outcome)]
    pairs = [[outcomes[row]["unit"], outcomes[row]["id"]] for row in sound]
    asked = {"what": "units", "fields": {"name": name, "outcomes": pairs}}
    found = yield [
        (shard.url, r.call("POST", "v1", "cluster", "parts", fields=asked)) for shard in shards
    ]
    for answer in found:
        if isinstance(answer, _WRONG):
            raise answer
    silent = next((answer for answer in found if isinstance(answer, MlpdError)), None)
    known = [None if isinstance(answer, MlpdError) else answer["part"] for answer in found]
    # What is refused anyway, or is nowhere, is told by the first that answers.
    first = next((place for place, part in enumerate(known) if part is not None), 0)
    by_place: dict[int, list[int]] = {}
    where = dict.fromkeys(range(len(outcomes)), first)
    for place, row in enumerate(sound):
        told = [UNKNOWN if part is None else part[place] for part in known]
        if max(told) > UNKNOWN:
            where[row] = told.index(max(told))
        elif silent is not None:
            done.fail([row], silent)
            del where[row]
    for row, shard in where.items():
        by_place.setdefault(shard, []).append(row)
    if not outcomes:
        by_place[first] = []
    return [
        Piece(shards[place], _store(name, [outcomes[row] for row in rows]), rows)
        for place, rows in sorted(by_place.items())
    ]


def _store(name: str, outcomes: Sequence[Any]) -> r.Request:
    return r.call("POST", "v1", "experiments", name, "outcomes", fields={"outcomes": [*outcomes]})
