"""Well-formed bodies of nonsense: every route answers below 500, and nothing is half done."""

import math
import re
from typing import Any
from urllib.parse import quote

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlpd.http.api import describe_routes
from mlpd.http.routes import Route

TABLE = describe_routes()
ELSEWHERE = {
    *("/v1/backup", "/v1/consistency/run", "/v1/features/history", "/v1/runs"),
    *("/v1/definitions/apply", "/v1/definitions/plan", "/v1/erase"),
    "/v1/drift/{model}/check",
}
"""These start processes or read a document; their nonsense is tested where they are."""

names = st.sampled_from(
    ["risk", "clicks", "champion", "user", "nothing", "1", "0", "../x", "é", ""]
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | names
    | st.binary(max_size=3)
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
EVENT = {"event_time": 1, "known_at": 1, "user": "a", "amount": 1.0, "shown_at": 1, "bought": 1}
ROW = {"user": "a", "age": 0.5}
VALID: dict[str, dict[str, Any]] = {
    "/v1/cluster/map": {
        "map": {
            "format": 1,
            "cluster": "0" * 32,
            "epoch": 1,
            "shards": {"a": {"url": "http://127.0.0.1:1", "replicas": []}},
            "slots": {"a": "0-16383"},
        },
        "shard": "a",
        "expected": 0,
        "dry_run": True,
    },
    "/v1/cluster/cells": {
        "service": "risk",
        "keys": [{"columns": ["user"], "values": [["a"]]}],
        "min_sequence": 1,
    },
    "/v1/cluster/changes": {
        "cluster": "0" * 32,
        "shard": "b",
        "after": 0,
        "wait_s": 0.0,
        "why": "x",
    },
    "/v1/cluster/parts": {"what": "performance", "fields": {"model": "risk"}},
    "/v1/cluster/stops": {
        "experiment": "nothing",
        "arm": "b",
        "guardrail": "errors",
        "reason": "x",
    },
    "/v1/cluster/moves/survey": {"slots": "0-9 12"},
    "/v1/cluster/moves/digest": {"slots": "0-9 12", "at": "2999-01-01T00:00:00Z"},
    "/v1/cluster/moves/leaving": {"step": "begin", "move": "m", "slots": "0-9", "shard": "b"},
    "/v1/cluster/moves/history": {"move": "m", "after": 0},
    "/v1/cluster/moves/predictions": {"move": "m", "after": "62" + 16 * "00"},
    "/v1/cluster/moves/arriving": {
        "step": "seal",
        "move": "m",
        "slots": "0-9",
        "shard": "b",
        "definitions": "0" * 32,
        "size_bytes": 1,
        "dry_run": True,
        "through": 1,
        "horizons": {},
    },
    "/v1/cluster/moves/import": {"move": "m", "chunk": "x"},
    "/v1/cluster/replica/feed": {
        "after": "00" * 32,
        "follower": "http://127.0.0.1:1",
        "ticket": 1,
        "wait": False,
    },
    "/v1/cluster/replica/file": {"path": "segments/x", "offset": 0, "snapshot": "5"},
    "/v1/cluster/replica/role": {
        "step": "pause",
        "url": "http://127.0.0.1:1",
        "token": "t",
        "map": {},
        "head": "00" * 32,
    },
    "/v1/alerts/silences": {"matchers": {"model": "a*"}, "lasts": "1m", "why": "moved"},
    "/v1/alerts/test": {"sink": "log"},
    "/v1/events": {"sources": {"clicks": {"rows": [EVENT]}}, "all_or_nothing": True},
    "/v1/events/{source}": {"columns": {name: [value] for name, value in EVENT.items()}},
    "/v1/features/read": {
        "service": "risk",
        "entities": [ROW, ROW],
        "min_sequence": 0,
        "on_stale": "null",
        "at": "2999-01-01T00:00:00Z",
    },
    "/v1/predict/{route}": {
        "rows": [ROW, ROW],
        "include": ["vector"],
        "arm": "risk",
        "min_sequence": 0,
        "at": "2999-01-01T00:00:00Z",
    },
    "/v1/feedback": {"labels": [{"prediction_id": "0" * 32, "label": 1, "label_time": 1}]},
    "/v1/models/{name}/aliases/{alias}": {
        "version": 1,
        "expected": 0,
        "why": "x",
        "force": False,
    },
    "/v1/models/{name}/loaded": {"loaded": True},
    "/v1/models/{name}/aliases/{alias}/protection": {"protected": False, "why": "x"},
    "/v1/models/{name}/versions/{version}/state": {"state": "ready", "why": "x"},
    "/v1/models/{name}/versions/{version}/signature": {
        "key": "ab" * 32,
        "signature": "cd" * 64,
        "why": "x",
    },
    "/v1/models/{name}/versions/{version}/pin": {"pinned": False, "why": "x"},
    "/v1/registry/collect": {"grace": "7d", "keep": 100, "delete": False},
    "/v1/models/{name}/aliases/{alias}/rollback": {"why": "x"},
    "/v1/routes/{name}": {
        "service": "risk",
        "arms": [{"name": n, "model": "risk@1", "weight": 1.0} for n in ("a", "b")],
        "shadows": ["risk@champion"],
        "experiment": None,
        "fallback": 0.5,
        "fallback_models": ["risk@champion~1"],
        "log_share": 0.5,
        "canary": {"arm": "a", "steps": [{"share": 0.1, "for": "10m"}], "guard": {"rows": 5}},
        "expected": None,
    },
    "/v1/routes/{name}/rollback": {"version": 1},
    "/v1/experiments/{name}/end": {"arm": "a", "why": "it won", "force": False},
    "/v1/experiments/{name}/outcomes": {
        "outcomes": [{"unit": "a", "id": "1", "values": {"label": 1}}] * 2
    },
    "/v1/experiments/{name}": {
        "unit": "user",
        "arms": {"a": 1.0, "b": 1.0},
        "planned_units": 100,
        "control": "a",
        "metrics": [{"name": "label", "kind": "proportion", "better": "higher"}],
        "alpha": 0.05,
        "method": "sequence",
        "correction": "holm",
        "holdout": 0.1,
        "namespace": {"name": "n", "start": 0, "end": 10},
        "forced": {"x": "a"},
        "rules": [{"field": "age", "op": "gt", "value": 1}],
        "guardrails": [{"on": "errors"}, {"on": "metric", "metric": "label", "margin": 0.1}],
        "cool_down_s": 60,
        "promotion": None,  # as the bandit moves the weights
        "bandit": {"metric": "label", "every_s": 60, "floor": 0.1, "seed": 3},
        "interleaving": False,
        "force": True,
    },
}
"""A good body for every route that takes one; what is sent has a part or two replaced."""

WITH_BODY = [r for r in TABLE if r.body is not None and r.path not in ELSEWHERE]


def mutate(data: st.DataObject, value: Any) -> Any:
    """Return `value` with something in it, found by a random walk, replaced, dropped or doubled."""
    if not isinstance(value, dict | list) or not value or data.draw(st.integers(0, 4)) == 0:
        return data.draw(anything)
    if isinstance(value, list):
        at = data.draw(st.integers(0, len(value) - 1))
        return [*value[:at], mutate(data, value[at]), *value[at + data.draw(st.integers(0, 1)) :]]
    key = data.draw(st.sampled_from(sorted(value)))
    changed = {**value, key: mutate(data, value[key])}
    if data.draw(st.integers(0, 9)) == 0:
        changed[data.draw(names)] = changed.pop(key)
    return changed


def spoil(data: st.DataObject, good: dict[str, Any]) -> Any:
    """Return a body mutated, but still a trial if it was one: a map would stay with the daemon."""
    body = mutate(data, good)
    if "dry_run" in good and isinstance(body, dict):
        return {**body, "dry_run": body.get("dry_run") or True}
    return body


@pytest.mark.parametrize("version", [-1, 0, 2, 2**32, 2**63])
def test_a_version_that_a_route_never_had_is_not_found(edge: Any, version: int) -> None:
    path = f"/v1/routes/once-{version + 1}"  # a name keeps its versions when it is deleted
    assert edge.call("PUT", path, VALID["/v1/routes/{name}"])[0] == 200
    status, value, _ = edge.call("POST", f"{path}/rollback", {"version": version})
    assert (status, value["error"]["code"]) == (404, "unknown_route_version")
    assert edge.call("DELETE", path)[0] == 200


def test_the_good_bodies_are_good(edge: Any) -> None:
    assert {route.path for route in WITH_BODY} == VALID.keys()
    expected: dict[str, Any] = {
        "/v1/cluster/moves/survey": (200, 409),  # it is alone; others predict here
        "/v1/cluster/moves/leaving": 409,  # no cluster
        "/v1/cluster/changes": 409,
        "/v1/cluster/stops": 404,  # no experiment
        "/v1/cluster/moves/history": 404,  # no move
        "/v1/cluster/moves/predictions": 404,
        "/v1/cluster/moves/arriving": 404,
        "/v1/cluster/moves/import": 400,  # no chunk
        "/v1/cluster/replica/feed": 409,  # it has no feed
        "/v1/cluster/replica/file": 404,
        "/v1/cluster/replica/role": 404,  # no such follower
        "/v1/models/{name}/aliases/{alias}/rollback": 409,  # there is one version
        "/v1/models/{name}/versions/{version}/signature": 400,  # nobody's key
    }
    for route in WITH_BODY:
        path, body = path_of(route, "good"), VALID[route.path]
        if "namespace" in body:  # one that no other experiment has a part of
            body = {**body, "namespace": {"name": "good", "start": 0, "end": 10}}
        status, value, _ = edge.call(route.method, path, body)
        wanted = expected.get(route.path, 200)
        assert status in (wanted if isinstance(wanted, tuple) else (wanted,)), (path, value)
    for path in ("/v1/models/risk/aliases/good", "/v1/routes/good"):
        assert edge.call("DELETE", path)[0] == 200


def path_of(route: Route, name: str) -> str:
    model = "models" in route.path
    return route.path.format_map(
        {
            "source": "clicks",
            "route": "risk",
            "alias": name,
            "name": "risk" if model else name,
            "version": "1",
        }
    )


@pytest.mark.parametrize("route", WITH_BODY, ids=lambda r: f"{r.method} {r.path}")
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_good_body_spoilt_is_refused_by_name(
    edge: Any, route: Route, data: st.DataObject
) -> None:
    body = spoil(data, VALID[route.path])
    try:
        sent = msgpack.packb(body)
    except (OverflowError, ValueError):
        return
    kind = {"Content-Type": "application/msgpack"}
    status, value, _ = edge.call(route.method, path_of(route, "fuzzed"), sent, kind)
    assert status < 500 or status == 503, (body, value)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=st.text(min_size=1, max_size=200), route=st.sampled_from(TABLE))
def test_any_name_in_a_path_is_refused_by_name(edge: Any, name: str, route: Route) -> None:
    try:
        quoted = quote(name, safe="")
    except UnicodeEncodeError:
        return
    path = route.path.replace("{page:.+}", "{page}")
    if "{" not in path or route.method not in ("GET", "DELETE"):
        return
    path = re.sub(r"\{\w+\}", lambda _: quoted, path)
    status, value, _ = edge.call(route.method, path)
    assert 400 <= status < 500, (path, value)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_query_is_answered_or_refused(edge: Any, data: st.DataObject) -> None:
    route = data.draw(st.sampled_from([r for r in TABLE if r.query.fields and r.method == "GET"]))
    texts = st.sampled_from(["1us", "1d", "0", "-1", "1", "x", "true", "é", "9" * 30, str(2**61)])
    keys = st.sampled_from(sorted(route.query.fields))
    query = data.draw(st.dictionaries(keys, texts | st.integers(0, 2**61).map(str), min_size=1))
    text = "&".join(f"{name}={quote(value)}" for name, value in query.items())
    names = {"{version}": "1", "{source}": "clicks"}
    path = re.sub(r"\{\w+\}", lambda part: names.get(part[0], "risk"), route.path)
    status, value, _ = edge.call("GET", f"{path}?{text}")
    assert status < 500, (text, value)


def test_what_was_fuzzed_left_the_daemon_as_it_was(edge: Any) -> None:
    status, value, _ = edge.call("GET", "/v1/routes/risk")
    assert (status, value["serving"]) == (200, {"risk": "risk@1"})
    answer = edge.call("POST", "/v1/predict/risk", {"rows": [{"user": "a", "age": 0.5}]})
    assert math.isfinite(answer[1]["predictions"][0]["score"])
