"""/openapi.json: the route table as OpenAPI 3.1, from handlers' docstrings and shapes."""

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mlpd import __version__
from mlpd.core.media import ARROW, JSON, MSGPACK, OCTETS
from mlpd.http.routes import Route
from mlpd.http.shapes import Shape

_PARAMETER = re.compile(r"{([a-z]+)(?::[^}]*)?}")

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "hint", "details"],
            "properties": {
                "code": {"type": "string", "description": "Stable; narrower than the status."},
                "message": {"type": "string"},
                "hint": {"type": "string", "description": "What to do."},
                "details": {"type": "object"},
            },
        }
    },
}
_PLAIN_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string"}},
}


def build_openapi(routes: Iterable[Route]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of `routes`; `x-mlpd-scope` is what a token must carry."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = _PARAMETER.sub(r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mlpd",
            "version": __version__,
            "description": "An ML platform in one daemon. Bodies and answers are JSON or msgpack, "
            "by Content-Type and Accept.",
        },
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR, "PlainError": _PLAIN_ERROR}},
    }


def _operation(route: Route) -> dict[str, Any]:
    doc = inspect.getdoc(route.handler) or ""
    summary, _, rest = doc.partition("\n\n")
    body = _body(route)
    return {
        "operationId": _operation_id(route),
        "summary": " ".join(summary.split()),
        **({"description": rest} if rest else {}),
        "tags": [route.path.split("/")[2] if route.path.startswith("/v1/") else _area(route.path)],
        "x-mlpd-scope": route.scope,
        "parameters": [*_path_parameters(route.path), *_query_parameters(route.query)],
        **({"requestBody": body} if body else {}),
        "responses": {
            _status(route): {"description": "Done.", "content": _content(route)},
            "default": {"description": "Refused.", "content": _error_content(route)},
        },
    }


def _operation_id(route: Route) -> str:
    words = re.sub(r"[{}:.+]", "", route.path).replace("/", " ").replace("-", " ").split()
    return "_".join([route.method.lower(), *words])


def _area(path: str) -> str:
    return "inference" if path.startswith("/v2") else "operation"


def _status(route: Route) -> str:
    return "202" if (route.method, route.path) == ("POST", "/v1/runs") else "200"


def _body(route: Route) -> Mapping[str, Any]:
    content: dict[str, Any] = {}
    if route.body is not None:
        schema = route.body.schema()
        content = {JSON: {"schema": schema}, MSGPACK: {"schema": schema}}
    elif route.path.startswith("/v2") and route.method == "POST":
        content = {JSON: {"schema": {"type": "object"}}}
        if OCTETS in route.produces:
            content[OCTETS] = {"schema": {}}
    for kind in (*((ARROW,) if route.arrow else ()), *route.consumes):
        content[kind] = {"schema": {}}
    required = route.body is not None or bool(route.consumes)
    return {"required": required, "content": content} if content else {}


def _content(route: Route) -> dict[str, Any]:
    if route.answer is not None:
        schema = route.answer.schema(closed=False)
        return {JSON: {"schema": schema}, MSGPACK: {"schema": schema}}
    return {kind: {"schema": {}} for kind in route.produces}


def _error_content(route: Route) -> dict[str, Any]:
    name = "PlainError" if route.path.startswith("/v2") else "Error"
    return {JSON: {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _path_parameters(path: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _PARAMETER.findall(path)
    ]


def _query_parameters(shape: Shape) -> list[dict[str, Any]]:
    found = []
    for name, field in shape.fields.items():
        schema = field.schema()
        description = schema.pop("description")
        found.append(
            {"name": name, "in": "query", "description": description, "schema": schema}
            | ({"style": "form", "explode": False} if field.kind == "texts" else {})
        )
    return found
