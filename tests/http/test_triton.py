"""Triton's own client, unmodified, against a daemon: whatever it can ask of a server."""

import asyncio
import gc
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from mlpd.serving import table as table_module
from mlpd.serving.datatypes import DATATYPES
from mlpd.serving.graphs import read_signature
from mlpd.serving.package import ModelPackage
from mlpd.serving.routes import ModelRef

WIDTH = 7
ELEMENTS = {
    **{name: getattr(TensorProto, name) for name in DATATYPES if hasattr(TensorProto, name)},
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
VALUES: dict[str, list[Any]] = {
    "BOOL": [True, False, True, True],
    "FP16": [0.5, -0.0, float("inf"), float("nan")],
    "FP32": [0.1, -0.0, float("-inf"), float("nan")],
    "FP64": [0.1, 1e300, float("-inf"), float("nan")],
    "BYTES": ["", "ü", "a" * 300, "\0"],
}


def values_of(datatype: str) -> NDArray[Any]:
    dtype = DATATYPES[datatype]
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return np.array([[info.min, info.max], [0, 1]], dtype)
    return np.array(VALUES[datatype], dtype).reshape(2, 2)


def every_datatype() -> ModelPackage:
    """A user's graph with an input and an output, equal to it, of every datatype."""
    pairs = [(f"x_{name}", f"y_{name}", element) for name, element in ELEMENTS.items()]
    graph = helper.make_graph(
        [helper.make_node("Identity", [x], [y]) for x, y, _ in pairs],
        "every",
        [helper.make_tensor_value_info(x, element, [None, 2]) for x, _, element in pairs],
        [helper.make_tensor_value_info(y, element, [None, 2]) for _, y, element in pairs],
    )
    made: onnx.ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    data = made.SerializeToString()
    return ModelPackage("every", 1, "sha256:every", data, read_signature(data))


@pytest.fixture(scope="module")
def every(edge: Any) -> Iterator[None]:
    """The daemon of all tests, whose registry gives it the user's graph `every` as well."""
    table, package = edge.daemon.models, every_datatype()
    fetch, aliases = table._fetch, table._aliases

    async def fetch_also(model: str, version: int) -> ModelPackage:
        return package if model == "every" else await fetch(model, version)

    def run(change: Any) -> None:
        asyncio.run_coroutine_threadsafe(change, edge.loop).result(30)

    table._fetch = fetch_also
    table._aliases = lambda model: {"champion": 1} if model == "every" else aliases(model)
    run(table.load(ModelRef("every", "champion")))
    yield
    run(table.unload("every"))
    table._fetch, table._aliases = fetch, aliases


@pytest.fixture(scope="module")
def triton(edge: Any) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(edge.host, concurrency=8) as client:
        yield client
    del client
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()  # it leaves some of its sockets to the garbage collector


def vectors(count: int) -> NDArray[np.float64]:
    rows = np.random.default_rng(3).normal(size=(count, WIDTH))
    rows[:, 0] = np.arange(count) % 3
    rows[::5, 3] = np.nan
    return rows


def features(rows: NDArray[np.float64], *, binary: bool = True) -> list[InferInput]:
    found = InferInput("features", list(rows.shape), "FP64")
    return [found.set_data_from_numpy(rows, binary_data=binary)]


def test_it_finds_the_server_and_its_models(triton: InferenceServerClient) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("risk")
    assert triton.is_model_ready("risk", "1")
    assert not triton.is_model_ready("risk", "9")
    assert not triton.is_model_ready("nothing")
    assert "binary_tensor_data" in triton.get_server_metadata()["extensions"]
    metadata = triton.get_model_metadata("risk", "champion")
    assert metadata["inputs"] == [{"name": "features", "datatype": "FP64", "shape": [-1, WIDTH]}]
    config = triton.get_model_config("risk")
    assert config["input"] == [{"name": "features", "data_type": "TYPE_FP64", "dims": [WIDTH]}]
    assert {"name": "risk", "version": "1", "state": "READY", "reason": ""} in (
        triton.get_model_repository_index()
    )


def test_statistics_count_its_requests(triton: InferenceServerClient) -> None:
    (before,) = triton.get_inference_statistics("risk", "1")["model_stats"]
    triton.infer("risk", features(vectors(3)))
    (after,) = triton.get_inference_statistics("risk")["model_stats"]
    assert after["inference_count"] - before["inference_count"] == 3
    success = [stats["inference_stats"]["success"]["count"] for stats in (before, after)]
    assert success[1] - success[0] == 1
    names = {stats["name"] for stats in triton.get_inference_statistics()["model_stats"]}
    assert "risk" in names


@pytest.mark.usefixtures("every")
@pytest.mark.parametrize("binary_out", [True, False, None])
@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("rows", [2, 0])
def test_every_datatype_comes_back_as_it_went(
    triton: InferenceServerClient, rows: int, binary_in: bool, binary_out: bool | None
) -> None:
    sent = {name: values_of(name)[:rows] for name in ELEMENTS}
    inputs = [
        InferInput(f"x_{name}", [rows, 2], name).set_data_from_numpy(value, binary_data=binary_in)
        for name, value in sent.items()
    ]
    asked = {f"y_{name}": InferRequestedOutput(f"y_{name}", bool(binary_out)) for name in sent}
    outputs = None if binary_out is None else list(asked.values())
    result = triton.infer("every", inputs, outputs=outputs)
    for name, value in sent.items():
        got = result.as_numpy(f"y_{name}")
        assert got.shape == (rows, 2)
        if name == "BYTES":
            texts = [v.decode() if isinstance(v, bytes) else v for v in got.ravel()]
            assert texts == value.ravel().tolist()
        else:
            assert np.array_equal(got, value, equal_nan=name.startswith("FP"))
            assert got.dtype == value.dtype


def test_bits_are_the_same_in_json_and_binary_and_in_one_request_or_many(
    triton: InferenceServerClient,
) -> None:
    rows = vectors(40)
    whole = triton.infer("risk", features(rows)).as_numpy("score")
    text = triton.infer(
        "risk",
        features(rows, binary=False),
        outputs=[InferRequestedOutput("score", binary_data=False)],
    )
    assert text.as_numpy("score").tobytes() == whole.tobytes()
    one = [triton.infer("risk", features(rows[i : i + 1])).as_numpy("score") for i in range(40)]
    assert np.concatenate(one).tobytes() == whole.tobytes()


def test_many_at_once_get_their_own_answers(triton: InferenceServerClient) -> None:
    rows = vectors(300)
    whole = triton.infer("risk", features(rows)).as_numpy("score")
    sizes = [1, 2, 3, 1, 5, 1, 280, 7]
    parts, start = [], 0
    for size in sizes:
        parts.append((start, start + size))
        start += size
    waiting = [triton.async_infer("risk", features(rows[a:b]), request_id=str(a)) for a, b in parts]
    for (a, b), handle in zip(parts, waiting, strict=True):
        result = handle.get_result()
        assert result.get_response()["id"] == str(a)
        assert result.as_numpy("score").tobytes() == whole[a:b].tobytes()


def test_outputs_classes_priority_and_timeout(triton: InferenceServerClient) -> None:
    asked = [
        InferRequestedOutput("raw_score"),
        InferRequestedOutput("score", binary_data=False),
        InferRequestedOutput("score", class_count=1),
    ]
    result = triton.infer(
        "risk",
        features(vectors(2)),
        model_version="1",
        outputs=asked[:2],
        request_id="42",
        priority=1,
        timeout=20_000_000,
        parameters={"anything": "ignored"},
    )
    assert result.get_response()["id"] == "42"
    raw, score = result.as_numpy("raw_score"), result.as_numpy("score")
    assert score == pytest.approx(1 / (1 + np.exp(-raw)))
    ranked = triton.infer("risk", features(vectors(2)), outputs=asked[2:]).as_numpy("score")
    assert [text.decode() for text in ranked.ravel()] == [f"{s!r}:0" for s in score[:, 0].tolist()]


@pytest.mark.parametrize("rows", [1, 2_000])
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_both_ways_may_be_compressed(
    triton: InferenceServerClient, encoding: str, binary: bool, rows: int
) -> None:
    outputs = [InferRequestedOutput("score", binary_data=binary)]
    plain = triton.infer("risk", features(vectors(rows)), outputs=outputs)
    packed = triton.infer(
        "risk",
        features(vectors(rows), binary=binary),
        outputs=outputs,
        request_compression_algorithm=encoding,
        response_compression_algorithm=encoding,
    )
    assert packed.as_numpy("score").tobytes() == plain.as_numpy("score").tobytes()


@pytest.mark.usefixtures("every")
def test_models_are_loaded_and_unloaded(triton: InferenceServerClient) -> None:
    assert triton.is_model_ready("every")
    triton.unload_model("every")
    assert not triton.is_model_ready("every")
    with pytest.raises(InferenceServerException, match="unknown model 'every'"):
        triton.get_model_metadata("every")
    triton.load_model("every")
    assert triton.is_model_ready("every")
    with pytest.raises(InferenceServerException, match="come from the registry"):
        triton.load_model("every", config="{}", files={"file:1/model.onnx": b"x"})
    with pytest.raises(InferenceServerException, match="route 'risk' uses"):
        triton.unload_model("risk")


@pytest.mark.usefixtures("every")
def test_an_evicted_model_is_ready_and_comes_back_when_asked(
    edge: Any, triton: InferenceServerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, evictions = edge.daemon.models, edge.daemon.models.evictions
    monkeypatch.setattr(table_module, "LOAD_WAIT_S", 30.0)

    async def evict() -> None:
        table._fit()

    monkeypatch.setattr(table._budget, "bytes_max", 1)
    asyncio.run_coroutine_threadsafe(evict(), edge.loop).result(30)
    assert (table.evictions, list(table.models())) == (evictions + 1, ["risk"])
    assert triton.is_model_ready("every")
    assert triton.get_inference_statistics("every")["model_stats"] == []
    with pytest.raises(InferenceServerException, match="MB are allowed"):
        triton.load_model("every")
    assert triton.get_model_metadata("every")["versions"] == ["1"]
    assert list(table.models()) == ["risk", "every"]


def test_settings_say_what_is_so_and_stay(triton: InferenceServerClient) -> None:
    assert triton.get_trace_settings()["trace_level"] == ["OFF"]
    assert triton.get_trace_settings("risk")["trace_level"] == ["OFF"]
    assert triton.get_log_settings()["log_verbose_level"] == 0
    assert triton.get_system_shared_memory_status() == []
    assert triton.get_cuda_shared_memory_status() == []
    with pytest.raises(InferenceServerException, match="no region 'region'"):
        triton.get_system_shared_memory_status("region")
    triton.unregister_system_shared_memory()
    triton.unregister_cuda_shared_memory("region")
    for change in (
        lambda: triton.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]}),
        lambda: triton.update_log_settings({"log_verbose_level": 1}),
        lambda: triton.register_system_shared_memory("region", "/key", 8),
        lambda: triton.register_cuda_shared_memory("region", b"handle", 0, 8),
    ):
        with pytest.raises(InferenceServerException, match="can't be changed"):
            change()


def renamed(name: str) -> list[InferInput]:
    found = features(vectors(1))
    found[0]._name = name
    return found


@pytest.mark.parametrize(
    ("model", "version", "inputs", "status", "message"),
    [
        ("nothing", "", features(vectors(1)), "404", "unknown model 'nothing'"),
        ("risk", "9", features(vectors(1)), "404", "no loaded version '9'"),
        ("risk", "", renamed("x"), "400", "no input 'x'"),
        ("risk", "", features(vectors(1)[:, :3]), "400", "got \\[1, 3\\]"),
        (
            *("risk", ""),
            [
                InferInput("features", [1, WIDTH], "FP32").set_data_from_numpy(
                    np.zeros((1, WIDTH), np.float32)
                )
            ],
            *("400", "is FP64, got FP32"),
        ),
    ],
)
def test_errors_reach_the_caller(
    triton: InferenceServerClient,
    model: str,
    version: str,
    inputs: list[InferInput],
    status: str,
    message: str,
) -> None:
    with pytest.raises(InferenceServerException, match=message) as caught:
        triton.infer(model, inputs, model_version=version)
    assert caught.value.status() == status


def test_shared_memory_and_late_work_are_refused(triton: InferenceServerClient) -> None:
    shared = InferInput("features", [1, WIDTH], "FP64")
    shared.set_shared_memory("region", 8 * WIDTH)
    with pytest.raises(InferenceServerException, match="lies in shared memory"):
        triton.infer("risk", [shared])
    output = InferRequestedOutput("score")
    output.set_shared_memory("region", 8)
    with pytest.raises(InferenceServerException, match="lies in shared memory"):
        triton.infer("risk", features(vectors(1)), outputs=[output])
    with pytest.raises(InferenceServerException, match="deadline") as caught:
        triton.infer("risk", features(vectors(2_000)), timeout=1)
    assert caught.value.status() == "504"
