"""Small models for the serving tests: random tree ensembles, and LightGBM's own."""

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mlpd.core.columns import DType
from mlpd.core.vector import VectorFeature, Vectorizer
from mlpd.serving.package import GoldenRows, ModelPackage, Signature
from mlpd.serving.sessions import Session

WIDTH = 4
VECTORIZER = Vectorizer(tuple(VectorFeature(f"f{i}", DType.FLOAT64) for i in range(WIDTH)))


def make_trees(seed: int = 0, *, trees: int = 5, leaves: int = 8, outputs: int = 1) -> bytes:
    """A random forest as the exporter writes it: `features` to `raw_score`, both float64."""
    rng = np.random.default_rng(seed)
    nodes: dict[str, list[int]] = {
        name: []
        for name in ("featureids", "truenodeids", "trueleafs", "falsenodeids", "falseleafs")
    }
    splits: list[float] = []
    targets: list[int] = []

    def grow(tree: int, count: int) -> int:
        node = len(splits)
        splits.append(float(rng.normal()))
        for column in nodes.values():
            column.append(0)
        nodes["featureids"][node] = int(rng.integers(WIDTH))
        left = int(rng.integers(1, count))
        for size, side in ((left, "true"), (count - left, "false")):
            if size == 1:
                nodes[f"{side}nodeids"][node], nodes[f"{side}leafs"][node] = len(targets), 1
                targets.append(tree % outputs)
            else:
                nodes[f"{side}nodeids"][node] = grow(tree, size)
        return node

    roots = [grow(tree, leaves) for tree in range(trees * outputs)]
    ensemble = helper.make_node(
        "TreeEnsemble",
        ["features"],
        ["raw_score"],
        domain="ai.onnx.ml",
        nodes_splits=numpy_helper.from_array(np.array(splits)),
        nodes_modes=numpy_helper.from_array(np.zeros(len(splits), np.uint8)),
        nodes_missing_value_tracks_true=[0] * len(splits),
        **{f"nodes_{name}": column for name, column in nodes.items()},
        tree_roots=roots,
        leaf_targetids=targets,
        leaf_weights=numpy_helper.from_array(rng.normal(size=len(targets))),
        n_targets=outputs,
        aggregate_function=1,
        post_transform=0,
    )
    return make_graph(
        [ensemble],
        {"features": (TensorProto.DOUBLE, [None, WIDTH])},
        {"raw_score": (TensorProto.DOUBLE, [None, outputs])},
    )


def make_graph(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[int | None]]],
    outputs: dict[str, tuple[int, list[int | None]]],
    initializer: list[TensorProto] | None = None,
    domains: tuple[str, ...] = (),
) -> bytes:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
        [helper.make_tensor_value_info(name, *spec) for name, spec in outputs.items()],
        initializer=initializer,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.onnx.ml", 5)]
    opsets += [helper.make_opsetid(domain, 1) for domain in domains]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def make_tree_package(
    seed: int = 0,
    *,
    name: str = "flights",
    version: int = 1,
    outputs: int = 1,
    trees: int = 5,
    golden: bool = True,
) -> ModelPackage:
    """A trained model's package with golden rows taken from a session of its own."""
    package = ModelPackage(
        name=name,
        version=version,
        digest=f"sha256:{seed:064x}",
        onnx=make_trees(seed, trees=trees, outputs=outputs),
        signature=Signature.of_vectors(VECTORIZER, outputs),
        link={"kind": "sigmoid", "scale": 1.0} if outputs == 1 else {"kind": "softmax"},
    )
    return with_golden(package) if golden else package


def with_golden(package: ModelPackage) -> ModelPackage:
    session = Session(package)
    inputs = make_rows(8, seed=99)
    raw = session.run(inputs)
    golden = GoldenRows({"features": inputs}, {"raw_score": raw, "score": session.score(raw)})
    return dataclasses.replace(package, golden=golden)


def make_rows(count: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(count, WIDTH))


@pytest.fixture(scope="session")
def tree_package() -> Callable[..., ModelPackage]:
    return make_tree_package


@pytest.fixture(scope="session")
def some_rows() -> Callable[..., NDArray[np.float64]]:
    return make_rows


@pytest.fixture(scope="session")
def graph_onnx() -> Callable[..., bytes]:
    return make_graph


@pytest.fixture
def session() -> Session:
    return Session(make_tree_package())
