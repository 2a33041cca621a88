"""Brings an ONNX graph of a plugin's into the form that is served: vectors in, raw scores out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlpd.core.errors import ValidationError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

INPUT, OUTPUT = "features", "raw_score"
OPSETS = {"": 18, "ai.onnx.ml": 3}
"""What exporters should be asked for; `adapt_onnx` takes whatever opset a graph has."""

_OWN = "mlpd_"
"""How the tensors added here are called."""


@dataclass(frozen=True, slots=True)
class Preparation:
    """Nodes in front of a graph: from `features` (float64) to the tensor `output` (float64)."""

    nodes: Sequence["NodeProto"]
    constants: Sequence["TensorProto"]
    output: str


def adapt_onnx(
    onnx: bytes,
    *,
    width: int,
    outputs: int = 1,
    output: str | None = None,
    column: int | None = None,
    chances: bool = False,
    preparation: Preparation | None = None,
) -> bytes:
    """Return `onnx` with the input `features` float64 [-1, width] and the output `raw_score`.

    `output` names the tensor to serve, an output of the graph or one inside it; None is the last
    output of floats (scikit-learn's probabilities come after the label).  `column` picks one of
    its columns (-1: the last); otherwise it must hold `outputs` values a row.  `chances` are kept
    within 0 and 1: summed in float32 they may be 1.0000001.  A float32 graph is fed the nearest
    float32.  What the output doesn't need is left out.  The same graph gives the same bytes.

    Onnxruntime's Sigmoid, Softmax, Exp, Tanh and ReduceSum give a row other bits in another batch:
    serve the tensor before the last one of them, and name the link instead.

    Raises ValidationError(code="plugin_graph"): another number of inputs, no such output, a map or
    sequence instead of a tensor, unreadable bytes.
    """
    from onnx import TensorProto, helper  # noqa: PLC0415 - costs 0.2 s, only children pay it

    model = _parse(onnx)
    source = _input_of(model, None if preparation else width)
    target = _output_of(model, output)
    before = list(preparation.nodes) if preparation else []
    kind = _element(source)
    prepared = preparation.output if preparation else INPUT
    before.append(helper.make_node("Cast", [prepared], [source.name], to=kind))
    after, constants = _tail(target, outputs, column, chances=chances)
    graph = helper.make_graph(
        _needed([*before, *model.graph.node, *after]),
        "plugin",
        [helper.make_tensor_value_info(INPUT, TensorProto.DOUBLE, [None, width])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.DOUBLE, [None, outputs])],
        initializer=[*model.graph.initializer, *constants, *_constants_of(preparation)],
    )
    made = helper.make_model(
        graph,
        producer_name=f"mlpd from {model.producer_name}"[:200],
        ir_version=model.ir_version,
        opset_imports=_opsets(model),
        functions=list(model.functions),
    )
    written: bytes = made.SerializeToString(deterministic=True)
    return written


def _parse(onnx: bytes) -> "ModelProto":
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # noqa: PLC0415
    from onnx import load_from_string  # noqa: PLC0415

    try:
        return load_from_string(onnx)
    except DecodeError:
        raise _refused(f"these {len(onnx)} bytes are no ONNX model") from None


def _input_of(model: "ModelProto", width: int | None) -> "ValueInfoProto":
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1 or _element(inputs[0]) not in _float_kinds():
        names = [value.name for value in inputs]
        raise _refused(f"it has the inputs {names}, expected one of float or double, [-1, F]")
    dims = inputs[0].type.tensor_type.shape.dim
    fixed = dims[1].dim_value if len(dims) > 1 else 0
    if width is not None and (len(dims) != 2 or fixed not in (0, width)):  # noqa: PLR2004
        sizes = [dim.dim_value or -1 for dim in dims]
        raise _refused(f"its input is {sizes}, expected [-1, {width}]")
    source: ValueInfoProto = inputs[0]
    return source


def _output_of(model: "ModelProto", name: str | None) -> str:
    """Return the name of the tensor to serve."""
    outputs = list(model.graph.output)
    kinds = {value.name: _element(value) for value in outputs}
    made = {tensor for node in model.graph.node for tensor in node.output}
    if name is None:
        floats = [value.name for value in outputs if _element(value) in _float_kinds()]
        if floats:
            return str(floats[-1])
        wanted = "one of float or double"
    elif name in made and kinds.get(name) in (None, *_float_kinds()):
        return name
    else:
        wanted = repr(name)
    raise _refused(
        f"it has the outputs {list(kinds)}, expected {wanted} (zipmap=False for scikit-learn)"
    )


def _tail(
    target: str, outputs: int, column: int | None, *, chances: bool
) -> tuple[list["NodeProto"], list["TensorProto"]]:
    """Return what makes `raw_score` float64 [-1, outputs] out of the output."""
    import numpy as np  # noqa: PLC0415
    from onnx import TensorProto, helper  # noqa: PLC0415
    from onnx.numpy_helper import from_array  # noqa: PLC0415

    wide, picked, shaped = (f"{_OWN}{name}" for name in ("wide", "picked", "shaped"))
    nodes = [helper.make_node("Cast", [target], [wide], to=TensorProto.DOUBLE)]
    constants = [from_array(np.array([-1, outputs]), f"{_OWN}shape")]
    if column is not None:
        constants.append(from_array(np.array([column]), f"{_OWN}column"))
        nodes.append(helper.make_node("Gather", [wide, f"{_OWN}column"], [picked], axis=1))
        wide = picked
    nodes.append(helper.make_node("Reshape", [wide, f"{_OWN}shape"], [shaped]))
    if chances:
        ends = [f"{_OWN}least", f"{_OWN}most"]
        constants += [from_array(np.array(float(i)), name) for i, name in enumerate(ends)]
        nodes.append(helper.make_node("Clip", [shaped, *ends], [OUTPUT]))
    else:
        nodes.append(helper.make_node("Identity", [shaped], [OUTPUT]))
    return nodes, constants


def _needed(nodes: Sequence["NodeProto"]) -> list["NodeProto"]:
    """Return the nodes that `raw_score` depends on, in order."""
    wanted, kept = {OUTPUT}, []
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= {*node.input, *_captured(node)}
    return kept[::-1]


def _captured(node: "NodeProto") -> set[str]:
    """Return the names that a node's inner graphs read, from outside or not."""
    inner = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    found = {name for graph in inner for child in graph.node for name in child.input}
    return found.union(*(_captured(child) for graph in inner for child in graph.node))


def _constants_of(preparation: Preparation | None) -> list["TensorProto"]:
    return list(preparation.constants) if preparation else []


def _opsets(model: "ModelProto") -> list[Any]:
    from onnx import helper  # noqa: PLC0415

    versions = {entry.domain: entry.version for entry in model.opset_import}
    versions.setdefault("", OPSETS[""])
    return [helper.make_opsetid(domain, number) for domain, number in sorted(versions.items())]


def _element(value: "ValueInfoProto") -> int:
    """Return the element type of a tensor, 0 for what is none."""
    kind = value.type
    return kind.tensor_type.elem_type if kind.HasField("tensor_type") else 0


def _float_kinds() -> tuple[int, int]:
    from onnx import TensorProto  # noqa: PLC0415

    return TensorProto.FLOAT, TensorProto.DOUBLE


def _refused(problem: str) -> ValidationError:
    return ValidationError(
        f"the trainer's ONNX model can't be served: {problem}",
        code="plugin_graph",
        hint="docs/paths/plugins.md tells what graphs are taken.",
    )
