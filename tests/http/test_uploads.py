"""ONNX files and archives over HTTP: taken, looked at, served beside trained models, or refused."""

import asyncio
import http.client
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import mlpd
from mlpd.client import Client
from mlpd.core.errors import ConflictError, InvalidRequestError, NotFoundError, TooLargeError
from mlpd.registry.descriptors import Descriptor
from mlpd.registry.referrers import build_referrers
from mlpd.registry.signing import create_key, sign
from tests.http import edge as edges

FLOATS = TensorProto.FLOAT


def network(seed: int = 0, width: int = 4) -> bytes:
    """A small neural network: x [n, width] to y [n, 2]."""
    rng = np.random.default_rng(seed)
    weights = {
        "w1": rng.normal(size=(width, 8)),
        "b1": rng.normal(size=8),
        "w2": rng.normal(size=(8, 2)),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["s"]),
        helper.make_node("Softmax", ["s"], ["y"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", FLOATS, ["n", width])],
        [helper.make_tensor_value_info("y", FLOATS, ["n", 2])],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="by hand")
    return bytes(made.SerializeToString())


def with_metadata(model: bytes, **said: str) -> bytes:
    made = ModelProto.FromString(model)
    helper.set_model_props(made, {name.replace("_", "."): value for name, value in said.items()})
    return bytes(made.SerializeToString())


def tensor(name: str, values: Any) -> dict[str, Any]:
    array = np.asarray(values, np.float32)
    return {
        "name": name,
        "datatype": "FP32",
        "shape": list(array.shape),
        "data": array.ravel().tolist(),
    }


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A filled daemon for this module alone, which leaves models in it."""
    with edges.serve(tmp_path_factory.mktemp("uploads") / "data") as running:
        edges.fill(running)
        yield running


ROWS = np.arange(12).reshape(3, 4) / 7


def infer(edge: Any, model: str) -> Any:
    status, value, _ = edge.call(
        "POST", f"/v2/models/{model}/infer", {"inputs": [tensor("x", ROWS)]}
    )
    assert status == 200, value
    return value["outputs"][0]


def code_of(error: type[Exception], call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    code: str = caught.value.code  # type: ignore[attr-defined]
    return code


def leftovers(edge: Any) -> list[Path]:
    return list((edge.daemon.paths.registry / ".mlpd" / "tmp").iterdir())


def test_an_uploaded_network_answers_beside_the_trained_model(edge: Any, client: Client) -> None:
    done = client.models.register("net", network(), why="from research")
    assert (done["version"]["number"], done["version"]["state"]) == (1, "ready")
    assert client.models.register("net", network())["version"]["number"] == 1
    shown = client.models.version("net", 1)
    assert sorted(shown["files"]) == ["lineage.json", "model.onnx", "signature.json"]
    assert shown["lineage"]["producer"] == "by hand"
    assert (shown["lineage"]["nodes"], shown["lineage"]["parameters"]) == (4, 4 * 8 + 8 + 8 * 2)
    assert shown["version"]["reason"] == "from research"
    assert code_of(NotFoundError, client.models.load, "net") == "unknown_alias"
    client.models.move_alias("net", "champion", 1)
    client.models.load("net")
    metadata = edge.call("GET", "/v2/models/net")[1]
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    found = infer(edge, "net")
    assert np.allclose(np.sum(np.reshape(found["data"], (3, 2)), axis=1), 1)
    assert edge.call("GET", "/v1/routes/risk")[1]["serving"] == {"risk": "risk@1"}
    assert client.predict("risk", [{"user": "a", "age": 0.5}])["predictions"]

    second = client.models.register("net", network(1))["version"]["number"]
    client.models.move_alias("net", "champion", second)
    assert infer(edge, "net")["data"] != found["data"]  # what is loaded follows its alias
    assert client.models.roll_back("net", "champion")["version"] == 1
    assert infer(edge, "net") == found
    assert code_of(ConflictError, client.models.delete_alias, "net", "champion") == "model_in_use"
    assert code_of(ConflictError, client.models.set_state, "net", 1, "archived") == "version_in_use"
    assert code_of(ConflictError, client.drift, "net") == "not_trained_here"
    arms = {"service": "risk", "arms": [{"model": "net@1"}]}
    assert code_of(InvalidRequestError, client.routes.put, "net", arms) == "route_mismatch"
    assert client.run_consistency()["mismatched_rows"] == 0
    client.models.load("net", loaded=False)
    assert edge.call("GET", "/v2/models/net/ready")[0] == 400
    client.models.delete_alias("net", "champion")
    assert leftovers(edge) == []


def test_golden_rows_are_checked_before_the_model_is_taken(edge: Any, client: Client) -> None:
    rows = [[1.0, 0.0, 0.0, 0.0]]
    client.models.register("golden", network(2))
    client.models.move_alias("golden", "champion", 1)
    client.models.load("golden")
    body = {"inputs": [tensor("x", rows)]}
    outputs = edge.call("POST", "/v2/models/golden/infer", body)[1]["outputs"]
    golden: dict[str, Any] = {"inputs": [tensor("x", rows)], "outputs": outputs, "rtol": 1e-6}
    done = client.models.register("golden", network(2), golden=golden)
    assert done["version"]["number"] == 2
    assert "golden.json" in client.models.version("golden", 2)["files"]
    client.models.move_alias("golden", "champion", 2)  # loads it, and runs its golden rows
    assert edge.call("POST", "/v2/models/golden/infer", body)[1]["model_version"] == "2"
    wrong = json.loads(json.dumps(golden))
    wrong["outputs"][0]["data"][0] += 0.01
    register = client.models.register
    for spoilt, code in (
        (wrong, "golden_mismatch"),
        ({**golden, "rtol": 2}, "invalid_golden"),
        ({**golden, "inputs": []}, "invalid_golden"),
        ({**golden, "inputs": golden["inputs"] * 2}, "invalid_golden"),
        ({**golden, "outputs": [{**outputs[0], "name": "z"}]}, "invalid_golden"),
        ({**golden, "outputs": [{**outputs[0], "data": [1]}]}, "wrong_count"),
        ({"rows": 3}, "invalid_golden"),
    ):
        assert code_of(InvalidRequestError, register, "g2", network(2), golden=spoilt) == code
    assert code_of(NotFoundError, client.models.get, "g2") == "unknown_model"
    assert leftovers(edge) == []


def test_what_is_loaded_is_loaded_after_a_restart(tmp_path: Path) -> None:
    with edges.serve(tmp_path / "data") as running, Client(running.url) as client:
        client.models.register("net", network())
        client.models.move_alias("net", "champion", 1)
        client.models.load("net")
        before = infer(running, "net")
        (running.daemon.paths.registry / ".mlpd" / "tmp" / "upload-left").mkdir()
    with edges.serve(tmp_path / "data") as running:
        assert infer(running, "net") == before
        assert leftovers(running) == []
        assert running.call("POST", "/v1/fsck")[1]["clean"]
        running.call("POST", "/v2/repository/models/net/unload")
    with edges.serve(tmp_path / "data") as running:
        assert running.call("GET", "/v2/models/net/ready")[0] == 400


def test_a_version_goes_to_another_daemon_with_its_digest(
    client: Client, fresh: Any, edge: Any
) -> None:
    client.models.register("moved", network(3))
    with Client(fresh.url) as other:
        for name in ("risk", "moved"):
            archive = client.models.archive(name, 1)
            assert client.models.archive(name, 1) == archive
            done = other.models.adopt(archive, why="from staging")["version"]
            there = client.models.version(name, 1)
            assert (done["name"], done["number"]) == (name, 1)
            assert done["digest"] == there["version"]["digest"]
            assert other.models.version(name, 1)["lineage"] == there["lineage"]
            assert other.models.adopt(archive)["version"]["number"] == 1
        other.models.move_alias("risk", "champion", 1)
        other.routes.put("risk", {"service": "risk", "arms": [{"model": "risk@champion"}]})
        assert other.predict("risk", [{"user": "a", "age": 0.5}])["predictions"]
        assert other.fsck()["clean"]
    assert leftovers(edge) == leftovers(fresh) == []


def send(
    edge: Any, path: str, body: bytes, kind: str, length: int | None = None
) -> tuple[int, str]:
    connection = http.client.HTTPConnection(edge.host, timeout=30)
    headers = {"Content-Type": kind, "Content-Length": str(length or len(body))}
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())["error"]["code"]
    finally:
        connection.close()


FORM = "multipart/form-data; boundary=x"


def form(*parts: tuple[str, bytes]) -> bytes:
    lines = [
        b'--x\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (name.encode(), content)
        for name, content in parts
    ]
    return b"".join(lines) + b"--x--\r\n"


@pytest.mark.parametrize(
    ("body", "kind", "code"),
    [
        (form(("golden", b"{}")), FORM, "missing_field"),
        (form(("model", b"x"), ("model", b"x")), FORM, "unknown_field"),
        (form(("model", b"x"), ("other", b"x")), FORM, "unknown_field"),
        (form(("model", network()), ("golden", b"{")), FORM, "invalid_golden"),
        (form(("model", network()), ("golden", b"[" * 100_000)), FORM, "invalid_golden"),
        (b"no form", FORM, "malformed_body"),
        (b"", FORM, "malformed_body"),
        (form(("model", b"x")), "multipart/form-data", "malformed_body"),
        (b"", "application/octet-stream", "invalid_model"),
        (b"junk", "application/octet-stream", "invalid_model"),
    ],
)
def test_a_malformed_upload_is_refused_by_name(
    edge: Any, body: bytes, kind: str, code: str
) -> None:
    assert send(edge, "/v1/models/bad/versions", body, kind) == (400, code)
    assert edge.call("GET", "/v1/models/bad")[0] == 404
    assert leftovers(edge) == []


def test_an_upload_over_the_limit_is_refused(tmp_path: Path) -> None:
    limits = {"upload_bytes_max": 100_000}
    with edges.serve(tmp_path / "data", registry=limits) as running:
        with Client(running.url) as client:
            large = b"\0" * 100_001
            assert code_of(TooLargeError, client.models.register, "net", large) == "body_too_large"
            assert code_of(TooLargeError, client.models.adopt, large) == "body_too_large"
            assert client.models.register("net", network())["version"]["number"] == 1
        assert leftovers(running) == []


def test_names_are_checked_before_anything_is_read(edge: Any) -> None:
    path = "/v1/models/..%2F..%2Fetc/versions"
    answer = send(edge, path, network(), "application/octet-stream")
    assert answer == (400, "invalid_name")


def test_an_upload_whose_client_goes_away_leaves_nothing(edge: Any) -> None:
    connection = http.client.HTTPConnection(edge.host, timeout=30)
    connection.putrequest("POST", "/v1/models/gone/versions")
    connection.putheader("Content-Type", "application/octet-stream")
    connection.putheader("Content-Length", "1000000")
    connection.endheaders(b"x" * 1000)
    while not leftovers(edge):
        asyncio.run(asyncio.sleep(0.01))
    connection.close()
    while leftovers(edge):
        asyncio.run(asyncio.sleep(0.01))
    assert edge.call("GET", "/v1/models/gone")[0] == 404


REGISTER = """
import sys
import tarfile
from mlpd.client import Client
with Client(sys.argv[1]) as client:
    sys.stdin.readline()
    client.models.register("many", open(sys.argv[2], "rb").read())
"""


def test_eight_processes_register_at_once_and_all_versions_are_there(
    fresh: Any, tmp_path: Path
) -> None:
    workers = []
    environment = os.environ | {"PYTHONPATH": str(Path(mlpd.__file__).parents[1])}
    for seed in range(8):
        path = tmp_path / f"{seed}.onnx"
        path.write_bytes(network(seed))
        command = [sys.executable, "-c", REGISTER, fresh.url, str(path)]
        workers.append(subprocess.Popen(command, stdin=subprocess.PIPE, env=environment))
    for worker in workers:
        worker.communicate(b"go\n", timeout=50)
    with Client(fresh.url) as client:
        versions = client.models.get("many")["versions"]
        assert [v["number"] for v in versions] == list(range(1, 9))
        digests = {v["digest"] for v in versions}
        assert len(digests) == 8
        assert client.fsck()["clean"]
    index = json.loads((fresh.daemon.paths.registry / "index.json").read_bytes())
    assert {entry["digest"] for entry in index["manifests"]} == digests
    assert leftovers(fresh) == []


def test_hostile_files_harm_neither_the_daemon_nor_anything_outside(tmp_path: Path) -> None:
    """A sample of tests/serving/hostile.py through the whole way; all of it is checked there."""
    hostile, inotify = load_other("hostile"), load_other("inotify")
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "secret.bin").write_bytes(b"\0" * 16)
    (secrets / "symbolic").symlink_to(secrets / "secret.bin")
    (secrets / "hard").hardlink_to(secrets / "secret.bin")
    wanted = {
        "external/symbolic-link/in_initializer": "external_data",
        "external/hard-link/in_constant": "external_data",
        "external/memory/in_subgraph": "external_data",
        "loop/in-function": "unbounded_operator",
        "foreign/com.microsoft/PythonOp": "custom_operator",
        f"giant/constant-{2**31}": "model_does_not_run",
        "truncated/100": "invalid_model",
    }
    files = dict(hostile.corpus(secrets)) | {"truncated/100": network()[:100]}
    limits = {"check_memory_bytes_max": 1 << 30}
    with (
        edges.serve(tmp_path / "data", registry=limits) as running,
        inotify.watched(secrets) as opened,
        Client(running.url) as client,
    ):
        for name, code in wanted.items():
            found = code_of(InvalidRequestError, client.models.register, "bad", files[name])
            assert found == code, name
        assert client.models.list()["models"] == []
        assert client.models.register("good", network())["version"]["number"] == 1
        assert leftovers(running) == []
    assert opened == []


def test_what_takes_too_long_to_look_at_is_refused(tmp_path: Path) -> None:
    endless = load_other("hostile").endless_scan().SerializeToString()
    with edges.serve(tmp_path / "data", registry={"check_timeout_us": 3_000_000}) as running:
        with Client(running.url) as client:
            for _ in range(2):
                code = code_of(InvalidRequestError, client.models.register, "bad", endless)
                assert code == "model_check_failed"
            assert client.models.list()["models"] == []
        assert leftovers(running) == []


def load_other(name: str) -> ModuleType:
    """Import a module of the serving tests."""
    path = Path(__file__).parents[1] / "serving" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"tests_http_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_signature(archive: bytes, key: str, signature: str) -> bytes:
    """Return an archive with one more signature, whatever it is."""
    made = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(archive)) as old,
        tarfile.open(fileobj=made, mode="w") as new,
    ):

        def add(name: str, data: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))

        contents = {member.name: old.extractfile(member) for member in old}
        files = {name: content.read() for name, content in contents.items() if content}
        index = json.loads(files.pop("index.json"))
        found = build_referrers(Descriptor.parse(index["manifests"][0], "v"), {key: signature})
        index["manifests"] += found.entries
        for name, data in files.items():
            add(name, data)
        for digest, data in found.blobs.items():
            add(f"blobs/sha256/{digest.removeprefix('sha256:')}", data)
        add("index.json", json.dumps(index).encode())
    return made.getvalue()


def test_where_keys_are_trusted_nothing_else_is_served(tmp_path: Path) -> None:
    public = create_key(tmp_path / "team.key")
    trust = {"trusted_keys": (public,)}
    with edges.serve(tmp_path / "free") as free, Client(free.url) as client:
        client.models.register("net", network())
        digest = client.models.version("net", 1)["version"]["digest"]
        unsigned = client.models.archive("net", 1)
        key, signature = sign(tmp_path / "team.key", digest)
        client.models.sign("net", 1, key=key, signature=signature)
        assert list(client.models.version("net", 1)["signatures"]) == [public]
        signed = client.models.archive("net", 1)
        client.models.register("net", network(1))
        client.models.move_alias("net", "champion", 2)
        client.models.load("net")
    # The same data under a policy: what is loaded but not signed isn't served any more.
    with edges.serve(tmp_path / "free", registry=trust) as strict:
        assert strict.call("GET", "/v2/models/net/ready")[0] == 400
        with Client(strict.url) as client:
            assert client.models.move_alias("net", "champion", 1)["version"] == 1
            assert code_of(ConflictError, client.models.move_alias, "net", "champion", 2) == (
                "signature_required"
            )
            client.models.load("net")
        assert strict.call("GET", "/v2/models/net/ready")[0] == 200
    with (
        edges.serve(tmp_path / "other", registry=trust) as other,
        Client(other.url) as client,
    ):
        client.models.adopt(unsigned)
        move = client.models.move_alias
        assert code_of(ConflictError, move, "net", "champion", 1) == "signature_required"
        client.models.adopt(signed)  # the same version, with its signature
        assert move("net", "champion", 1)["version"] == 1
        torn = signed.replace(signature.encode(), b"0" * 128)
        assert torn != signed
        assert code_of(InvalidRequestError, client.models.adopt, torn) == "invalid_archive"
        forged = with_signature(unsigned, key, "0" * 128)
        assert code_of(InvalidRequestError, client.models.adopt, forged) == "invalid_signature"
        assert client.fsck()["clean"]


def test_where_keys_are_trusted_a_run_registers_and_goes_no_further(tmp_path: Path) -> None:
    trust = {"trusted_keys": (create_key(tmp_path / "team.key"),)}
    with (
        edges.serve(tmp_path / "data", registry=trust) as running,
        Client(running.url) as client,
    ):
        client.apply(edges.DOCUMENT)
        client.events.send("clicks", edges.sample_events())
        run = client.runs.wait(client.runs.start("risk")["run_id"], timeout_s=50)
        assert (run["state"], run["result"]["deployed"]) == ("succeeded", "none")
        assert client.models.get("risk")["aliases"] == []
        route = {"service": "risk", "arms": [{"model": "risk@1"}]}
        assert code_of(ConflictError, client.routes.put, "risk", route) == "signature_required"
        key, signature = sign(tmp_path / "team.key", run["result"]["digest"])
        client.models.sign("risk", 1, key=key, signature=signature)
        assert client.routes.put("risk", route)["serving"] == {"risk": "risk@1"}


def test_nan_is_refused_where_the_model_says_so_and_the_next_request_served(edge: Any) -> None:
    with Client(edge.url) as client:
        for name, said in (("strict", "refuse"), ("lax", "allow")):
            client.models.register(name, with_metadata(network(), mlpd_missing=said))
            client.models.move_alias(name, "champion", 1)
            client.models.load(name)
        with pytest.raises(InvalidRequestError, match="says mlpd.missing = 'no'"):
            client.models.register("odd", with_metadata(network(), mlpd_missing="no"))
    rows = ROWS.copy()
    rows[1, 2] = rows[2, 0] = np.nan
    body = {"inputs": [tensor("x", rows)]}
    assert edge.call("POST", "/v2/models/lax/infer", body)[0] == 200
    status, value, _ = edge.call("POST", "/v2/models/strict/infer", body)
    assert status == 400
    assert "input 'x' of model strict@1 is NaN in 2 places, first at [1, 2]" in value["error"]
    assert infer(edge, "strict") == infer(edge, "lax")
