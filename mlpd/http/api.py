"""The one route table: everything that the daemon serves, each with its scope and its shapes."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from aiohttp import web

from mlpd.core.errors import UnavailableError
from mlpd.core.media import ARROW, FRAME_FORMATS, JSON, MSGPACK, OCTETS, PARQUET, SPINE_FILES
from mlpd.daemon.app import Daemon
from mlpd.http import alerts as _alerts
from mlpd.http import cluster as _cluster
from mlpd.http import definitions as _definitions
from mlpd.http import erase as _erase
from mlpd.http import events as _events
from mlpd.http import experiments as _experiments
from mlpd.http import features as _features
from mlpd.http import maintenance as _maintenance
from mlpd.http import models as _models
from mlpd.http import monitoring as _monitoring
from mlpd.http import moves as _moves
from mlpd.http import operation as _operation
from mlpd.http import predict as _predict
from mlpd.http import replica as _replica
from mlpd.http import routes_api as _routes
from mlpd.http import training as _training
from mlpd.http import versions as _versions
from mlpd.http.admission import Turn, admit
from mlpd.http.batches import BATCH
from mlpd.http.forwarding import decided_by_arbiter
from mlpd.http.oip import InferenceHandlers
from mlpd.http.openapi import build_openapi
from mlpd.http.roles import check_role
from mlpd.http.routes import Handler, Route, Scope
from mlpd.http.uploads import MULTIPART, TAR
from mlpd.registry.manifest import PICTURE_TYPE


def build_routes(daemon: Daemon) -> list[Route]:
    """Return the table for `daemon`, which needn't have started: until then it answers 503.

    Only `public` routes, which are about health, answer while it is starting or stopping; some
    alone do where it isn't the owner of its shard.
    """
    turn = Turn()
    return [_gated(route, daemon, turn) for route in _build_table(daemon)]


def describe_routes() -> list[Route]:
    """Return the table of no daemon, for whoever describes it or has handlers of its own."""
    return _build_table(None)  # type: ignore[arg-type]  # handlers only keep it


def _build_table(daemon: Daemon) -> list[Route]:
    document: dict[str, Any] = {}
    routes = [
        *_build_store(daemon),
        *_build_serving(daemon),
        *_build_training(daemon),
        *_build_watching(daemon),
        *_build_cluster(daemon),
        *_build_operation(daemon, document),
        *_build_inference(daemon),
    ]
    document.update(build_openapi(routes))
    return routes


def _build_store(daemon: Daemon) -> list[Route]:
    e, f, d = _events, _features, _definitions
    events, features = e.EventHandlers(daemon), f.FeatureHandlers(daemon)
    definitions = d.DefinitionHandlers(daemon)
    path = "/v1/definitions"
    return [
        Route(
            *("POST", "/v1/events", "ingest", events.send_many, e.BATCHES, e.INGESTED),
            load="ingest",
        ),
        Route(
            *("POST", "/v1/events/{source}", "ingest", events.send),
            *(BATCH, e.INGESTED, e.ARROW_OPTIONS),
            arrow=True,
            load="ingest",
        ),
        Route(
            *("POST", "/v1/features/read", "read", features.read, f.READ, f.FEATURES),
            load="features",
        ),
        Route(
            *("GET", "/v1/events/{source}", "read", events.page, None, e.PAGE, e.PAGE_OPTIONS),
            produces=(JSON, MSGPACK, ARROW),
        ),
        Route(
            *("POST", "/v1/features/history", "read", features.history),
            *(f.HISTORY, None, f.HISTORY_OPTIONS),
            consumes=SPINE_FILES,
            produces=tuple(FRAME_FORMATS.values()),
        ),
        Route("GET", "/v1/features/stats/{name}", "read", features.stats, None, f.SUMMARY, f.STATS),
        Route("GET", path, "read", definitions.show, answer=d.DEFINITIONS),
        Route("POST", f"{path}/plan", "read", definitions.plan, d.DOCUMENT, d.PLAN),
        Route("POST", f"{path}/apply", "admin", definitions.apply, d.APPLY, d.PLAN, shared=True),
    ]


def _build_serving(daemon: Daemon) -> list[Route]:
    p, handlers = _predict, _predict.PredictHandlers(daemon)
    return [
        Route(
            *("POST", "/v1/predict/{route}", "predict"),
            *(handlers.predict, p.PREDICT, p.PREDICTIONS),
            load="predict",
        ),
        Route(
            *("GET", "/v1/predictions", "read", handlers.log, None, p.LOG_PAGE, p.LOG_OPTIONS),
            produces=(JSON, MSGPACK, ARROW),
        ),
        Route(
            *("POST", "/v1/feedback", "ingest", handlers.feedback, p.FEEDBACK, p.RECORDED),
            load="ingest",
        ),
        *_build_models(daemon),
        *_build_routes(daemon),
        *_build_experiments(daemon),
    ]


def _build_models(daemon: Daemon) -> list[Route]:
    m, models = _models, _models.ModelHandlers(daemon)
    v, versions = _versions, _versions.VersionHandlers(daemon)
    one = "/v1/models/{name}"
    version, alias = f"{one}/versions/{{version}}", f"{one}/aliases/{{alias}}"
    return [
        Route("GET", "/v1/models", "read", models.list, answer=m.MODELS),
        Route("GET", one, "read", models.show, answer=m.MODEL),
        Route("GET", f"{one}/history", "read", models.history, None, m.HISTORY, m.HISTORY_OPTIONS),
        Route(
            "PUT",
            f"{one}/loaded",
            "admin",
            models.keep_loaded,
            m.LOADED,
            m.KEPT_LOADED,
            shared=True,
        ),
        Route("GET", version, "read", models.version, answer=m.VERSION),
        Route(
            "PUT",
            f"{version}/signature",
            "admin",
            versions.sign,
            v.SIGN,
            v.ONE_VERSION,
            shared=True,
        ),
        Route("GET", f"{version}/diff", "read", versions.diff, None, v.DIFFERENCE, v.DIFF),
        Route(
            *("POST", f"{version}/reproduce", "admin", versions.reproduce),
            answer=v.REPRODUCTION,
            keeps_nothing=True,
        ),
        Route(
            *("GET", f"{version}/pictures/{{picture}}", "read", versions.picture),
            produces=(PICTURE_TYPE,),
        ),
        Route("GET", f"{version}/archive", "read", versions.archive, produces=(TAR,)),
        Route(
            *("POST", f"{one}/versions", "admin", versions.register),
            *(None, v.ONE_VERSION, v.UPLOAD),
            consumes=(MULTIPART, OCTETS),
            shared=True,
        ),
        Route(
            *("POST", "/v1/registry/archives", "admin", versions.adopt),
            *(None, v.ONE_VERSION, v.UPLOAD),
            consumes=(TAR,),
            shared=True,
        ),
        Route("PUT", alias, "admin", models.move_alias, m.MOVE, m.ALIAS, shared=True),
        Route("DELETE", alias, "admin", models.delete_alias, answer=m.ALIAS, shared=True),
        Route(
            "POST", f"{alias}/rollback", "admin", models.roll_back, m.ROLLBACK, m.ALIAS, shared=True
        ),
        Route(
            "PUT",
            f"{alias}/protection",
            "admin",
            models.protect,
            m.PROTECTION,
            m.ALIAS,
            shared=True,
        ),
        Route(
            "PUT",
            f"{version}/state",
            "admin",
            versions.set_state,
            v.STATE,
            v.ONE_VERSION,
            shared=True,
        ),
        Route("PUT", f"{version}/pin", "admin", versions.pin, v.PIN, v.ONE_VERSION, shared=True),
        Route("POST", "/v1/registry/collect", "admin", versions.collect, v.COLLECT, v.COLLECTED),
    ]


def _build_routes(daemon: Daemon) -> list[Route]:
    r, routes = _routes, _routes.RouteHandlers(daemon)
    one = "/v1/routes/{name}"
    return [
        Route("GET", "/v1/routes", "read", routes.list, answer=r.ROUTES),
        Route("GET", one, "read", routes.show, answer=r.SERVED_ROUTE),
        Route("PUT", one, "admin", routes.put, r.ROUTE, r.SERVED_ROUTE, shared=True),
        Route("DELETE", one, "admin", routes.delete, answer=r.DELETED, shared=True),
        Route("GET", f"{one}/history", "read", routes.history, answer=r.HISTORY),
        Route(
            "POST",
            f"{one}/rollback",
            "admin",
            routes.roll_back,
            r.ROLLBACK,
            r.SERVED_ROUTE,
            shared=True,
        ),
    ]


def _build_experiments(daemon: Daemon) -> list[Route]:
    e, experiments = _experiments, _experiments.ExperimentHandlers(daemon)
    one = "/v1/experiments/{name}"
    return [
        Route("GET", "/v1/experiments", "read", experiments.list, answer=e.EXPERIMENTS),
        Route("GET", one, "read", experiments.show, answer=e.RESULT),
        Route("PUT", one, "admin", experiments.put, e.EXPERIMENT, e.RESULT, shared=True),
        Route("POST", f"{one}/end", "admin", experiments.end, e.END, e.RESULT, shared=True),
        Route("GET", f"{one}/history", "read", experiments.history, answer=e.HISTORY),
        Route(
            *("POST", f"{one}/outcomes", "ingest", experiments.outcomes),
            *(e.OUTCOMES, e.OUTCOMES_STORED),
            load="ingest",
        ),
        Route("GET", f"{one}/timeline", "read", experiments.timeline, answer=e.TIMELINE),
        Route(
            *("GET", f"{one}/picture", "read", experiments.picture),
            query=e.PICTURE,
            produces=(e.SVG,),
        ),
    ]


def _build_training(daemon: Daemon) -> list[Route]:
    t, training = _training, _training.TrainingHandlers(daemon)
    one = "/v1/runs/{id}"
    return [
        Route("GET", "/v1/jobs", "read", training.jobs, answer=t.JOBS),
        Route("GET", "/v1/runs", "read", training.list, None, t.RUNS, t.LIST, shared=True),
        Route("POST", "/v1/runs", "admin", training.start, t.START, t.RUN, shared=True),
        Route("GET", one, "read", training.show, answer=t.RUN, shared=True),
        Route("POST", f"{one}/cancel", "admin", training.cancel, answer=t.RUN, shared=True),
        Route("POST", f"{one}/retry", "admin", training.retry, answer=t.RUN, shared=True),
        Route(
            *("GET", f"{one}/pictures/{{picture}}", "read", training.picture),
            produces=(PICTURE_TYPE,),
            shared=True,
        ),
        Route("GET", f"{one}/log", "read", training.log, produces=("text/plain",), shared=True),
    ]


def _build_watching(daemon: Daemon) -> list[Route]:
    m, watch = _monitoring, _monitoring.MonitoringHandlers(daemon)
    audit, drift = "/v1/consistency", "/v1/drift/{model}"
    return [
        Route(
            *("GET", "/metrics", "read", watch.metrics),
            produces=("text/plain",),
            anywhere=True,
        ),
        Route("GET", drift, "read", watch.drift, None, m.DRIFT_REPORT, m.DRIFT),
        Route(
            *("GET", f"{drift}/features/{{feature}}", "read", watch.drift_picture),
            *(None, None, m.PICTURE),
            produces=("image/svg+xml",),
        ),
        Route("POST", f"{drift}/check", "admin", watch.check_drift, m.CHECK, m.CHECKED),
        Route("GET", "/v1/performance/{model}", "read", watch.performance, answer=m.PERFORMANCE),
        Route(
            *("GET", "/v1/performance/{model}/analysis", "read", watch.analysis),
            *(None, m.ANALYSIS, m.ANALYSIS_OPTIONS),
        ),
        Route("GET", "/v1/freshness", "read", watch.freshness, answer=m.FRESHNESS),
        Route("GET", "/v1/quality", "read", watch.quality, answer=m.QUALITY),
        Route("GET", "/v1/shadows", "read", watch.shadows, answer=m.SHADOWS),
        Route("GET", audit, "read", watch.consistency, answer=m.CONSISTENCY),
        Route("POST", f"{audit}/run", "admin", watch.run_audit, m.AUDIT, m.AUDITED),
        *_build_alerts(daemon),
    ]


def _build_alerts(daemon: Daemon) -> list[Route]:
    a, alerts, path = _alerts, _alerts.AlertHandlers(daemon), "/v1/alerts"
    return [
        Route("GET", path, "read", alerts.list, answer=a.ALERTS),
        Route("POST", f"{path}/silences", "admin", alerts.silence, a.SILENCE, a.SILENCED),
        Route("DELETE", f"{path}/silences/{{id}}", "admin", alerts.unsilence, answer=a.SILENCED),
        Route("POST", f"{path}/test", "admin", alerts.test, a.TEST, a.TESTED),
    ]


def _build_cluster(daemon: Daemon) -> list[Route]:
    c, cluster = _cluster, _cluster.ClusterHandlers(daemon)
    f, features = _features, _features.FeatureHandlers(daemon)
    path = "/v1/cluster/map"
    return [
        Route("GET", path, "read", cluster.show, answer=c.MAP, anywhere=True),
        Route("PUT", path, "admin", cluster.put, c.NEW_MAP, c.MAP),
        Route(
            *("GET", "/v1/cluster/routing", "read", cluster.routing),
            answer=c.ROUTING,
            anywhere=True,
        ),
        Route(
            *("POST", "/v1/cluster/cells", "read", features.cells, f.ASKED, f.CELLS_READ),
            load="features",
        ),
        Route(
            *("POST", "/v1/cluster/changes", "read", cluster.changes),
            *(c.CHANGES_AFTER, c.CHANGES),
            keeps_nothing=True,
        ),
        Route(*("GET", "/v1/registry/blobs/{digest}", "read", cluster.blob), produces=(OCTETS,)),
        Route(
            *("GET", "/v1/cluster/events/{source}", "read", cluster.events),
            query=c.HOME,
            produces=(PARQUET,),
            keeps_nothing=True,
        ),
        Route(
            *("POST", "/v1/cluster/parts", "admin", cluster.part, c.PART, c.GIVEN),
            keeps_nothing=True,
        ),
        Route(
            *("POST", "/v1/cluster/stops", "admin", cluster.stop_arm, c.STOP, c.STOPPED),
            shared=True,
        ),
        *_build_moves(daemon),
        *_build_replica(daemon),
    ]


def _build_replica(daemon: Daemon) -> list[Route]:
    r, replica, path = _replica, _replica.ReplicaHandlers(daemon), "/v1/cluster/replica"
    found = [
        Route("GET", path, "read", replica.show, answer=r.ROLE),
        Route("POST", f"{path}/feed", "admin", replica.feed, r.FEED, r.COMMITS),
        Route("POST", f"{path}/snapshots", "admin", replica.snapshot, answer=r.SNAPSHOT),
        Route(
            *("DELETE", f"{path}/snapshots/{{id}}", "admin", replica.forget),
            answer=r.REMOVED,
        ),
        Route("POST", f"{path}/file", "admin", replica.file, r.FILE, r.PART),
        Route("POST", f"{path}/role", "admin", replica.step, r.STEP, r.ROLE),
    ]
    return [replace(route, anywhere=True) for route in found]


def _build_moves(daemon: Daemon) -> list[Route]:
    m, moves, path = _moves, _moves.MoveHandlers(daemon), "/v1/cluster/moves"
    return [
        Route("GET", path, "read", moves.show, answer=m.MOVES, anywhere=True),
        Route("POST", f"{path}/survey", "admin", moves.survey, m.SURVEY, m.SURVEYED),
        Route("POST", f"{path}/digest", "admin", moves.digest, m.DIGEST, m.DIGESTED),
        Route("POST", f"{path}/leaving", "admin", moves.leave, m.LEAVING, m.LEFT),
        Route("POST", f"{path}/history", "read", moves.history, m.HISTORY, m.CHUNK),
        Route("POST", f"{path}/predictions", "admin", moves.predictions, m.PREDICTIONS, m.CHUNK),
        Route("POST", f"{path}/arriving", "admin", moves.arrive, m.ARRIVING, m.MOVES),
        Route("POST", f"{path}/import", "admin", moves.take, m.IMPORT, m.MOVES),
    ]


def _build_operation(daemon: Daemon, document: dict[str, Any]) -> list[Route]:
    operation, pages = _operation.OperationHandlers(daemon), _operation.PageHandlers(document)
    m, keeping = _maintenance, _maintenance.MaintenanceHandlers(daemon)
    e, erasing = _erase, _erase.EraseHandlers(daemon)
    return [
        Route("GET", "/healthz", "public", pages.alive, answer=_operation.ALIVE),
        Route("GET", "/readyz", "public", operation.ready, answer=_operation.READY),
        Route(
            *("GET", "/v1/status", "read", operation.status),
            answer=_operation.STATUS,
            anywhere=True,
        ),
        Route("POST", "/v1/backup", "admin", keeping.backup, m.BACKUP, m.BACKED_UP),
        Route("POST", "/v1/fsck", "admin", keeping.fsck, answer=m.REPORT),
        Route("POST", "/v1/erase", "admin", erasing.erase, e.ORDER, e.RECEIPT),
        Route("GET", "/v1/erase", "read", erasing.list, answer=e.ERASURES),
        Route("GET", "/v1/erase/{order}", "read", erasing.show, answer=e.ERASURE),
        *_build_pages(pages),
    ]


def _build_pages(pages: _operation.PageHandlers) -> Iterator[Route]:
    """Yield what the process answers without its data."""
    kinds = ("text/markdown",)
    for path, handler, produced in (
        ("/openapi.json", pages.openapi, (JSON, MSGPACK)),
        ("/docs", pages.docs, kinds),
        ("/docs/{page:.+}", pages.page, kinds),
    ):
        yield Route("GET", path, "read", handler, produces=produced, anywhere=True)


def _build_inference(daemon: Daemon) -> list[Route]:
    oip = InferenceHandlers(daemon)
    both = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")

    def route(
        method: str, path: str, scope: Scope, handler: Handler, *, shared: bool = False
    ) -> Route:
        return Route(method, path, scope, handler, produces=(JSON,), shared=shared)

    def infer(path: str) -> Route:
        kinds = (JSON, OCTETS)
        return Route("POST", path, "predict", oip.infer, produces=kinds, load="predict")

    return [
        route("GET", "/v2", "read", oip.server),
        route("GET", "/v2/health/live", "public", oip.live),
        route("GET", "/v2/health/ready", "public", oip.ready),
        route("GET", "/v2/models/stats", "read", oip.statistics),
        *(route("GET", path, "read", oip.metadata) for path in both),
        *(route("GET", f"{path}/ready", "read", oip.model_ready) for path in both),
        *(route("GET", f"{path}/config", "read", oip.config) for path in both),
        *(route("GET", f"{path}/stats", "read", oip.statistics) for path in both),
        *(infer(f"{path}/infer") for path in both),
        route("POST", "/v2/repository/index", "read", oip.index),
        route("POST", "/v2/repository/models/{model}/load", "admin", oip.load, shared=True),
        route("POST", "/v2/repository/models/{model}/unload", "admin", oip.unload, shared=True),
        *_build_inference_settings(oip),
    ]


def _build_inference_settings(oip: InferenceHandlers) -> Iterator[Route]:
    """Yield what clients of Triton ask for beside inference: there is nothing to be set."""
    kept = {
        "/v2/trace/setting": oip.trace_settings,
        "/v2/models/{model}/trace/setting": oip.trace_settings,
        "/v2/logging": oip.log_settings,
    }
    for path, show in kept.items():
        yield Route("GET", path, "read", show, produces=(JSON,))
        yield Route("POST", path, "admin", oip.unsupported, produces=(JSON,))
    for kind in ("systemsharedmemory", "cudasharedmemory"):
        for one in ("", "/region/{region}"):
            path = f"/v2/{kind}{one}"
            yield Route("GET", f"{path}/status", "read", oip.regions, produces=(JSON,))
            yield Route("POST", f"{path}/unregister", "admin", oip.unregister, produces=(JSON,))
        yield Route("POST", f"{path}/register", "admin", oip.unsupported, produces=(JSON,))


def _gated(route: Route, daemon: Daemon, turn: Turn) -> Route:
    """Return the route so that it answers 503 while the daemon isn't ready or a crowd is full."""
    if route.scope == "public":
        return route
    handler = route.handler
    limit = None if route.load is None else daemon.limits[route.load]
    if route.shared:
        handler = decided_by_arbiter(route, handler, daemon)

    @functools.wraps(route.handler)
    async def serve(request: web.Request) -> web.StreamResponse:
        if not daemon.ready:
            raise UnavailableError(
                "the daemon is starting or stopping", code="not_ready", hint="Try again shortly."
            )
        if not daemon.roles.is_open:
            check_role(daemon, route)
        if limit is None:
            return await handler(request)
        return await admit(request, handler, limit, turn)

    return replace(route, handler=serve, limit=limit)
