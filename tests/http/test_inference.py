"""The Open Inference Protocol over HTTP: paths, answers, plain errors."""

import gzip
import http.client
import json
import math
import struct
import zlib
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


def test_the_server_names_its_extensions(edge: Any) -> None:
    value = edge.call("GET", "/v2")[1]
    assert value["name"] == "mlpd"
    assert "binary_tensor_data" in value["extensions"]
    assert edge.call("GET", "/v2/models/stats")[1]["model_stats"]


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v2/models/risk/infer"), ("POST", "/v2/models/risk"), ("DELETE", "/v2/logging")],
)
def test_a_wrong_method_is_405_and_plain(edge: Any, method: str, path: str) -> None:
    status, value, headers = edge.call(method, path)
    assert (status, headers["content-type"]) == (405, "application/json")
    assert headers["allow"] in value["error"]


def binary_body(document: dict[str, Any], *blobs: bytes) -> tuple[bytes, dict[str, str]]:
    head = json.dumps(document).encode()
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }
    return b"".join((head, *blobs)), headers


def test_kserves_client_is_understood(edge: Any) -> None:
    """Its InferRequest.to_rest: a model_name, an id always, parameters that say binary_data_size.

    Installing it takes 450 MB (it brings kubernetes, grpc and pandas), hence only its requests.
    """
    row = [0.5] * WIDTH
    document = {
        "id": "1f7c0e5e-65a5-4c5f-8a3b-1d9f8ef7c9d3",
        "model_name": "risk",
        "inputs": [{**TENSOR, "parameters": {"binary_data_size": 8 * WIDTH}}],
        "outputs": [{"name": "score", "parameters": {"binary_data": True}}],
        "parameters": {"binary_data_output": True},
    }
    del document["inputs"][0]["data"]
    body, headers = binary_body(document, struct.pack(f"<{WIDTH}d", *row))
    status, value, got = edge.call("POST", "/v2/models/risk/infer", body, headers)
    assert (status, got["content-type"]) == (200, "application/octet-stream")
    head = int(got["inference-header-content-length"])
    answer = json.loads(value[:head])
    assert (answer["id"], answer["model_version"]) == (document["id"], "1")
    (output,) = answer["outputs"]
    assert output == {
        "name": "score",
        "datatype": "FP64",
        "shape": [1, 1],
        "parameters": {"binary_data_size": 8},
    }
    text = edge.call("POST", "/v2/models/risk/infer", {"inputs": [{**TENSOR, "data": row}]})[1]
    assert list(struct.unpack("<d", value[head:])) == text["outputs"][0]["data"]


@pytest.mark.parametrize(
    ("accept", "encoding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("br;q=1.0, deflate;q=0.5, gzip;q=0.2", "gzip"),
        ("gzip;q=0, deflate", "deflate"),
        ("gzip; q=0", None),
        ("gzip;q=x", None),
        ("*", None),
        ("identity", None),
        ("", None),
    ],
)
@pytest.mark.parametrize("binary", [False, True])
def test_large_answers_are_compressed_as_accepted(
    edge: Any, accept: str, encoding: str | None, binary: bool
) -> None:
    n = 300
    tensor = {**TENSOR, "shape": [n, WIDTH], "data": [0.0] * (n * WIDTH)}
    request = {"inputs": [tensor], "parameters": {"binary_data_output": binary}}
    connection = http.client.HTTPConnection(edge.host, timeout=30)
    headers = {"Accept-Encoding": accept} if accept else {}
    connection.request("POST", "/v2/models/risk/infer", json.dumps(request), headers)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    assert response.headers.get("Content-Encoding") == encoding
    assert (len(data) < 8 * n) == (encoding is not None)
    inflate = {"gzip": gzip.decompress, "deflate": zlib.decompress}
    data = inflate[encoding](data) if encoding else data
    head = int(response.headers.get("Inference-Header-Content-Length", len(data)))
    assert len(data) - head == (8 * n if binary else 0)
    assert json.loads(data[:head])["outputs"][0]["shape"] == [n, 1]


def test_small_answers_are_not_compressed(edge: Any) -> None:
    body, headers = {"inputs": [TENSOR]}, {"Accept-Encoding": "gzip"}
    got = edge.call("POST", "/v2/models/risk/infer", body, headers)[2]
    assert "content-encoding" not in got


def test_the_inflated_size_is_capped(edge: Any) -> None:
    body = gzip.compress(b" " * (64 << 20))
    assert len(body) < edge.daemon.config.server.body_bytes_max
    headers = {"Content-Encoding": "gzip"}
    status, value, _ = edge.call("POST", "/v2/models/risk/infer", body, headers)
    assert status == 413
    assert "over the limit" in value["error"]


SIZED = {key: value for key, value in TENSOR.items() if key != "data"}
VECTOR = bytes(8 * WIDTH)


def sized(size: Any, **changes: Any) -> dict[str, Any]:
    return {"inputs": [{**SIZED, "parameters": {"binary_data_size": size}, **changes}]}


@pytest.mark.parametrize(
    ("document", "blob", "length", "text"),
    [
        (sized(8 * WIDTH), VECTOR, "-1", "bytes"),
        (sized(8 * WIDTH), VECTOR, "9" * 30, "bytes"),
        (sized(8 * WIDTH), VECTOR, "x", "bytes"),
        (sized(8 * WIDTH), VECTOR, "\u00b2", "bytes"),
        (sized(8 * WIDTH), VECTOR, "0", "not a JSON object"),
        (sized(8 * WIDTH), VECTOR, "7", "not valid"),
        (sized(8 * WIDTH), b"", None, "0 bytes are left"),
        (sized(8 * WIDTH), VECTOR + b"\0", None, "1 bytes of the body belong to no input"),
        (sized(8 * WIDTH - 1), VECTOR, None, "has 55 bytes"),
        (sized(-8), VECTOR, None, "-8"),
        (sized("8"), VECTOR, None, "bytes are left"),
        (sized(8 * WIDTH, data=[0.0] * WIDTH), VECTOR, None, "two kinds"),
        (sized(8 * WIDTH, shape=[2**62, 2**62]), VECTOR, None, "shape"),
        (sized(8 * WIDTH, datatype="BYTES"), VECTOR, None, "more than 7 values"),
        (sized(8 * WIDTH, datatype="BOOL"), VECTOR, None, "takes 7"),
    ],
)
def test_wrong_bytes_are_explained(
    edge: Any, document: Any, blob: bytes, length: str | None, text: str
) -> None:
    body, headers = binary_body(document, blob)
    if length is not None:
        headers["Inference-Header-Content-Length"] = length
    status, value, got = edge.call("POST", "/v2/models/risk/infer", body, headers)
    assert (status, got["content-type"]) == (400, "application/json")
    assert text in value["error"]
