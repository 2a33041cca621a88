"""Hostile ONNX files by name, and a program that checks each in a forked process of its own.

    python hostile.py DIRECTORY KIND...        DIRECTORY holds secret.bin, and links to it

One line of JSON per file of these kinds: its name, and "accepted", the code of the refusal, or how
it died.  Forks of a process that has imported everything take milliseconds, so there can be
hundreds.  The limits are of the kinds that `mlpd.daemon.model_child` sets.
"""

import json
import os
import random
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    helper,
    numpy_helper,
)

FLOATS = TensorProto.FLOAT
INTEGERS = TensorProto.INT64
LOCATIONS = {
    "relative": "secret.bin",
    "here": "./secret.bin",
    "upwards": "../secret.bin",
    "far-upwards": "../" * 12 + "etc/passwd",
    "absolute": "{root}/secret.bin",
    "symbolic-link": "{root}/symbolic",
    "hard-link": "{root}/hard",
    "folder-link": "{root}/folder/secret.bin",
    "url": "file://{root}/secret.bin",
    "passwd": "/etc/passwd",
    "memory": "/proc/self/mem",
    "zeros": "/dev/zero",
    "address": "*/_ORT_MEM_ADDR_/*",
    "nothing": "",
}


def info(name: str, shape: list[Any], kind: int = FLOATS) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes: list[NodeProto], *, tensors: Any = (), x: Any = None, **more: Any) -> ModelProto:
    """x [n, 4] to y, through `nodes`."""
    inputs = [info("x", ["n", 4])] if x is None else x
    graph = helper.make_graph(nodes, "g", inputs, [info("y", None)], list(tensors))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, **more)


def constant(name: str, values: Any) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values), name)


def external(location: str, name: str = "w", **keys: object) -> TensorProto:
    tensor = TensorProto(name=name, data_type=FLOATS, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **keys}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


ADD = helper.make_node("Add", ["x", "w"], ["y"])


def in_initializer(tensor: TensorProto) -> ModelProto:
    return model([ADD], tensors=[tensor])


def in_constant(tensor: TensorProto) -> ModelProto:
    return model([helper.make_node("Constant", [], ["w"], value=tensor), ADD])


def in_subgraph(tensor: TensorProto) -> ModelProto:
    branch = GraphProto(name="b")
    branch.initializer.append(tensor)
    branch.node.append(helper.make_node("Identity", ["w"], ["out"]))
    branch.output.append(info("out", [4]))
    node = helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch)
    add = helper.make_node("Add", ["x", "w"], ["y"])
    return model([node, add], tensors=[constant("c", np.array(True))])


def in_function(tensor: TensorProto) -> ModelProto:
    nodes = [helper.make_node("Constant", [], ["w"], value=tensor), ADD]
    opsets = [helper.make_opsetid("", 17)]
    function = helper.make_function("own", "F", ["x"], ["y"], nodes, opsets)
    made = model([helper.make_node("F", ["x"], ["y"], domain="own")], functions=[function])
    made.opset_import.add(domain="own", version=1)
    return made


def in_sparse(tensor: TensorProto) -> ModelProto:
    made = model([ADD])
    sparse = made.graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(tensor)
    sparse.indices.CopyFrom(constant("i", [0, 1, 2, 3]))
    return made


def in_training(tensor: TensorProto) -> ModelProto:
    made = model([helper.make_node("Identity", ["x"], ["y"])])
    made.training_info.add().algorithm.initializer.append(tensor)
    return made


PLACES = (in_initializer, in_constant, in_subgraph, in_function, in_sparse, in_training)


def externals(root: Path) -> Iterator[tuple[str, ModelProto]]:
    for label, location in LOCATIONS.items():
        for place in PLACES:
            yield f"external/{label}/{place.__name__}", place(external(location.format(root=root)))
    for keys in ({"offset": 0, "length": 16}, {"offset": 2**62}, {"length": -1}, {"checksum": "x"}):
        made = in_initializer(external(f"{root}/secret.bin", **keys))
        yield f"external/keys-{sorted(keys)}", made
    quiet = external(f"{root}/secret.bin")
    quiet.data_location = TensorProto.DEFAULT
    yield "external/not-said", in_initializer(quiet)


def giants() -> Iterator[tuple[str, ModelProto]]:
    for size in (2**31, 2**40, 2**62, -5):
        shape = constant("s", np.array([size, size], np.int64))
        yield (
            f"giant/constant-{size}",
            model([helper.make_node("ConstantOfShape", ["s"], ["y"])], tensors=[shape]),
        )
        target = constant("s", np.array([size, 4], np.int64))
        one = constant("o", np.ones((1, 4), np.float32))
        yield (
            f"giant/expand-{size}",
            model([helper.make_node("Expand", ["o", "s"], ["y"])], tensors=[target, one]),
        )
        repeats = constant("s", np.array([size, 1], np.int64))
        yield (
            f"giant/tile-{size}",
            model([helper.make_node("Tile", ["x", "s"], ["y"])], tensors=[repeats]),
        )
        bounds = [constant(n, np.array(v, np.int64)) for n, v in (("a", 0), ("b", size), ("d", 1))]
        yield (
            f"giant/range-{size}",
            model([helper.make_node("Range", ["a", "b", "d"], ["y"])], tensors=bounds),
        )
        depth = constant("s", np.array(size, np.int64))
        values = constant("v", np.array([0, 1], np.float32))
        picks = constant("p", np.array([0], np.int64))
        yield (
            f"giant/one-hot-{size}",
            model([helper.make_node("OneHot", ["p", "s", "v"], ["y"])],
                  tensors=[depth, values, picks]),
        )  # fmt: skip
        claimed = TensorProto(name="w", data_type=FLOATS, dims=[size, size], raw_data=b"1234")
        yield f"giant/claimed-{size}", model([ADD], tensors=[claimed])
        if size > 0:
            same = [helper.make_node("Identity", ["x"], ["y"])]
            yield f"giant/input-{size}", model(same, x=[info("x", ["n", size])])


def body_of_loop() -> GraphProto:
    nodes = [
        helper.make_node("Identity", ["more"], ["again"]),
        helper.make_node("Add", ["v", "v"], ["w"]),
    ]
    inputs = [info("i", [], INTEGERS), info("more", [], TensorProto.BOOL), info("v", [1])]
    outputs = [info("again", [], TensorProto.BOOL), info("w", [1])]
    return helper.make_graph(nodes, "body", inputs, outputs)


def loops() -> Iterator[tuple[str, ModelProto]]:
    tensors = [
        constant("n", np.array(2**62, np.int64)),
        constant("c", np.array(True)),
        constant("v", np.ones(1, np.float32)),
    ]
    loop = helper.make_node("Loop", ["n", "c", "v"], ["y"], body=body_of_loop())
    yield "loop/plain", model([loop], tensors=tensors)
    unlimited = helper.make_node("Loop", ["", "c", "v"], ["y"], body=body_of_loop())
    yield "loop/unlimited", model([unlimited], tensors=tensors)
    branch = helper.make_graph([loop], "b", [], [info("y", [1])])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    yield "loop/in-if", model([node], tensors=tensors)
    function = helper.make_function(
        "own", "F", ["n", "c", "v"], ["y"], [loop], [helper.make_opsetid("", 17)]
    )
    called = helper.make_node("F", ["n", "c", "v"], ["y"], domain="own")
    made = model([called], tensors=tensors, functions=[function])
    made.opset_import.add(domain="own", version=1)
    yield "loop/in-function", made


def endless_scan(length: int = 100_000) -> ModelProto:
    """Scans in scans: it would end, after `length` to the third additions."""
    graph = None
    for depth in range(3):
        if graph is None:
            nodes = [helper.make_node("Add", ["s0", "e0"], ["t0"])]
        else:
            names = ([f"s{depth}", "xs"], [f"t{depth}"])
            nodes = [helper.make_node("Scan", *names, num_scan_inputs=1, body=graph)]
        inputs = [info(f"s{depth}", [1]), info(f"e{depth}", [1])]
        graph = helper.make_graph(nodes, f"b{depth}", inputs, [info(f"t{depth}", [1])])
    node = helper.make_node("Scan", ["s", "xs"], ["y"], num_scan_inputs=1, body=graph)
    tensors = [constant("s", np.ones(1, np.float32)),
               constant("xs", np.ones((length, 1), np.float32))]  # fmt: skip
    return model([node], tensors=tensors)


DOMAINS = (
    *("com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc", "ai.onnx.contrib"),
    *("ai.onnx.preview.training", "ai.onnx.ml.", "AI.ONNX", "org.pytorch.aten", "own", " "),
)


def foreign() -> Iterator[tuple[str, ModelProto]]:
    for domain in DOMAINS:
        for kind in ("Gelu", "EPContext", "PythonOp", "Identity"):
            made = model([helper.make_node(kind, ["x"], ["y"], domain=domain)])
            made.opset_import.add(domain=domain, version=1)
            yield f"foreign/{domain}/{kind}", made


def strange() -> Iterator[tuple[str, ModelProto]]:
    yield "strange/nothing-given", model([])
    yield "strange/unknown-operator", model([helper.make_node("NoSuch", ["x"], ["y"])])
    turns = [helper.make_node("Add", ["y", "x"], ["z"]), helper.make_node("Abs", ["z"], ["y"])]
    yield "strange/circle", model(turns)
    yield "strange/twice", model([helper.make_node("Abs", ["x"], ["y"])] * 2)
    yield "strange/newer", model([helper.make_node("Abs", ["x"], ["y"])], model_version=2**62)
    future = model([helper.make_node("Abs", ["x"], ["y"])])
    future.ir_version = 2**31
    yield "strange/format-of-the-future", future
    deep = GraphProto(name="leaf", output=[info("y", [1])])
    deep.node.append(helper.make_node("Identity", ["v"], ["y"]))
    for _ in range(25):
        node = helper.make_node("If", ["c"], ["y"], then_branch=deep, else_branch=deep)
        node.attribute[1].CopyFrom(AttributeProto(name="else_branch", type=AttributeProto.GRAPH,
                                                  g=GraphProto(name="e")))  # fmt: skip
        deep = GraphProto(name="d", node=[node], output=[info("y", [1])])
    made = model([], tensors=[constant("c", np.array(True)), constant("v", np.ones(1, np.float32))])
    made.graph.node.extend(deep.node)
    yield "strange/deep", made
    call = helper.make_node("F", ["x"], ["y"], domain="own")
    function = helper.make_function(
        "own", "F", ["x"], ["y"], [call], [helper.make_opsetid("own", 1)]
    )
    made = model([call], functions=[function])
    made.opset_import.add(domain="own", version=1)
    yield "strange/calls-itself", made
    sequence = helper.make_node("SequenceConstruct", ["x", "x"], ["y"])
    yield "strange/sequence", model([sequence])
    yield "strange/many-nodes", model([helper.make_node("Abs", ["x"], ["y"])] * 100_001)


def good() -> ModelProto:
    rng = np.random.default_rng(0)
    tensors = [constant("w", rng.normal(size=(4, 3)).astype(np.float32))]
    return model([helper.make_node("MatMul", ["x", "w"], ["h"]),
                  helper.make_node("Softmax", ["h"], ["y"])], tensors=tensors)  # fmt: skip


def spoilt() -> Iterator[tuple[str, bytes]]:
    whole = good().SerializeToString()
    draw = random.Random(5)
    for length in sorted(draw.sample(range(len(whole)), 60)):
        yield f"truncated/{length}", whole[:length]
    for number in range(140):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 2, 8))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        yield f"mutated/{number}", bytes(data)
    for label, head in (
        *(("pickle", b"\x80\x04cos\nsystem\n"), ("zip", b"PK\3\4"), ("ort", b"\0\0\0\0ORTM")),
        *(("gzip", b"\x1f\x8b\x08"), ("zeros", b"\0" * 99), ("text", b"location " * 99)),
    ):
        yield f"foreign-format/{label}", head + whole


def corpus(root: Path) -> Iterator[tuple[str, bytes]]:
    for maker in (externals(root), giants(), loops(), foreign(), strange()):
        for name, made in maker:
            yield name, made.SerializeToString()
    yield from spoilt()
    yield "endless/scan", endless_scan().SerializeToString()


def limit(kind: int, most: int) -> None:
    resource.setrlimit(kind, (most, most))


def outcome(check: Callable[[bytes], object], data: bytes) -> str:
    """Check in a fork, under limits; return how it ended."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            limit(resource.RLIMIT_DATA, 2 << 30)
            limit(resource.RLIMIT_CPU, 2)
            limit(resource.RLIMIT_CORE, 0)
            limit(resource.RLIMIT_NOFILE, 64)
            try:
                check(data)
                said = "accepted"
            except Exception as error:  # noqa: BLE001 - as the child's boundary does
                said = getattr(error, "code", repr(error)[:200])
            os.write(write_end, said.encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    return said or f"died with {os.waitstatus_to_exitcode(status)}"


def main() -> None:
    from mlpd.serving.check import check_model  # noqa: PLC0415 - the corpus needs none of it

    check_model(good().SerializeToString())  # everything is imported and warm
    root = Path(sys.argv[1])
    os.chdir(root)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # onnxruntime writes where it likes
    os.dup2(1, 2)
    for name, data in corpus(root):
        if name.partition("/")[0] not in sys.argv[2:]:
            continue
        answers.write(json.dumps({"name": name, "outcome": outcome(check_model, data)}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
