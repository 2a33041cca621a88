"""The form of the one route table: method, path, scope and handler of everything that is served.

`api.build_routes` is the table.  /openapi.json, the access check, the docs and the tests read it;
nothing is routed elsewhere.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from aiohttp import web

from mlpd.core.limits import AdaptiveLimit
from mlpd.http.shapes import NOTHING, Shape

Scope = Literal["public", "read", "ingest", "predict", "admin"]
"""What a token must carry; `public` is health alone.  Until tokens exist the loopback bind guards
all of them alike.
"""

Load = Literal["predict", "features", "ingest"]
"""Kinds of requests that come in crowds; those of `predict` and `features` change nothing."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    """One line of the table; the handler's docstring is its description in /openapi.json.

    `body`: of JSON or msgpack; None reads none.  `arrow`: whether an Arrow IPC stream may come
    instead.  `answer`: the fields of the answer, None when it is no object of JSON or msgpack but
    of the media types in `produces`.  `consumes`: media types of a body that is written to a file
    as it comes, under a limit of its own.  `load`: the crowd that it belongs to; None for health,
    administration and joins.  `limit`: that crowd's, where it is served.  `keeps_nothing`: a
    request that only computes or waits, although others of its scope do more.  `shared`: of several
    members of a cluster the arbiter answers.  `anywhere`: it is answered by whoever isn't the
    shard's owner, too.
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
    consumes: tuple[str, ...] = ()
    load: Load | None = None
    limit: AdaptiveLimit | None = None
    keeps_nothing: bool = False
    shared: bool = False
    anywhere: bool = False

    @property
    def abandonable(self) -> bool:
        """Whether work on it may be dropped half-way when its client has gone."""
        is_join = self.scope == "read" and bool(self.consumes)
        return is_join or self.keeps_nothing or self.load in ("predict", "features")
