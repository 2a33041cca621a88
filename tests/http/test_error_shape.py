"""One error shape, for every route: wrong method, bad body, foreign host, foreign origin."""

import http.client
import itertools
from typing import Any

import msgpack
import pytest

from mlpd.http.api import describe_routes
from mlpd.http.routes import Route

TABLE = describe_routes()
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")
with_route = pytest.mark.parametrize("route", TABLE, ids=lambda r: f"{r.method} {r.path}")
with_body = pytest.mark.parametrize(
    "route", [r for r in TABLE if r.body is not None], ids=lambda r: f"{r.method} {r.path}"
)


def path_of(edge: Any, route: Route) -> str:
    names = {"source": "clicks", "route": "risk", "name": "risk", "alias": "champion"}
    names |= {
        "version": "1",
        "id": edge.run_id,
        "model": "risk",
        "region": "r",
        "order": "1",
        "digest": "x",
    }
    names |= {"picture": "importance", "feature": "age", "digest": "x"}
    return route.path.replace("{page:.+}", "formats/log.md").format_map(names)


def check_shape(path: str, value: Any) -> str:
    """Assert that `value` is an error in its one shape; return its code, or /v2's text."""
    assert value.keys() == {"error"}
    error = value["error"]
    if path.startswith("/v2"):
        assert isinstance(error, str)
        assert error
        return error
    assert error.keys() == {"code", "message", "hint", "details"}
    assert error["code"].replace("_", "").isalnum()
    assert error["code"] == error["code"].lower()
    assert error["message"]
    return str(error["code"])


@with_route
def test_wrong_method(edge: Any, route: Route) -> None:
    path = path_of(edge, route)
    allowed = {r.method for r in TABLE if r.path == route.path}
    for method in set(METHODS) - allowed:
        status, value, headers = edge.call(method, path)
        assert status == 405, (method, value)
        assert set(headers["allow"].split(", ")) == allowed
        assert headers["content-type"] == "application/json"
        check_shape(path, value)


@with_route
def test_a_foreign_host_is_refused(edge: Any, route: Route) -> None:
    path = path_of(edge, route)
    status, value, _ = edge.call(route.method, path, headers={"Host": "evil.example:8700"})
    assert status == 403
    assert check_shape(path, value) in ("foreign_host", value["error"])


@with_route
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
    ids=str,
)
def test_a_foreign_site_is_refused_on_every_method(
    edge: Any, route: Route, headers: dict[str, str]
) -> None:
    path = path_of(edge, route)
    for method in {route.method, "GET", "OPTIONS"}:
        status, value, _ = edge.call(method, path, headers=headers)
        assert status == 403, (method, value)
        check_shape(path, value)


@with_route
def test_a_body_over_the_limit_is_refused_before_it_comes(edge: Any, route: Route) -> None:
    path, config = path_of(edge, route), edge.daemon.config
    most = config.registry.upload_bytes_max if route.consumes else config.server.body_bytes_max
    headers = {"Content-Length": str(most + 1)}
    status, value, _ = edge.call(route.method, path, headers=headers)
    assert status == 413
    assert check_shape(path, value) in ("body_too_large", value["error"])


@with_body
def test_a_streamed_body_over_the_limit_is_refused(edge: Any, route: Route) -> None:
    connection = http.client.HTTPConnection(edge.host, timeout=30)
    path = path_of(edge, route)
    parts = itertools.repeat(b" " * 65536, 8)
    headers = {"Content-Type": "application/json"}
    try:
        connection.request(route.method, path, parts, headers, encode_chunked=True)
        assert connection.getresponse().status == 413
    except (ConnectionResetError, BrokenPipeError):
        pass  # it was refused before all of it was sent
    finally:
        connection.close()


@with_body
@pytest.mark.parametrize(
    ("body", "kind", "code"),
    [
        (b"{", "application/json", "malformed_body"),
        (b"[" * 100_000, "application/json", "malformed_body"),
        (b"\xff\xfe", "application/json", "malformed_body"),
        (b"\xc1", "application/msgpack", "malformed_body"),
        (b"[1]", "application/json", "malformed_body"),
        (b"null", "application/json", "malformed_body"),
        (b"", "application/json", "malformed_body"),
        (msgpack.packb({"nonsense": 1}), "application/msgpack", "unknown_field"),
        (msgpack.packb({b"nonsense": 1, "x": 2}), "application/msgpack", "unknown_field"),
        (b"{}", "text/html", "unsupported_media_type"),
    ],
    ids=repr,
)
def test_a_bad_body(edge: Any, route: Route, body: bytes, kind: str, code: str) -> None:
    path = path_of(edge, route)
    status, value, _ = edge.call(route.method, path, body, {"Content-Type": kind})
    assert (status, check_shape(path, value)) == (400, code)


@with_body
def test_fields_of_a_wrong_type_are_named(edge: Any, route: Route) -> None:
    assert route.body is not None
    wrong: Any = {"text": 1, "integer": "1", "number": "1", "flag": 1, "time": "now", "object": []}
    for name, field in route.body.fields.items():
        if field.kind == "any":
            continue
        body = {name: wrong.get(field.kind, "nonsense")}
        status, value, _ = edge.call(route.method, path_of(edge, route), body)
        assert status == 400, (name, value)
        assert name in str(value) or "is missing" in str(value)


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nonsense", "/v2/nonsense", "/v1/events/a/b"])
def test_an_unknown_path(edge: Any, path: str) -> None:
    status, value, _ = edge.call("GET", path)
    assert status == 404
    check_shape(path, value)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/events/nothing", {"rows": []}, 404, "unknown_source"),
        ("POST", "/v1/events", {"sources": {"nothing": {"rows": []}}}, 404, "unknown_source"),
        ("POST", "/v1/features/read", {"service": "no", "entities": []}, 404, "unknown_service"),
        ("POST", "/v1/features/read", {"features": ["no.x"], "entities": []}, 404, "unknown_view"),
        (
            *("POST", "/v1/features/read"),
            *({"features": ["spend.x"], "entities": []}, 400, "unknown_feature"),
        ),
        ("POST", "/v1/predict/nothing", {"rows": []}, 404, "unknown_route"),
        ("GET", "/v1/models/nothing", None, 404, "unknown_model"),
        ("GET", "/v1/models/risk/versions/99", None, 404, "unknown_version"),
        ("GET", "/v1/models/risk/versions/best", None, 404, "unknown_alias"),
        ("GET", "/v1/models/..%2F..%2Fetc", None, 400, "invalid_name"),
        ("GET", "/v1/routes/nothing", None, 404, "unknown_route"),
        ("GET", "/v1/experiments/nothing", None, 404, "unknown_experiment"),
        ("GET", "/v1/runs/nothing", None, 404, "unknown_run"),
        ("GET", "/v1/runs/%00%ff", None, 404, "unknown_run"),
        ("POST", "/v1/runs", {"job": "nothing"}, 404, "unknown_job"),
        ("POST", "/v1/runs", {"job": "risk", "deploy": "x"}, 400, "invalid_deploy"),
        ("GET", "/v1/runs?limit=many", None, 400, "wrong_type"),
        ("GET", "/v1/runs?limits=1", None, 400, "unknown_parameter"),
        ("GET", "/v1/drift/nothing", None, 404, "unknown_model"),
        ("GET", "/v1/drift/risk?start=2013-01-01T00:00:00", None, 400, "naive_time"),
        ("GET", "/v1/drift/risk?step=soon", None, 400, "invalid_duration"),
        ("GET", "/v1/drift/risk?start=2&end=1", None, 400, "empty_window"),
        ("GET", "/v1/drift/risk?reference=past", None, 400, "unknown_choice"),
        ("GET", "/v1/drift/risk?reference=previous", None, 404, "no_previous_version"),
        ("GET", "/v1/drift/risk?reference=rolling&count=0", None, 400, "wrong_limit"),
        ("GET", "/v1/drift/risk/features/colour", None, 404, "unknown_feature"),
        ("POST", "/v1/drift/nothing/check", {}, 404, "unknown_model"),
        ("POST", "/v1/drift/risk/check", {"count": -1}, 400, "wrong_limit"),
        ("GET", "/v1/performance/nothing", None, 404, "unknown_model"),
        ("GET", "/v1/performance/nothing/analysis", None, 404, "unknown_model"),
        ("GET", "/v1/performance/risk/analysis?by=colour", None, 400, "unknown_slice"),
        ("GET", "/v1/performance/risk/analysis?start=2&end=1", None, 400, "empty_window"),
        ("GET", "/docs/../api.py", None, 404, "unknown_page"),
        ("GET", "/docs/%2Fetc%2Fpasswd", None, 404, "unknown_page"),
        ("POST", "/v1/consistency/run", {"limit": 0}, 400, "wrong_limit"),
    ],
)
def test_what_is_unknown_or_wrong_is_named(
    edge: Any, method: str, path: str, body: Any, status: int, code: str
) -> None:
    found, value, _ = edge.call(method, path, body)
    assert (found, check_shape(path, value)) == (status, code), value
