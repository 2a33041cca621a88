"""Everywhere: one question to all shards, and what becomes of those that don't answer.

What is listed shows who is missing; what adds up, or is to be done by all, needs all of them.
"""

from collections.abc import Mapping
from typing import Any

from aiohttp import web

from mlpd.client import requests as r
from mlpd.cluster.router.members import Members
from mlpd.cluster.router.upstream import Until
from mlpd.core.errors import MlpdError, UnavailableError
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import BY, read_deadline

LIST_S = 5.0
"""What a list may take of a shard without a deadline; later it is shown as missing."""

ASK_AGAIN = (
    "What the others have alone would pass for the whole; ask again when mlpd shard status shows "
    "that shard."
)
Answers = Mapping[str, Any]
"""By shard the value of its answer."""

MISSING = Field("rows", "Shards that gave no answer: shard, code, message. What they have lacks.")


class Everywhere:
    """Asks all shards of a router's map."""

    def __init__(self, members: Members) -> None:
        self._members = members

    async def each(self, request: web.Request, asked: r.Request, seconds: float) -> dict[str, Any]:
        """Return by shard the value of its answer, or its error; within the caller's deadline."""
        until = Until.after(seconds, read_deadline(request))
        return await self._members.ask_all(as_asked(request, asked), until)

    async def all(
        self, request: web.Request, asked: r.Request, seconds: float, what: str
    ) -> Answers:
        """Return every shard's answer; raises as `whole`."""
        return whole(await self.each(request, asked, seconds), what)


def as_asked(request: web.Request, asked: r.Request) -> r.Request:
    """Return what is asked of shards, by whoever asks the router."""
    by = {BY: request.headers[BY]} if BY in request.headers else {}
    return r.Request(
        *(asked.method, asked.path, asked.body),
        headers={**asked.headers, **by},
        repeatable=asked.repeatable,
    )


def whole(found: Mapping[str, Any], what: str, *, hint: str = ASK_AGAIN, **details: Any) -> Answers:
    """Return the answers if there are all.

    Raises the first shard's refusal, with its name, else UnavailableError(code="part_missing") with
    the `hint` for the first that can't be asked; `details`: also told.
    """
    failed = {name: error for name, error in found.items() if isinstance(error, MlpdError)}
    if not failed:
        return found
    told = {"done": [name for name in found if name not in failed], **details}
    for name, error in failed.items():
        if not isinstance(error, UnavailableError):
            error.details.update({"shard": name, **told})
            raise error
    name, error = next(iter(failed.items()))
    raise UnavailableError(
        f"shard {name} doesn't give its part of {what}: {error.message}",
        code="part_missing",
        hint=hint,
        details={"shard": name, "why": error.code, **told},
    )


def listed(found: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    """Return the rows of all answers under `field`, each with its `shard` first."""
    return [
        {"shard": name, **row}
        for name, value in found.items()
        if not isinstance(value, MlpdError)
        for row in value[field]
    ]


def missing(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return which shards gave no answer, and why; raises the first reason if none gave one."""
    failed = {name: error for name, error in found.items() if isinstance(error, MlpdError)}
    if failed and len(failed) == len(found):
        raise next(iter(failed.values()))
    return [
        {"shard": name, "code": error.code, "message": error.message}
        for name, error in failed.items()
    ]


def with_missing(shape: Shape) -> Shape:
    """Return the shape of a list over all shards."""
    return Shape({**shape.fields, "missing": MISSING})
