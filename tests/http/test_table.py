"""The route table: scopes, documentation, and /openapi.json telling the truth about it."""

import inspect
import re
from typing import Any, get_args

import pytest

from mlpd.http.api import describe_routes
from mlpd.http.openapi import build_openapi
from mlpd.http.routes import Route, Scope

TABLE = describe_routes()
PUBLIC = {"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"}


def plain_path(route: Route) -> str:
    return re.sub(r"{([a-z]+):[^}]*}", r"{\1}", route.path)


@pytest.mark.parametrize("route", TABLE, ids=lambda r: f"{r.method} {r.path}")
class TestEveryRoute:
    def test_states_a_scope(self, route: Route) -> None:
        assert route.scope in get_args(Scope)
        assert (route.scope == "public") == (route.path in PUBLIC)

    def test_that_changes_something_needs_more_than_read(self, route: Route) -> None:
        asks = ("/read", "/history", "/plan", "/index", "/cells", "/changes")
        asks_only = route.path.endswith(asks)
        if route.method in ("PUT", "DELETE") or (route.method == "POST" and not asks_only):
            assert route.scope in ("ingest", "predict", "admin")
        else:
            assert route.scope in ("public", "read")

    def test_is_documented(self, route: Route) -> None:
        doc = inspect.getdoc(route.handler) or ""
        assert doc.startswith(("Return", "Store", "Make", "Point", "Remove", "Create", "Queue",
                               "Stop", "Recompute", "Load", "Let go"))  # fmt: skip
        assert route.answer is not None or route.produces


def test_no_method_and_path_stand_twice() -> None:
    keys = [(route.method, plain_path(route)) for route in TABLE]
    assert len(set(keys)) == len(keys)


def test_openapi_is_valid() -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    validator.validate(build_openapi(TABLE))


def test_openapi_holds_exactly_the_table() -> None:
    document = build_openapi(TABLE)
    described = {
        (method.upper(), path): operation
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }
    assert described.keys() == {(route.method, plain_path(route)) for route in TABLE}
    for route in TABLE:
        operation = described[route.method, plain_path(route)]
        assert operation["x-mlpd-scope"] == route.scope
        takes_body = route.body is not None or bool(route.consumes) or _takes_v2_body(route)
        assert ("requestBody" in operation) == takes_body
    ids = [operation["operationId"] for operation in described.values()]
    assert len(set(ids)) == len(ids)


def _takes_v2_body(route: Route) -> bool:
    return route.path.startswith("/v2") and route.method == "POST"


def test_the_daemon_serves_its_description(edge: Any) -> None:
    status, document, _ = edge.call("GET", "/openapi.json")
    assert status == 200
    assert document == build_openapi(TABLE)


def test_answers_have_the_fields_that_are_described(edge: Any) -> None:
    names = {
        "name": "risk",
        "alias": "champion",
        "version": "1",
        "id": edge.run_id,
        "model": "risk",
        "source": "clicks",
    }
    seen = 0
    for route in TABLE:
        if route.method != "GET" or route.answer is None or "experiments/" in route.path:
            continue
        if "{order}" in route.path:  # the daemon here is others', too: see test_erase.py
            continue
        status, value, _ = edge.call("GET", route.path.format_map(names))
        assert status == 200, (route.path, value)
        assert value.keys() == route.answer.fields.keys(), route.path
        seen += 1
    assert seen > 15
