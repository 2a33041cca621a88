"""The one route table: everything that the daemon serves, each with its scope and its shapes."""

import functools
from dataclasses import replace
from typing import Any

from aiohttp import web

from mlpd.core.errors import UnavailableError
from mlpd.core.media import ARROW, JSON, MSGPACK, PARQUET
from mlpd.daemon.app import Daemon
from mlpd.http import definitions as _definitions
from mlpd.http import events as _events
from mlpd.http import experiments as _experiments
from mlpd.http import features as _features
from mlpd.http import maintenance as _maintenance
from mlpd.http import models as _models
from mlpd.http import monitoring as _monitoring
from mlpd.http import operation as _operation
from mlpd.http import predict as _predict
from mlpd.http import routes_api as _routes
from mlpd.http import training as _training
from mlpd.http.batches import BATCH
from mlpd.http.oip import InferenceHandlers
from mlpd.http.openapi import build_openapi
from mlpd.http.routes import Handler, Route


def build_routes(daemon: Daemon) -> list[Route]:
    """Return the table for `daemon`, which needn't have started: until then it answers 503.

    Only `public` routes, which are about health, answer while it is starting or stopping.
    """
    document: dict[str, Any] = {}
    routes = [
        *_build_store(daemon),
        *_build_serving(daemon),
        *_build_training(daemon),
        *_build_watching(daemon),
        *_build_operation(daemon, document),
        *_build_inference(daemon),
    ]
    document.update(build_openapi(routes))
    return [_gated(route, daemon) for route in routes]


def _build_store(daemon: Daemon) -> list[Route]:
    e, f, d = _events, _features, _definitions
    events, features = e.EventHandlers(daemon), f.FeatureHandlers(daemon)
    definitions = d.DefinitionHandlers(daemon)
    frames = (ARROW, PARQUET, JSON, MSGPACK)
    path = "/v1/definitions"
    return [
        Route("POST", "/v1/events", "ingest", events.send_many, e.BATCHES, e.INGESTED),
        Route(
            *("POST", "/v1/events/{source}", "ingest", events.send),
            *(BATCH, e.INGESTED, e.ARROW_OPTIONS),
            arrow=True,
        ),
        Route("POST", "/v1/features/read", "read", features.read, f.READ, f.FEATURES),
        Route(
            *("POST", "/v1/features/history", "read", features.history),
            *(f.HISTORY, None, f.HISTORY_OPTIONS),
            arrow=True,
            produces=frames,
        ),
        Route("GET", path, "read", definitions.show, answer=d.DEFINITIONS),
        Route("POST", f"{path}/plan", "read", definitions.plan, d.DOCUMENT, d.PLAN),
        Route("POST", f"{path}/apply", "admin", definitions.apply, d.APPLY, d.PLAN),
    ]


def _build_serving(daemon: Daemon) -> list[Route]:
    p, handlers = _predict, _predict.PredictHandlers(daemon)
    return [
        Route("POST", "/v1/predict/{route}", "predict", handlers.predict, p.PREDICT, p.PREDICTIONS),
        Route("POST", "/v1/feedback", "ingest", handlers.feedback, p.FEEDBACK, p.RECORDED),
        *_build_models(daemon),
        *_build_routes(daemon),
        *_build_experiments(daemon),
    ]


def _build_models(daemon: Daemon) -> list[Route]:
    m, models = _models, _models.ModelHandlers(daemon)
    one = "/v1/models/{name}"
    version, alias = f"{one}/versions/{{version}}", f"{one}/aliases/{{alias}}"
    return [
        Route("GET", "/v1/models", "read", models.list, answer=m.MODELS),
        Route("GET", one, "read", models.show, answer=m.MODEL),
        Route("GET", f"{one}/history", "read", models.history, None, m.HISTORY, m.HISTORY_OPTIONS),
        Route("GET", version, "read", models.version, answer=m.VERSION),
        Route("PUT", alias, "admin", models.move_alias, m.MOVE, m.ALIAS),
        Route("DELETE", alias, "admin", models.delete_alias, answer=m.ALIAS),
        Route("POST", f"{alias}/rollback", "admin", models.roll_back, m.ROLLBACK, m.ALIAS),
    ]


def _build_routes(daemon: Daemon) -> list[Route]:
    r, routes = _routes, _routes.RouteHandlers(daemon)
    one = "/v1/routes/{name}"
    return [
        Route("GET", "/v1/routes", "read", routes.list, answer=r.ROUTES),
        Route("GET", one, "read", routes.show, answer=r.SERVED_ROUTE),
        Route("PUT", one, "admin", routes.put, r.ROUTE, r.SERVED_ROUTE),
        Route("DELETE", one, "admin", routes.delete, answer=r.DELETED),
        Route("GET", f"{one}/history", "read", routes.history, answer=r.HISTORY),
        Route("POST", f"{one}/rollback", "admin", routes.roll_back, r.ROLLBACK, r.SERVED_ROUTE),
    ]


def _build_experiments(daemon: Daemon) -> list[Route]:
    e, experiments = _experiments, _experiments.ExperimentHandlers(daemon)
    one = "/v1/experiments/{name}"
    return [
        Route("GET", "/v1/experiments", "read", experiments.list, answer=e.EXPERIMENTS),
        Route("GET", one, "read", experiments.show, answer=e.RESULT),
        Route("PUT", one, "admin", experiments.put, e.EXPERIMENT, e.RESULT),
    ]


def _build_training(daemon: Daemon) -> list[Route]:
    t, training = _training, _training.TrainingHandlers(daemon)
    one = "/v1/runs/{id}"
    return [
        Route("GET", "/v1/jobs", "read", training.jobs, answer=t.JOBS),
        Route("GET", "/v1/runs", "read", training.list, None, t.RUNS, t.LIST),
        Route("POST", "/v1/runs", "admin", training.start, t.START, t.RUN),
        Route("GET", one, "read", training.show, answer=t.RUN),
        Route("POST", f"{one}/cancel", "admin", training.cancel, answer=t.RUN),
        Route("POST", f"{one}/retry", "admin", training.retry, answer=t.RUN),
        Route("GET", f"{one}/log", "read", training.log, produces=("text/plain",)),
    ]


def _build_watching(daemon: Daemon) -> list[Route]:
    m, watch = _monitoring, _monitoring.MonitoringHandlers(daemon)
    audit = "/v1/consistency"
    return [
        Route("GET", "/metrics", "read", watch.metrics, produces=("text/plain",)),
        Route("GET", "/v1/drift/{model}", "read", watch.drift, None, m.DRIFT_REPORT, m.DRIFT),
        Route("GET", "/v1/performance/{model}", "read", watch.performance, answer=m.PERFORMANCE),
        Route("GET", "/v1/freshness", "read", watch.freshness, answer=m.FRESHNESS),
        Route("GET", "/v1/shadows", "read", watch.shadows, answer=m.SHADOWS),
        Route("GET", audit, "read", watch.consistency, answer=m.CONSISTENCY),
        Route("POST", f"{audit}/run", "admin", watch.run_audit, m.AUDIT, m.AUDITED),
    ]


def _build_operation(daemon: Daemon, document: dict[str, Any]) -> list[Route]:
    operation = _operation.OperationHandlers(daemon, document)
    m, keeping = _maintenance, _maintenance.MaintenanceHandlers(daemon)
    return [
        Route("GET", "/healthz", "public", operation.alive, answer=_operation.ALIVE),
        Route("GET", "/readyz", "public", operation.ready, answer=_operation.READY),
        Route("GET", "/v1/status", "read", operation.status, answer=_operation.STATUS),
        Route("POST", "/v1/backup", "admin", keeping.backup, m.BACKUP, m.BACKED_UP),
        Route("POST", "/v1/fsck", "admin", keeping.fsck, answer=m.REPORT),
        Route("GET", "/openapi.json", "read", operation.openapi, produces=(JSON, MSGPACK)),
        Route("GET", "/docs", "read", operation.docs, produces=("text/markdown",)),
        Route("GET", "/docs/{page:.+}", "read", operation.page, produces=("text/markdown",)),
    ]


def _build_inference(daemon: Daemon) -> list[Route]:
    oip = InferenceHandlers(daemon)
    both = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")

    def route(method: str, path: str, scope: Any, handler: Handler) -> Route:
        return Route(method, path, scope, handler, produces=(JSON,))

    return [
        route("GET", "/v2", "read", oip.server),
        route("GET", "/v2/health/live", "public", oip.live),
        route("GET", "/v2/health/ready", "public", oip.ready),
        route("GET", "/v2/models/stats", "read", oip.statistics),
        *(route("GET", path, "read", oip.metadata) for path in both),
        *(route("GET", f"{path}/ready", "read", oip.model_ready) for path in both),
        *(route("GET", f"{path}/config", "read", oip.config) for path in both),
        *(route("GET", f"{path}/stats", "read", oip.statistics) for path in both),
        *(route("POST", f"{path}/infer", "predict", oip.infer) for path in both),
        route("POST", "/v2/repository/index", "read", oip.index),
        route("POST", "/v2/repository/models/{model}/load", "admin", oip.load),
        route("POST", "/v2/repository/models/{model}/unload", "admin", oip.unload),
    ]


def _gated(route: Route, daemon: Daemon) -> Route:
    """Return the route so that it answers 503 while the daemon isn't ready."""
    if route.scope == "public":
        return route
    handler = route.handler

    @functools.wraps(handler)
    async def serve(request: web.Request) -> web.StreamResponse:
        if not daemon.ready:
            raise UnavailableError(
                "the daemon is starting or stopping", code="not_ready", hint="Try again shortly."
            )
        return await handler(request)

    return replace(route, handler=serve)
