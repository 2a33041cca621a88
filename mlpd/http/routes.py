"""The one route table: method, path, scope and handler of everything the daemon serves.

`/openapi.json`, the access check, the docs and a test read this table; nothing is routed elsewhere.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from aiohttp import web

Scope = Literal["public", "read", "ingest", "predict", "admin"]
"""What a token must carry; `public` is health alone.  Until tokens exist the loopback bind guards
all of them alike.
"""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Body = Literal["none", "json", "rows", "any"]
"""What a route reads: nothing, JSON or msgpack, those or Arrow, anything."""


@dataclass(frozen=True, slots=True)
class Route:
    """One line of the table; the handler's docstring is its description in /openapi.json."""

    method: str
    path: str
    scope: Scope
    handler: Handler
    body: Body = "none"
