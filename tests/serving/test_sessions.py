import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mlpd.core.errors import MlpdError, ValidationError
from mlpd.serving.graphs import read_signature
from mlpd.serving.package import GoldenRows, ModelPackage, Signature, TensorSpec
from mlpd.serving.sessions import Session

MakePackage = Callable[..., ModelPackage]
Rows = Callable[..., NDArray[np.float64]]
DOUBLES = (TensorProto.DOUBLE, [None])


def add_w() -> onnx.NodeProto:
    return helper.make_node("Add", ["x", "w"], ["y"])


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_row_scores_the_same_alone_and_in_any_batch(
    tree_package: MakePackage, some_rows: Rows, outputs: int
) -> None:
    session = Session(tree_package(3, outputs=outputs, trees=120))
    rows = some_rows(300, seed=1)
    raw = session.run(rows)
    assert raw.shape == (300, outputs)
    alone = np.concatenate([session.run(rows[i : i + 1]) for i in range(300)])
    assert alone.tobytes() == raw.tobytes()
    assert session.run(rows[100:200]).tobytes() == raw[100:200].tobytes()


@pytest.mark.parametrize("count", [6, 7, 11])
def test_many_rows_are_run_in_parts(
    session: Session, some_rows: Rows, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    rows = some_rows(count)
    expected = session.run(rows)
    sizes, run = list[int](), session._run
    monkeypatch.setattr("mlpd.serving.sessions.ROWS_AT_ONCE", 3)
    monkeypatch.setattr(session, "_run", lambda part: sizes.append(len(part)) or run(part))
    assert session.run(rows).tobytes() == expected.tobytes()
    assert sum(sizes) == count
    assert max(sizes) == 3


def test_an_answer_is_not_changed_by_the_next_run(session: Session, some_rows: Rows) -> None:
    first, second = some_rows(1, seed=1), some_rows(1, seed=2)
    raw = session.run(first)
    kept = raw.copy()
    assert session.run(second).tolist() != kept.tolist()
    assert raw.tolist() == kept.tolist()


def test_a_run_while_the_bound_buffers_are_taken_gives_the_same_bits(
    session: Session, some_rows: Rows
) -> None:
    row = some_rows(1)
    expected = session.run(row)
    assert session._one_row is not None
    with session._one_row._lock:
        assert session.run(row).tobytes() == expected.tobytes()


def test_golden_rows_are_checked_to_the_bit(tree_package: MakePackage) -> None:
    package = tree_package()
    Session(package).verify()
    assert package.golden is not None
    raw = package.golden.outputs["raw_score"].copy()
    raw[5] = np.nextafter(raw[5], np.inf)
    golden = GoldenRows(package.golden.inputs, {"raw_score": raw})
    with pytest.raises(ValidationError, match="golden rows") as caught:
        Session(dataclasses.replace(package, golden=golden)).verify()
    assert caught.value.code == "golden_mismatch"
    assert caught.value.details["row"] == 5


def test_a_wrong_link_is_found_by_the_golden_scores(tree_package: MakePackage) -> None:
    package = dataclasses.replace(tree_package(), link={"kind": "sigmoid", "scale": 1.0001})
    with pytest.raises(ValidationError, match="'score'"):
        Session(package).verify()


def test_a_graph_that_mixes_the_rows_of_a_batch_is_refused(
    tree_package: MakePackage, graph_onnx: Callable[..., bytes]
) -> None:
    package = tree_package()
    matrix = (TensorProto.DOUBLE, [None, 4])
    running_sum = graph_onnx(
        [
            helper.make_node("Slice", ["features", "start", "end", "axis"], ["first"]),
            helper.make_node("CumSum", ["first", "rows"], ["raw_score"]),
        ],
        {"features": matrix},
        {"raw_score": (TensorProto.DOUBLE, [None, 1])},
        [
            helper.make_tensor("start", TensorProto.INT64, [1], [0]),
            helper.make_tensor("end", TensorProto.INT64, [1], [1]),
            helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
            helper.make_tensor("rows", TensorProto.INT64, [], [0]),
        ],
    )
    mixing = dataclasses.replace(package, onnx=running_sum, golden=None)
    assert package.golden is not None
    raw = Session(mixing).run(package.golden.inputs["features"])
    golden = GoldenRows(package.golden.inputs, {"raw_score": raw})
    with pytest.raises(ValidationError, match="'raw_score' differs in row 1"):
        Session(dataclasses.replace(mixing, golden=golden)).verify()


def test_a_graph_with_another_width_is_refused(tree_package: MakePackage) -> None:
    package = tree_package()
    signature = Signature.of_vectors(package.signature.vectorizer, 2)
    with pytest.raises(ValidationError) as caught:
        Session(dataclasses.replace(package, signature=signature))
    assert caught.value.code == "signature_mismatch"


def user_package(onnx_bytes: bytes, golden: GoldenRows | None = None) -> ModelPackage:
    return ModelPackage(
        name="user",
        version=1,
        digest="sha256:0",
        onnx=onnx_bytes,
        signature=read_signature(onnx_bytes),
        golden=golden,
    )


def test_a_users_onnx_file_keeps_its_own_names(graph_onnx: Callable[..., bytes]) -> None:
    made = graph_onnx(
        [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Identity", ["s"], ["t"])],
        {
            "a": (TensorProto.FLOAT, [None, 2]),
            "b": (TensorProto.FLOAT, [None, 2]),
            "s": (TensorProto.STRING, [None]),
        },
        {"sum": (TensorProto.FLOAT, [None, 2]), "t": (TensorProto.STRING, [None])},
    )
    signature = read_signature(made)
    assert signature.inputs[2] == TensorSpec("s", "BYTES", (-1,))
    assert signature.outputs[0] == TensorSpec("sum", "FP32", (-1, 2))
    inputs = {
        "a": np.ones((1, 2), np.float32),
        "b": np.ones((1, 2), np.float32),
        "s": np.array(["x", "ü"], object),
    }
    outputs = Session(user_package(made)).run_named(inputs)
    assert {name: value.tolist() for name, value in outputs.items()} == {
        "sum": [[2.0, 2.0]],
        "t": ["x", "ü"],
    }


def test_golden_rows_of_a_users_file_have_a_tolerance(graph_onnx: Callable[..., bytes]) -> None:
    made = graph_onnx([helper.make_node("Exp", ["x"], ["y"])], {"x": DOUBLES}, {"y": DOUBLES})
    x = np.array([1.0])
    golden = GoldenRows({"x": x}, {"y": np.exp(x) * (1 + 1e-9)}, rtol=1e-6)
    Session(user_package(made, golden)).verify()
    with pytest.raises(ValidationError, match="'y' differs in row 0"):
        Session(user_package(made, dataclasses.replace(golden, rtol=1e-12))).verify()


def test_values_that_the_graph_refuses_are_the_callers_error(
    graph_onnx: Callable[..., bytes],
) -> None:
    made = graph_onnx(
        [helper.make_node("Gather", ["x", "i"], ["y"])],
        {"x": DOUBLES, "i": (TensorProto.INT64, [None])},
        {"y": DOUBLES},
    )
    with pytest.raises(ValidationError) as caught:
        Session(user_package(made)).run_named({"x": np.ones(2), "i": np.array([7])})
    assert caught.value.code == "inference_refused"


def test_external_data_is_refused_wherever_it_hides(graph_onnx: Callable[..., bytes]) -> None:
    hidden = TensorProto(name="w", data_type=TensorProto.DOUBLE, dims=[1])
    hidden.data_location = TensorProto.EXTERNAL
    hidden.external_data.add(key="location", value="secret.bin")
    as_initializer = graph_onnx([add_w()], {"x": DOUBLES}, {"y": DOUBLES}, [hidden])
    constant = helper.make_node("Constant", [], ["w"], value=hidden)
    branch = helper.make_graph(
        [constant], "branch", [], [helper.make_tensor_value_info("w", TensorProto.DOUBLE, [1])]
    )
    in_branch = graph_onnx(
        [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)],
        {"c": (TensorProto.BOOL, [])},
        {"y": DOUBLES},
    )
    for made in (as_initializer, in_branch):
        with pytest.raises(ValidationError) as caught:
            read_signature(made)
        assert caught.value.code == "external_data"


def test_a_tensor_called_location_is_fine(graph_onnx: Callable[..., bytes]) -> None:
    made = graph_onnx(
        [helper.make_node("Identity", ["location"], ["y"])], {"location": DOUBLES}, {"y": DOUBLES}
    )
    assert read_signature(made).inputs[0].name == "location"


def test_an_ort_format_file_is_refused(graph_onnx: Callable[..., bytes], tmp_path: Path) -> None:
    made = graph_onnx([helper.make_node("Neg", ["x"], ["y"])], {"x": DOUBLES}, {"y": DOUBLES})
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "model.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"])
    saved = (tmp_path / "model.ort").read_bytes()
    assert saved[4:8] == b"ORTM"
    with pytest.raises(ValidationError) as caught:
        read_signature(saved)
    assert caught.value.code == "invalid_model"


def custom_operator(graph_onnx: Callable[..., bytes]) -> bytes:
    node = helper.make_node("Launch", ["x"], ["y"], domain="my.ops")
    return graph_onnx([node], {"x": DOUBLES}, {"y": DOUBLES}, domains=("my.ops",))


@pytest.mark.parametrize(
    "make",
    [
        custom_operator,
        lambda _: b"",
        lambda _: b"no protobuf",
        lambda _: b"the word location in no protobuf",
        lambda _: b"\x18\0\0\0ORTM" + bytes(100),
        lambda graph_onnx: custom_operator(graph_onnx)[:-9],
    ],
)
def test_bytes_that_cant_be_served_get_a_clear_error(
    make: Callable[[Any], bytes], graph_onnx: Callable[..., bytes]
) -> None:
    with pytest.raises(MlpdError) as caught:
        read_signature(make(graph_onnx), "model user@1")
    assert caught.value.code == "invalid_model"
    assert caught.value.message.startswith("model user@1 is no ONNX model")
