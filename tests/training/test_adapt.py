"""Graphs of plugins in the form that is served: names, types, columns, and what is refused."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array

from mlpd.core.errors import ValidationError
from mlpd.training.adapt import adapt_onnx

ROWS = np.array([[1.0, 2.0], [0.1, -3.0], [1e-9, 7.0]])


def graph(kind: int = TensorProto.FLOAT, columns: int = 2, **changes: Any) -> bytes:
    """x [n, 2] to `label` int64 and `values`, x * 2; `doubled` is a tensor inside."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["doubled"]),
        helper.make_node("Identity", ["doubled"], ["values"]),
        helper.make_node("ArgMax", ["doubled"], ["label"], axis=1, keepdims=0),
    ]
    info = helper.make_tensor_value_info
    inputs = changes.get("inputs", [info("x", kind, [None, columns])])
    outputs = [info("label", TensorProto.INT64, [None]), info("values", kind, [None, columns])]
    outputs = changes.get("outputs", outputs)
    made = helper.make_graph(nodes, "g", inputs, outputs, [from_array(np.array(2, dtype), "two")])
    opset = [helper.make_opsetid("", 18)]
    written: bytes = helper.make_model(made, ir_version=10, opset_imports=opset).SerializeToString()
    return written


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.DOUBLE])
@pytest.mark.parametrize("output", [None, "values", "doubled"])
def test_an_output_of_floats_becomes_the_raw_score(
    kind: int, output: str | None, onnx_scores: Any
) -> None:
    adapted = adapt_onnx(graph(kind), width=2, outputs=2, output=output)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    expected = (ROWS.astype(dtype) * dtype.type(2)).astype(np.float64)
    assert onnx_scores(adapted)(ROWS).tobytes() == expected.tobytes()


@pytest.mark.parametrize(("column", "place"), [(0, 0), (1, 1), (-1, 1)])
def test_one_column_is_picked(column: int, place: int, onnx_scores: Any) -> None:
    adapted = adapt_onnx(graph(TensorProto.DOUBLE), width=2, column=column)
    assert onnx_scores(adapted)(ROWS).tolist() == (2 * ROWS[:, [place]]).tolist()


def test_chances_stay_within_0_and_1(onnx_scores: Any) -> None:
    adapted = adapt_onnx(graph(TensorProto.DOUBLE), width=2, outputs=2, chances=True)
    assert onnx_scores(adapted)(ROWS).tolist() == np.clip(2 * ROWS, 0, 1).tolist()


def test_what_the_score_does_not_need_is_left_out() -> None:
    adapted = onnx.load_from_string(adapt_onnx(graph(), width=2, outputs=2))
    assert "ArgMax" not in {node.op_type for node in adapted.graph.node}
    onnx.checker.check_model(adapted, full_check=True)


def test_the_same_graph_gives_the_same_bytes() -> None:
    assert adapt_onnx(graph(), width=2, outputs=2) == adapt_onnx(graph(), width=2, outputs=2)


@pytest.mark.parametrize(
    ("given", "options", "problem"),
    [
        (b"no model", {}, "no ONNX model"),
        (graph(), {"width": 3}, r"its input is \[-1, 2\], expected \[-1, 3\]"),
        (graph(), {"output": "missing"}, "expected 'missing'"),
        (graph(), {"output": "label"}, "expected 'label'"),
        (graph(inputs=[]), {}, r"it has the inputs \[\]"),
        (
            graph(inputs=[helper.make_tensor_value_info("x", TensorProto.STRING, [None, 2])]),
            {},
            "expected one of float or double",
        ),
        (
            graph(outputs=[helper.make_tensor_value_info("label", TensorProto.INT64, [None])]),
            {},
            "zipmap",
        ),
    ],
)
def test_what_cannot_be_served_is_named(
    given: bytes, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValidationError, match=problem) as refused:
        adapt_onnx(given, **{"width": 2, "outputs": 2, **options})
    assert refused.value.code == "plugin_graph"
