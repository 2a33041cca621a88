"""Ways: how a router answers each route of the daemon; a test holds this against its table.

What is not here is refused, so that a new route is never answered from a part of the shards.
"""

from collections.abc import Mapping
from typing import Literal

Way = Literal["rows", "any", "arbiter", "summed", "all", "own", "refused"]
"""docs/paths/router.md describes them."""

_MODEL, _VERSION = "/v1/models/{name}", "/v1/models/{name}/versions/{version}"
_ALIAS = "/v1/models/{name}/aliases/{alias}"
_ROUTE, _RUN, _EXPERIMENT = "/v1/routes/{name}", "/v1/runs/{id}", "/v1/experiments/{name}"
_SERVED, _SERVED_VERSION = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
_REGION = ("/v2/systemsharedmemory", "/v2/cudasharedmemory")

_BY_WAY: Mapping[Way, tuple[str, ...]] = {
    "rows": (
        "POST /v1/events",
        "POST /v1/events/{source}",
        "POST /v1/features/read",
        "POST /v1/predict/{route}",
        "POST /v1/feedback",
        f"POST {_EXPERIMENT}/outcomes",
    ),
    "any": (
        "GET /v1/definitions",
        "POST /v1/definitions/plan",
        "GET /v1/models",
        f"GET {_MODEL}",
        f"GET {_MODEL}/history",
        f"GET {_VERSION}",
        f"GET {_VERSION}/diff",
        f"GET {_VERSION}/pictures/{{picture}}",
        f"GET {_VERSION}/archive",
        "GET /v1/routes",
        f"GET {_ROUTE}",
        f"GET {_ROUTE}/history",
        "GET /v1/experiments",
        f"GET {_EXPERIMENT}",
        "GET /v1/drift/{model}",
        "GET /v1/drift/{model}/features/{feature}",
        "GET /v1/performance/{model}",
        "GET /v1/consistency",
        "GET /v1/shadows",
        f"GET {_EXPERIMENT}/history",
        "GET /v1/jobs",
        "GET /v1/cluster/routing",
        "GET /v1/registry/blobs/{digest}",
        "POST /v1/features/history",
        "GET /v1/features/stats/{name}",
        "GET /v2",
        *(
            f"{call} {path}{end}"
            for path in (_SERVED, _SERVED_VERSION)
            for call, end in (
                *(("GET", ""), ("GET", "/ready"), ("GET", "/config")),
                ("POST", "/infer"),
            )
        ),
        "POST /v2/repository/index",
        *(
            f"{method} {path}"
            for path in ("/v2/trace/setting", f"{_SERVED}/trace/setting", "/v2/logging")
            for method in ("GET", "POST")
        ),
        *(
            f"{method} {path}{region}{end}"
            for path in _REGION
            for region in ("", "/region/{region}")
            for method, end in (("GET", "/status"), ("POST", "/unregister"))
        ),
        *(f"POST {path}/region/{{region}}/register" for path in _REGION),
    ),
    "arbiter": (
        "POST /v1/consistency/run",
        f"GET {_EXPERIMENT}/timeline",
        f"GET {_EXPERIMENT}/picture",
        "GET /v1/runs",
        "POST /v1/runs",
        f"GET {_RUN}",
        f"POST {_RUN}/cancel",
        f"POST {_RUN}/retry",
        f"GET {_RUN}/pictures/{{picture}}",
        f"GET {_RUN}/log",
        f"POST {_VERSION}/reproduce",
        "POST /v1/definitions/apply",
        f"PUT {_MODEL}/loaded",
        f"PUT {_VERSION}/signature",
        f"POST {_MODEL}/versions",
        "POST /v1/registry/archives",
        f"PUT {_ALIAS}",
        f"DELETE {_ALIAS}",
        f"POST {_ALIAS}/rollback",
        f"PUT {_ALIAS}/protection",
        f"PUT {_VERSION}/state",
        f"PUT {_VERSION}/pin",
        f"PUT {_ROUTE}",
        f"DELETE {_ROUTE}",
        f"POST {_ROUTE}/rollback",
        f"PUT {_EXPERIMENT}",
        f"POST {_EXPERIMENT}/end",
        "POST /v2/repository/models/{model}/load",
        "POST /v2/repository/models/{model}/unload",
    ),
    "summed": (
        "GET /metrics",
        "GET /v1/status",
        "GET /v2/models/stats",
        f"GET {_SERVED}/stats",
        f"GET {_SERVED_VERSION}/stats",
    ),
    "all": (
        "GET /v1/events/{source}",
        "GET /v1/predictions",
        "GET /v1/freshness",
        "GET /v1/quality",
        "GET /v1/alerts",
        "POST /v1/alerts/silences",
        "DELETE /v1/alerts/silences/{id}",
        "POST /v1/alerts/test",
        "POST /v1/registry/collect",
        "POST /v1/erase",
        "GET /v1/erase",
        "GET /v1/erase/{order}",
    ),
    "own": (
        "GET /healthz",
        "GET /readyz",
        "GET /v2/health/live",
        "GET /v2/health/ready",
        "GET /v1/cluster/map",
        "GET /openapi.json",
        "GET /docs",
        "GET /docs/{page:.+}",
    ),
    "refused": (
        "POST /v1/drift/{model}/check",
        "GET /v1/performance/{model}/analysis",
        "PUT /v1/cluster/map",
        "POST /v1/cluster/cells",
        "POST /v1/cluster/changes",
        "POST /v1/cluster/parts",
        "GET /v1/cluster/events/{source}",
        "POST /v1/cluster/stops",
        "GET /v1/cluster/moves",
        *(
            f"POST /v1/cluster/moves/{verb}"
            for verb in (
                "survey",
                "digest",
                "leaving",
                "history",
                "predictions",
                "arriving",
                "import",
            )
        ),
        "GET /v1/cluster/replica",
        *(f"POST /v1/cluster/replica/{verb}" for verb in ("feed", "snapshots", "file", "role")),
        "DELETE /v1/cluster/replica/snapshots/{id}",
        "POST /v1/backup",
        "POST /v1/fsck",
    ),
}

WAYS: Mapping[str, Way] = {route: way for way, routes in _BY_WAY.items() for route in routes}
"""The way of each `METHOD /path`."""
