"""LightGBM to ONNX: one float64 TreeEnsemble whose raw scores are LightGBM's, bit for bit.

Categories go into it as columns of their own: see `categories`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.training.categories import build_columns
from mlpd.training.links import parse_link
from mlpd.training.trees import MISSING_NONE, MISSING_ZERO, Tree, TreeModel, parse_model

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

INPUT, OUTPUT = "features", "raw_score"
ZERO = float(np.float32(1e-35))
"""LightGBM reads every |x| <= ZERO as 0 (its kZeroThreshold)."""
_BELOW_ZERO = float(np.nextafter(-ZERO, -np.inf))
_BRANCH_LEQ, _BRANCH_MEMBER = 0, 6  # enumeration of ai.onnx.ml 5
_SUM, _NO_TRANSFORM = 1, 0
_IR_VERSION, _OPSET, _ML_OPSET = 10, 21, 5
_SMALL_SET = 31
Places = Mapping[tuple[int, bytes], tuple[int, NDArray[np.float64]]]
"""As `Columns.places`."""
_LARGEST_SMALL_MEMBER = 30


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """An ONNX file with what a server needs beside it.

    `onnx`: input `features` float64 [-1, F] in the order of `feature_names`, output `raw_score`
    float64 [-1, outputs].  `link`: see `links.parse_link`.  `tree_digest`: see `TreeModel.digest`.
    """

    onnx: bytes
    link: Mapping[str, Any]
    feature_names: tuple[str, ...]
    outputs: int
    tree_digest: str


def export_model(model_text: str) -> ExportedModel:
    """Export what `Booster.model_to_string()` gives; about 0.3 s for 200 trees of 63 leaves.

    The scores equal `Booster.predict(raw_score=True)` on dense float64 rows to the bit, for every
    input (inf, NaN, denormals, odd categories) and batch size, given onnxruntime on one thread.

    Of `boosting=rf` the raw scores are the sums, as LightGBM's; the link divides them.

    Raises ValidationError (`export_unsupported`) for a model that has no exact export: linear
    trees, an objective outside `links.EXPORTABLE`, no trees.
    """
    model = parse_model(model_text)
    if not model.trees:
        raise _unsupported("the model has no trees", "train for at least one round")
    rounds = len(model.trees) // model.outputs if model.averaged else None
    link = parse_link(model.objective, outputs=model.outputs, average_of=rounds)
    return ExportedModel(
        onnx=_build_model(model).SerializeToString(deterministic=True),
        link=link,
        feature_names=model.feature_names,
        outputs=model.outputs,
        tree_digest=model.digest,
    )


def effective_threshold(threshold: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the t' for which `x <= t'` on the raw value is LightGBM's `flush(x) <= threshold`.

    LightGBM turns every |x| <= ZERO into 0 before it compares.  Only thresholds within that band
    change: they move to the band's upper end where 0 goes left, just below it where 0 goes right.
    """
    in_band = np.abs(threshold) <= ZERO
    return np.where(in_band, np.where(threshold >= 0, ZERO, _BELOW_ZERO), threshold)


def _build_model(model: TreeModel) -> "ModelProto":
    from onnx import TensorProto, helper  # noqa: PLC0415 -- costs 0.2 s, only exporters pay it

    zero_is_missing = _zero_missing_features(model)
    nodes, constants = _zero_to_nan(zero_is_missing) if zero_is_missing.any() else ([], [])
    width = len(model.feature_names)
    columns = build_columns(model.trees, width)
    if columns is not None:
        nodes += columns.nodes(INPUT, nodes[-1].output[0] if nodes else INPUT, "with_classes")
        constants += columns.constants()
    places = {} if columns is None else columns.places
    nodes.append(_ensemble(model, places, source=nodes[-1].output[0] if nodes else INPUT))
    graph = helper.make_graph(
        nodes,
        "lightgbm",
        [helper.make_tensor_value_info(INPUT, TensorProto.DOUBLE, [None, width])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.DOUBLE, [None, model.outputs])],
        initializer=constants,
    )
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("ai.onnx.ml", _ML_OPSET)]
    return helper.make_model(
        graph, producer_name="mlpd", ir_version=_IR_VERSION, opset_imports=opsets
    )


def _ensemble(model: TreeModel, places: Places, source: str) -> "NodeProto":
    from onnx import helper  # noqa: PLC0415
    from onnx.numpy_helper import from_array  # noqa: PLC0415

    first_nodes = np.cumsum([0, *(max(len(t.split_feature), 1) for t in model.trees)])
    first_leaves = np.cumsum([0, *(len(t.leaf_value) for t in model.trees)])
    parts = [
        _lay_out(tree, int(node), int(leaf), places)
        for tree, node, leaf in zip(model.trees, first_nodes[:-1], first_leaves[:-1], strict=True)
    ]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    members = columns.pop("membership_values")
    leaf_counts = np.diff(first_leaves)
    targets = np.repeat(np.arange(len(model.trees)) % model.outputs, leaf_counts)
    tensors = {name: from_array(columns.pop(name)) for name in ("nodes_modes", "nodes_splits")}
    if len(members):
        tensors["membership_values"] = from_array(members)
    return helper.make_node(
        "TreeEnsemble",
        [source],
        [OUTPUT],
        domain="ai.onnx.ml",
        aggregate_function=_SUM,
        post_transform=_NO_TRANSFORM,
        n_targets=model.outputs,
        tree_roots=first_nodes[:-1].tolist(),
        leaf_targetids=targets.tolist(),
        leaf_weights=from_array(np.concatenate([tree.leaf_value for tree in model.trees])),
        **tensors,
        **{name: column.tolist() for name, column in columns.items()},
    )


def _lay_out(
    tree: Tree, first_node: int, first_leaf: int, places: Places
) -> dict[str, NDArray[Any]]:
    """Return one tree's node attributes, its ids moved to where its nodes and leaves start."""
    if not len(tree.split_feature):
        return _stump(first_leaf)
    categorical = tree.categorical
    left, right = (
        np.where(child < 0, first_leaf + ~child, first_node + child)
        for child in (tree.left_child, tree.right_child)
    )
    splits = np.where(categorical, 0.0, effective_threshold(tree.threshold))
    zero_goes_left = tree.threshold >= 0
    missing_goes_left = np.where(
        tree.missing_type == MISSING_NONE, zero_goes_left, tree.default_left
    )
    features, members = _test_sets(tree, places)
    return {
        "nodes_featureids": features,
        "nodes_modes": np.where(categorical, _BRANCH_MEMBER, _BRANCH_LEQ).astype(np.uint8),
        "nodes_splits": splits,
        "nodes_truenodeids": left,
        "nodes_trueleafs": (tree.left_child < 0).astype(np.int64),
        "nodes_falsenodeids": right,
        "nodes_falseleafs": (tree.right_child < 0).astype(np.int64),
        "nodes_missing_value_tracks_true": (missing_goes_left & ~categorical).astype(np.int64),
        "membership_values": members,
    }


def _stump(leaf: int) -> dict[str, NDArray[Any]]:
    """Return a lone leaf: ai.onnx.ml writes it as a node whose two branches are that leaf."""
    return {
        "nodes_featureids": np.array([0]),
        "nodes_modes": np.array([_BRANCH_LEQ], np.uint8),
        "nodes_splits": np.array([0.0]),
        "nodes_truenodeids": np.array([leaf]),
        "nodes_trueleafs": np.array([1]),
        "nodes_falsenodeids": np.array([leaf]),
        "nodes_falseleafs": np.array([1]),
        "nodes_missing_value_tracks_true": np.array([0]),
        "membership_values": np.array([], np.float64),
    }


def _test_sets(tree: Tree, places: Places) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Return what each node reads, and of each member node in turn what it tests for.

    That is a column and its classes where the set has a place, else the feature and the categories
    themselves.  Every set is closed by a NaN.
    """
    features = tree.split_feature.copy()
    parts: list[NDArray[np.float64]] = [np.array([], np.float64)]
    for node in np.flatnonzero(tree.categorical):
        members = tree.categories[int(tree.threshold[node])]
        place = places.get((int(features[node]), members.tobytes()))
        if place is not None:
            features[node] = place[0]
        parts += [_spelled(members) if place is None else place[1], np.array([np.nan])]
    return features, np.concatenate(parts)


def _spelled(members: NDArray[np.int32]) -> NDArray[np.float64]:
    """Return a set as onnxruntime must be told it so that 3.7 counts as 3, as in LightGBM.

    It tests sets of fewer than 31 members, all at most 30, by equality, and any other set by the
    truncated value.  A repeated member lengthens a small set without changing it.
    """
    if not len(members):
        raise _unsupported("a categorical split has no categories", "report this model text")
    values = members.astype(np.float64)
    small = len(values) < _SMALL_SET and values[-1] <= _LARGEST_SMALL_MEMBER
    return np.resize(values, _SMALL_SET) if small else values


def _zero_missing_features(model: TreeModel) -> NDArray[np.bool_]:
    """Return which features read 0 as missing (`zero_as_missing`), one flag per feature."""
    zero, other = (np.zeros(len(model.feature_names), np.bool_) for _ in range(2))
    for tree in model.trees:
        is_zero = (tree.missing_type == MISSING_ZERO) & ~tree.categorical
        zero[tree.split_feature[is_zero]] = True
        other[tree.split_feature[~is_zero]] = True
    mixed = np.flatnonzero(zero & other)
    if len(mixed):
        name = model.feature_names[mixed[0]]
        raise _unsupported(
            f"feature {name!r} reads 0 as missing in some splits only",
            "train all rounds with one zero_as_missing setting",
        )
    return zero


def _zero_to_nan(features: NDArray[np.bool_]) -> "tuple[list[NodeProto], list[TensorProto]]":
    """Return nodes and constants that turn |x| <= ZERO of these features into NaN.

    A tree node can send NaN its own way, not an interval: three element-wise nodes in front cost
    less than splitting every node in two, since onnxruntime copies shared subtrees.
    """
    from onnx import helper  # noqa: PLC0415
    from onnx.numpy_helper import from_array  # noqa: PLC0415

    constants = [
        from_array(np.where(features, ZERO, -1.0), "zero_band"),
        from_array(np.array(np.nan), "missing"),
    ]
    nodes = [
        helper.make_node("Abs", [INPUT], ["magnitude"]),
        helper.make_node("LessOrEqual", ["magnitude", "zero_band"], ["is_zero"]),
        helper.make_node("Where", ["is_zero", "missing", INPUT], ["read"]),
    ]
    return nodes, constants


def _unsupported(reason: str, hint: str) -> ValidationError:
    return ValidationError(
        f"this model has no exact export: {reason}", code="export_unsupported", hint=hint
    )
