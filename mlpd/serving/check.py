"""Check: whether a user's ONNX file may be served; for child processes with limits alone.

What the file is made of is looked at first, and only then onnxruntime is let near it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlpd.core.errors import MlpdError, ValidationError
from mlpd.serving.datatypes import DATATYPES
from mlpd.serving.golden import parse_golden
from mlpd.serving.graphs import parse_model, read_signature, refuse_external_data
from mlpd.serving.package import ModelPackage, Signature, Tensors, TensorSpec
from mlpd.serving.sessions import Session

DOMAINS = ("", "ai.onnx", "ai.onnx.ml")
"""Where operators may come from; anything else would need a library of somebody's own."""

UNBOUNDED = ("Loop",)
"""Operators that may run for ever: nothing stops a run inside the daemon."""

NODES_MAX = 100_000
TRIAL_VALUES_MAX = 1 << 24
"""Values of one input of a trial run."""

TRIAL_ROWS = (1, 3)


@dataclass(frozen=True, slots=True)
class CheckedModel:
    """What a file turned out to be; `opsets` by domain, `nodes` and `parameters` counted."""

    signature: Signature
    producer: str
    producer_version: str
    opsets: Mapping[str, int]
    nodes: int
    parameters: int


def check_model(onnx: bytes, golden: object = None) -> CheckedModel:
    """Return what the file is, once it has run: on its golden rows, else on zeros.

    `golden`: as `parse_golden` reads it, or None.  Raises ValidationError: `invalid_model`,
    `external_data`, `custom_operator`, `unbounded_operator`, `model_too_large`,
    `unsupported_tensor`, `model_does_not_run`, `golden_mismatch`, and what `parse_golden` raises.
    """
    refuse_external_data(onnx, "the model")
    model = parse_model(onnx, "the model")
    nodes, parameters = _look_through(model)
    signature = read_signature(onnx)
    rows = None if golden is None else parse_golden(golden, signature)
    session = Session(ModelPackage("model", 1, "", onnx, signature, golden=rows))
    if rows is None:
        for count in TRIAL_ROWS:
            _try(session, count)
    session.verify()
    return CheckedModel(
        signature=signature,
        producer=model.producer_name[:200],
        producer_version=model.producer_version[:200],
        opsets={entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        nodes=nodes,
        parameters=parameters,
    )


def _look_through(model: Any) -> tuple[int, int]:
    """Return the numbers of nodes and constant values; raise for what is never served."""
    own = {(function.domain, function.name) for function in model.functions}
    nodes = parameters = 0
    for found in _walk(model.graph):
        nodes += len(found.node)
        parameters += _constants(found)
        _check_nodes(found.node, own)
    for function in model.functions:
        nodes += len(function.node)
        _check_nodes(function.node, own)
        for node in function.node:
            for inner in _graphs_of(node):
                nodes += len(inner.node)
                _check_nodes(inner.node, own)
    if nodes > NODES_MAX:
        raise _too_large(f"{nodes} nodes", f"{NODES_MAX}")
    return nodes, parameters


def _walk(graph: Any) -> Iterator[Any]:
    """Yield a graph and all graphs inside its nodes; protobuf parses some 30 inside each other."""
    yield graph
    for node in graph.node:
        yield from _graphs_of(node)


def _graphs_of(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield from _walk(attribute.g)
        for graph in attribute.graphs:
            yield from _walk(graph)


def _check_nodes(nodes: Any, own: set[tuple[str, str]]) -> None:
    for node in nodes:
        if (node.domain, node.op_type) in own:
            continue
        if node.domain not in DOMAINS:
            raise ValidationError(
                f"the model uses the operator {node.op_type!r} of {node.domain!r}",
                code="custom_operator",
                hint="Export it with operators of ONNX alone (ai.onnx and ai.onnx.ml).",
            )
        if node.op_type in UNBOUNDED:
            raise ValidationError(
                f"the model uses the operator {node.op_type!r}, which may never end",
                code="unbounded_operator",
                hint="Unroll it, or use Scan, which ends with its input.",
            )


def _constants(graph: Any) -> int:
    sparse = (tensor.values for tensor in graph.sparse_initializer)
    return sum(math.prod(tensor.dims) for tensor in (*graph.initializer, *sparse))


def _try(session: Session, rows: int) -> None:
    zeros = _zeros(session.package.signature.inputs, rows)
    try:
        session.run_named(zeros)
    except MlpdError as error:
        raise ValidationError(
            f"the model doesn't run on {rows} rows of zeros: {error.message}",
            code="model_does_not_run",
            hint="Where zeros make no sense, give golden rows that do.",
        ) from error


def _zeros(specs: tuple[TensorSpec, ...], rows: int) -> Tensors:
    found = {}
    for spec in specs:
        # What isn't fixed first is the number of rows; further open sizes are 1.
        shape = tuple(
            size if size >= 0 else (rows if axis == 0 else 1)
            for axis, size in enumerate(spec.shape)
        )
        if math.prod(shape) > TRIAL_VALUES_MAX:
            raise _too_large(f"an input of shape {list(shape)}", f"{TRIAL_VALUES_MAX} values")
        dtype = DATATYPES[spec.datatype]
        text = spec.datatype == "BYTES"
        found[spec.name] = np.full(shape, "" if text else 0, dtype)
    return found


def _too_large(what: str, most: str) -> ValidationError:
    return ValidationError(
        f"the model has {what}; the limit is {most}",
        code="model_too_large",
        hint="Export a smaller one.",
    )
