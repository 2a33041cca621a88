"""The form of the one route table: method, path, scope and handler of everything that is served.

`api.build_routes` is the table.  /openapi.json, the access check, the docs and the tests read it;
nothing is routed elsewhere.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from aiohttp import web

from mlpd.http.shapes import NOTHING, Shape

Scope = Literal["public", "read", "ingest", "predict", "admin"]
"""What a token must carry; `public` is health alone.  Until tokens exist the loopback bind guards
all of them alike.
"""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    """One line of the table; the handler's docstring is its description in /openapi.json.

    `body`: of JSON or msgpack; None reads none.  `arrow`: whether an Arrow IPC stream may come
    instead.  `answer`: the fields of the answer, None when it is no object of JSON or msgpack but
    of the media types in `produces`.
    """

    method: str
    path: str
    scope: Scope
    handler: Handler
    body: Shape | None = None
    answer: Shape | None = None
    query: Shape = NOTHING
    arrow: bool = False
    produces: tuple[str, ...] = ()
