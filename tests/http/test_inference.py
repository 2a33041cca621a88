"""The Open Inference Protocol over HTTP: paths, answers, plain errors."""

import json
import math
from typing import Any

import pytest

WIDTH = 7
TENSOR = {"name": "features", "shape": [1, WIDTH], "datatype": "FP64", "data": [0.0] * WIDTH}


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/v2/health/live", {"live": True}), ("/v2/health/ready", {"ready": True})],
)
def test_health_has_bodies(edge: Any, path: str, expected: Any) -> None:
    status, value, headers = edge.call("GET", path)
    assert (status, value, headers["content-type"]) == (200, expected, "application/json")


@pytest.mark.parametrize(
    "path", ["/v2/models/risk", "/v2/models/risk/versions/1", "/v2/models/risk/versions/champion"]
)
def test_a_model_is_described(edge: Any, path: str) -> None:
    metadata = edge.call("GET", path)[1]
    assert (metadata["name"], metadata["versions"]) == ("risk", ["1"])
    assert metadata["inputs"] == [{"name": "features", "datatype": "FP64", "shape": [-1, WIDTH]}]
    assert edge.call("GET", f"{path}/ready")[0] == 200
    assert edge.call("GET", f"{path}/config")[1]["input"][0]["dims"] == [WIDTH]
    stats = edge.call("GET", f"{path}/stats")[1]["model_stats"]
    assert [(s["name"], s["version"]) for s in stats] == [("risk", "1")]


def test_inference_gives_what_prediction_gives(edge: Any) -> None:
    body = {"rows": [{"user": "a", "age": 0.5}], "include": ["vector"]}
    (row,) = edge.call("POST", "/v1/predict/risk", body)[1]["predictions"]
    vector = [None if math.isnan(x) else x for x in row["vector"]]
    request = {"id": "7", "inputs": [{**TENSOR, "data": [vector]}]}
    status, value, headers = edge.call("POST", "/v2/models/risk/infer", request)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert (value["model_name"], value["model_version"], value["id"]) == ("risk", "1", "7")
    assert value["outputs"][0]["data"] == [row["score"]]


@pytest.mark.parametrize("kind", ["application/octet-stream", "text/plain", None])
def test_no_content_type_is_needed(edge: Any, kind: str | None) -> None:
    body = json.dumps({"inputs": [TENSOR]}).encode()
    headers = {} if kind is None else {"Content-Type": kind}
    assert edge.call("POST", "/v2/models/risk/infer", body, headers)[0] == 200


def test_a_large_request_is_answered_whole(edge: Any) -> None:
    n = 2000
    tensor = {**TENSOR, "shape": [n, WIDTH], "data": [0.0] * (n * WIDTH)}
    status, value, _ = edge.call("POST", "/v2/models/risk/infer", {"inputs": [tensor]})
    assert (status, value["outputs"][0]["shape"]) == (200, [n, 1])


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "text"),
    [
        ("/v2/models/nothing/infer", {"inputs": [TENSOR]}, {}, 404, "nothing"),
        ("/v2/models/risk/versions/9/infer", {"inputs": [TENSOR]}, {}, 404, "9"),
        ("/v2/models/risk/infer", {}, {}, 400, "inputs"),
        ("/v2/models/risk/infer", b"{", {}, 400, "not valid"),
        ("/v2/models/risk/infer", b"", {}, 400, "object"),
        ("/v2/models/risk/infer", {"inputs": [{**TENSOR, "name": "x"}]}, {}, 400, "'x'"),
        ("/v2/models/risk/infer", {"inputs": [{**TENSOR, "shape": [1, 3]}]}, {}, 400, "3"),
        ("/v2/models/risk/infer", {"inputs": [{**TENSOR, "datatype": "FP32"}]}, {}, 400, "FP64"),
        (
            *("/v2/models/risk/infer", {"inputs": [TENSOR]}),
            *({"Inference-Header-Content-Length": "10"}, 400, "JSON"),
        ),
        ("/v2/models/risk/infer", {"inputs": [TENSOR]}, {"x-deadline-ms": "0"}, 504, "deadline"),
        ("/v2/repository/models/nothing/load", b"", {}, 404, "nothing"),
        ("/v2/repository/models/risk/load", {"parameters": {"f": "x"}}, {}, 400, "registry"),
        ("/v2/repository/models/nothing/unload", b"", {}, 404, "nothing"),
        ("/v2/repository/models/risk/unload", b"", {}, 409, "route"),
    ],
    ids=str,
)
def test_errors_are_plain(
    edge: Any, path: str, body: Any, headers: dict[str, str], status: int, text: str
) -> None:
    found, value, got = edge.call("POST", path, body, headers)
    assert (found, got["content-type"]) == (status, "application/json")
    assert value.keys() == {"error"}
    assert text in value["error"]


def test_an_unknown_model_is_not_ready(edge: Any) -> None:
    status, value, _ = edge.call("GET", "/v2/models/nothing/ready")
    assert status == 400
    assert "nothing" in value["error"]


@pytest.mark.parametrize("body", [b"", b"{}", b'{"ready": true}'])
def test_the_index_takes_an_empty_body(edge: Any, body: bytes) -> None:
    status, value, _ = edge.call("POST", "/v2/repository/index", body)
    assert (status, value) == (
        200,
        [{"name": "risk", "version": "1", "state": "READY", "reason": ""}],
    )


def test_the_server_names_its_extensions_and_not_the_binary_one(edge: Any) -> None:
    value = edge.call("GET", "/v2")[1]
    assert value["name"] == "mlpd"
    assert "binary_tensor_data" not in value["extensions"]
    assert edge.call("GET", "/v2/models/stats")[1]["model_stats"]
