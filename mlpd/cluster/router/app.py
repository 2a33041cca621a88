"""The router: the daemon's route table with a way for each route, and what it needs to go it."""

import asyncio
import functools
import logging
import random
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from aiohttp import web

from mlpd.cluster.router.alerting import ALERTS_OVER, TESTED_OVER, AlertingHandlers
from mlpd.cluster.router.cache import HotKeys
from mlpd.cluster.router.erasures import (
    ERASURE_OVER,
    ERASURES_OVER,
    RECEIPT_OVER,
    ErasureHandlers,
)
from mlpd.cluster.router.event_pages import EventPageHandlers
from mlpd.cluster.router.everywhere import Everywhere
from mlpd.cluster.router.hedging import Hedging
from mlpd.cluster.router.logs import LogHandlers
from mlpd.cluster.router.members import Members
from mlpd.cluster.router.metrics import RouterMetrics
from mlpd.cluster.router.outcomes import OutcomeHandlers
from mlpd.cluster.router.own import OwnHandlers, check_ready, refusal
from mlpd.cluster.router.relay import Relay
from mlpd.cluster.router.rows import PREDICT_OVER, READ_OVER, RowHandlers
from mlpd.cluster.router.summed import STATUS_OVER, SummedHandlers
from mlpd.cluster.router.table import WAYS
from mlpd.cluster.router.watched import QUALITY_OVER, WatchedHandlers
from mlpd.core.config import ServerConfig
from mlpd.core.errors import ConfigurationError, MlpdError
from mlpd.core.limits import AdaptiveLimit
from mlpd.core.time import Clock, system_clock
from mlpd.http.admission import Turn, admit
from mlpd.http.api import describe_routes
from mlpd.http.openapi import build_openapi
from mlpd.http.routes import Handler, Route

REFRESH_S, RETRY_S = 5.0, 1.0
"""How often the map is fetched unasked, and while none is known."""

_log = logging.getLogger("mlpd.router")


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """What a router is told: URLs of some `shards`, and how it serves.

    `read_s`: what reads and predictions may take without a deadline.  `hedge_share`: of reads that
    may be asked twice, 0 for none.  `cache_age_s`: how long rows of features are kept, 0 for not
    at all; `cache_rows`: how many.
    """

    shards: tuple[str, ...]
    server: ServerConfig = field(default_factory=ServerConfig)
    read_s: float = 10.0
    hedge_share: float = 0.05
    cache_age_s: float = 0.0
    cache_rows: int = 10_000
    max_staleness_s: float | None = None


class Router:
    """Serves `routes` by asking shards; `start` and `stop` once each, on the loop."""

    def __init__(self, config: RouterConfig, clock: Clock = system_clock) -> None:
        hedging = Hedging(config.hedge_share)
        self.members = Members(
            config.shards, hedging, random.random, max_staleness_s=config.max_staleness_s
        )
        # A quarter, as of a deadline; each shard has limits of its own, which are tighter.
        kinds = ("predict", "features", "ingest")
        self.limits = {kind: AdaptiveLimit(config.read_s / 4.0) for kind in kinds}
        self.cache = HotKeys(config.cache_age_s, config.cache_rows)
        self.metrics = RouterMetrics(self.members, self.limits, self.cache)
        self._relay = Relay(self.members, self.cache.forget)
        self._rows = RowHandlers(self.members, self.cache, config.read_s)
        self._outcomes = OutcomeHandlers(self.members)
        self._logs = LogHandlers(self.members)
        self._event_pages = EventPageHandlers(self.members)
        everywhere = Everywhere(self.members)
        self._erasures = ErasureHandlers(everywhere)
        self._alerting = AlertingHandlers(everywhere)
        self._watched = WatchedHandlers(everywhere, self.members)
        self._summed = SummedHandlers(self.members, self.metrics.registry, clock)
        self._document: dict[str, Any] = {}
        self._own = OwnHandlers(self.members, self._document)
        self._turn = Turn()
        self._task: asyncio.Task[None] | None = None
        self.routes = self._build_routes()

    async def start(self) -> None:
        """Learn the map, once now and then again and again.

        Raises ConfigurationError for shards that can't be one cluster's; one that doesn't answer is
        asked again.
        """
        try:
            await self._learn()
            await self.members.check_given()
        except ConfigurationError:
            raise
        except MlpdError as error:
            _log.warning("no shard has told the map yet: %s", error.message)
        self._task = asyncio.create_task(self._learn_forever())

    def refuse(self) -> None:
        """Be ready for nothing any more."""
        self.members.is_stopping = True

    async def stop(self) -> None:
        """Stop learning, close all connections."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.members.close()

    async def _learn(self) -> None:
        await self.members.learn()
        if self.cache.max_age_s:
            self.cache.bound(await self.members.freshness_s())

    async def _learn_forever(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S if self.members.ready else RETRY_S)
            before = self.members.epoch
            with suppress(MlpdError):  # requests say what is wrong
                await self._learn()
            if self.members.epoch != before:
                _log.info("the map of epoch %d follows %d", self.members.epoch, before)

    def _build_routes(self) -> list[Route]:
        routes = [self._routed(route) for route in describe_routes()]
        self._document.update(build_openapi(routes))
        return routes

    def _routed(self, route: Route) -> Route:
        """Return the daemon's route with the router's handler, and what it takes and answers."""
        call = f"{route.method} {route.path}"
        way = WAYS.get(call, "refused")
        handler = self._handlers().get(call)
        if way == "refused":
            handler = _refuse
        elif way == "all":
            assert handler is not None
            handler = self._of_all(route, handler)
        elif handler is None:
            handler = functools.partial(getattr(self._relay, way), route=route)
        shapes = _SHAPES.get(call, {})
        limit = None if route.load is None else self.limits[route.load]
        return replace(route, handler=self._gated(route, handler, limit), limit=limit, **shapes)

    def _of_all(self, route: Route, handler: Handler) -> Handler:
        """Return a handler that asks all shards, or hands a request on as it is to the only one."""

        async def serve(request: web.Request) -> web.StreamResponse:
            try:
                if len(self.members.shards()) == 1:
                    return await self._relay.any(request, route=route)
                return await handler(request)
            finally:
                if route.method != "GET":
                    self.cache.forget()

        return serve

    def _gated(self, route: Route, handler: Handler, limit: AdaptiveLimit | None) -> Handler:
        """Return the handler so that it answers 503 until the map is known, or a crowd is full.

        Its description is the daemon's.
        """
        if route.scope == "public":
            return functools.wraps(route.handler)(_calling(handler))

        @functools.wraps(route.handler)
        async def serve(request: web.Request) -> web.StreamResponse:
            check_ready(self.members)
            if limit is None:
                return await handler(request)
            return await admit(request, handler, limit, self._turn)

        return serve

    def _handlers(self) -> Mapping[str, Handler]:
        own, rows, summed = self._own, self._rows, self._summed
        served = "/v2/models/{model}"
        return {
            "POST /v1/events": rows.send_many,
            "POST /v1/events/{source}": rows.send,
            "POST /v1/features/read": rows.read,
            "POST /v1/predict/{route}": rows.predict,
            "POST /v1/feedback": rows.feedback,
            "POST /v1/experiments/{name}/outcomes": self._outcomes.send,
            "GET /metrics": summed.metrics,
            "GET /v1/status": summed.status,
            "GET /v2/models/stats": summed.statistics,
            f"GET {served}/stats": summed.statistics,
            f"GET {served}/versions/{{version}}/stats": summed.statistics,
            **self._handlers_of_all(),
            "GET /healthz": own.alive,
            "GET /readyz": own.ready,
            "GET /v2/health/live": own.live_v2,
            "GET /v2/health/ready": own.ready_v2,
            "GET /v1/cluster/map": own.map,
            "GET /openapi.json": own.openapi,
            "GET /docs": own.docs,
            "GET /docs/{page:.+}": own.page,
        }

    def _handlers_of_all(self) -> Mapping[str, Handler]:
        erasures, alerting, watched = self._erasures, self._alerting, self._watched
        return {
            "GET /v1/events/{source}": self._event_pages.page,
            "GET /v1/predictions": self._logs.predictions,
            "GET /v1/freshness": watched.freshness,
            "GET /v1/quality": watched.quality,
            "POST /v1/registry/collect": watched.collect,
            "GET /v1/alerts": alerting.list,
            "POST /v1/alerts/silences": alerting.silence,
            "DELETE /v1/alerts/silences/{id}": alerting.unsilence,
            "POST /v1/alerts/test": alerting.test,
            "POST /v1/erase": erasures.erase,
            "GET /v1/erase": erasures.list,
            "GET /v1/erase/{order}": erasures.show,
        }


_SHAPES: Mapping[str, Mapping[str, Any]] = {
    "POST /v1/features/read": {"body": READ_OVER},
    "POST /v1/predict/{route}": {"body": PREDICT_OVER},
    "GET /v1/status": {"answer": STATUS_OVER},
    "GET /v1/quality": {"answer": QUALITY_OVER},
    "GET /v1/alerts": {"answer": ALERTS_OVER},
    "POST /v1/alerts/test": {"answer": TESTED_OVER},
    "POST /v1/erase": {"answer": RECEIPT_OVER},
    "GET /v1/erase": {"answer": ERASURES_OVER},
    "GET /v1/erase/{order}": {"answer": ERASURE_OVER},
}


def _calling(handler: Handler) -> Handler:
    """Return a handler of its own, to be described: a method can't be."""

    async def serve(request: web.Request) -> web.StreamResponse:
        return await handler(request)

    return serve


async def _refuse(request: web.Request) -> web.StreamResponse:
    raise refusal(request.method, request.path)
