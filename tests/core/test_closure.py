"""A service's closure: what it reads, in which order, and when its hash changes."""

from copy import deepcopy
from typing import Any

import pytest

from mlpd.core.closure import build_closure
from mlpd.core.columns import DType
from mlpd.core.document import parse_document
from mlpd.core.errors import DefinitionError
from mlpd.core.specs import Closure

DOCUMENT: dict[str, Any] = {
    "format": 1,
    "entities": {"user": {"keys": {"user": "string"}}, "shop": {"keys": {"shop": "int64"}}},
    "sources": {
        "clicks": {
            "timestamp": "at",
            "schema": {"user": "string", "shop": "int64", "x": "float64", "y": "float64"},
        }
    },
    "views": {
        "last": {"kind": "latest", "entity": "user", "source": "clicks", "features": ["x", "y"]},
        "load": {
            "kind": "window",
            "entity": "shop",
            "source": "clicks",
            "windows": ["1h", "1d"],
            "aggregates": [{"name": "n", "function": "count"}],
        },
    },
    "transforms": {
        "inner": {
            "source": "def inner(a):\n    return a",
            "inputs": [["a", "last.x"]],
            "output": "float64",
        },
        "outer": {
            "source": "def outer(a, b):\n    return a + b",
            "inputs": [["a", "inner"], ["b", "request.amount"]],
            "output": "float64",
        },
    },
    "services": {
        "s": {
            "features": ["outer", "load.n_1h", "user", "last.y"],
            "request": {"amount": "float64"},
        }
    },
}


def closure_of(document: dict[str, Any]) -> Closure:
    definitions = parse_document(document)
    return build_closure(definitions, definitions.service("s"))


def changed(*path: str, to: Any) -> dict[str, Any]:
    document = deepcopy(DOCUMENT)
    place = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = to
    return document


def test_it_holds_what_is_read_directly_and_through_transforms() -> None:
    closure = closure_of(DOCUMENT)
    assert closure.view_features == {"last": ("x", "y"), "load": ("n_1h",)}
    assert [t.name for t in closure.transforms] == ["inner", "outer"]
    assert dict(closure.key_columns) == {"user": DType.STRING, "shop": DType.INT64}
    assert closure.service.vector == ("outer", "load.n_1h", "user", "last.y", "amount")
    assert closure.dtypes == {
        "outer": DType.FLOAT64,
        "load.n_1h": DType.INT64,
        "user": DType.STRING,
        "last.y": DType.FLOAT64,
        "amount": DType.FLOAT64,
    }


@pytest.mark.parametrize(
    "document",
    [
        changed("views", "last", "ttl", to="1h"),
        changed("views", "last", "defaults", to={"x": 1.0}),
        changed("views", "load", "hop", to="10m"),
        changed("views", "load", "closed", to="right"),
        changed("views", "load", "windows", to=["1h", "2d"]),
        changed("transforms", "inner", "source", to="def inner(a):\n    return a * 1"),
        changed("transforms", "inner", "inputs", to=[["a", "last.y"]]),
        changed("services", "s", "request", to={"amount": "float32"}),
        changed("services", "s", "features", to=["outer", "user", "load.n_1h", "last.y"]),
    ],
)
def test_its_hash_changes_with_the_meaning(document: dict[str, Any]) -> None:
    assert closure_of(document).hash != closure_of(DOCUMENT).hash


@pytest.mark.parametrize(
    "document",
    [
        changed("views", "last", "freshness", to="1h"),
        changed("views", "load", "freshness", to="1h"),
        changed("views", "extra", to=DOCUMENT["views"]["last"]),
        changed("services", "other", to={"features": ["last.x"]}),
        changed("views", "load", "hop", to="5m")
        | {"views": {**DOCUMENT["views"], "extra": DOCUMENT["views"]["last"]}},
        changed("sources", "clicks", "delay", to="1h"),
    ],
)
def test_its_hash_stays_when_the_meaning_does(document: dict[str, Any]) -> None:
    assert closure_of(document).hash == closure_of(DOCUMENT).hash


@pytest.mark.parametrize(
    ("document", "named"),
    [
        (changed("services", "s", "features", to=["last.z"]), "it has: x, y"),
        (changed("services", "s", "features", to=["nowhere.x"]), "'nowhere.x'"),
        (changed("services", "s", "features", to=["request.z"]), "'request.z'"),
        (changed("services", "s", "features", to=[""]), "''"),
        (changed("transforms", "inner", "inputs", to=[["a", "outer"]]), "outer -> inner -> outer"),
        (changed("transforms", "inner", "inputs", to=[["a", "inner"]]), "inner -> inner"),
        (
            changed("transforms", "inner", "inputs", to=[["a", "user"]]),
            "'user', which is string",
        ),
    ],
)
def test_what_cannot_be_resolved_is_named(document: dict[str, Any], named: str) -> None:
    with pytest.raises(DefinitionError) as refused:
        parse_document(document)
    assert refused.value.code == "unknown_feature"
    assert named in refused.value.message
