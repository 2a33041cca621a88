"""Calibrators: fitted maps from a raw score to a chance, and the same as nodes of an ONNX graph."""

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.core.isotonic import isotonic
from mlpd.core.specs import Calibration as Method

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

Floats = NDArray[np.float64]

ROWS_PER_CLASS_MIN = 20
"""Validation rows of each class, as many as training asks for: a map from fewer says little."""

OUTPUT, MARGIN = "raw_score", "margin"
"""The graph's output, and how it is called inside once a calibrator comes behind it."""

_ROUNDS_MAX, _HALVINGS_MAX = 100, 60
_GRADIENT_MIN, _RIDGE, _DESCENT = 1e-12, 1e-12, 1e-4
_BRANCH_LEQ, _SUM, _NO_TRANSFORM = 0, 1, 0  # enumeration of ai.onnx.ml 5

Link = dict[str, Any]
Nodes = tuple[list["NodeProto"], list["TensorProto"]]


class Calibrator(Protocol):
    """A map that never falls; `link` turns what it gives into a chance.

    Calling it is the reference: float64 [n, 1] to float64 [n, 1], the operations of `nodes` one by
    one in numpy, so that both give the same bits.
    """

    @property
    def method(self) -> Method:
        """Its name."""
        ...

    @property
    def link(self) -> Link:
        """As `links.parse_link` writes it."""
        ...

    def __call__(self, raw: Floats) -> Floats:
        """Return what the link takes, as a new array."""
        ...

    def nodes(self) -> Nodes:
        """Return nodes from MARGIN to OUTPUT, and their constants."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return what lineage says: method, size, and a digest of every bit."""
        ...


@dataclass(frozen=True, slots=True)
class Sigmoid:
    """Platt's scaling: the chance is 1 / (1 + exp(-(slope * raw + offset)))."""

    slope: float
    offset: float

    method: Method = "sigmoid"

    @property
    def link(self) -> Link:
        """The usual sigmoid."""
        return {"kind": "sigmoid", "scale": 1.0}

    def __call__(self, raw: Floats) -> Floats:
        """Return slope * raw + offset, rounded after each of the two."""
        return raw * self.slope + self.offset

    def nodes(self) -> Nodes:
        """Return a multiplication and an addition."""
        from onnx import helper  # noqa: PLC0415 - costs 0.2 s, only children pay it

        constants = [_constant(self.slope, "slope"), _constant(self.offset, "offset")]
        return [
            helper.make_node("Mul", [MARGIN, "slope"], ["scaled"]),
            helper.make_node("Add", ["scaled", "offset"], [OUTPUT]),
        ], constants

    def to_dict(self) -> dict[str, Any]:
        """Return method, slope and offset."""
        return {
            "method": self.method,
            "slope": self.slope,
            "offset": self.offset,
            "digest": _digest(np.array([self.slope, self.offset])),
        }


@dataclass(frozen=True, slots=True, eq=False)
class Isotonic:
    """Chances that rise from knot to knot along straight lines, and stay flat outside.

    `knots` ascend and `chances` never fall, both float64 [k], k >= 1.
    """

    knots: Floats
    chances: Floats

    method: Method = "isotonic"

    @property
    def link(self) -> Link:
        """None is needed: the graph gives chances."""
        return {"kind": "identity"}

    @property
    def slopes(self) -> Floats:
        """How steep each piece is; finite also between knots that are neighbours."""
        with np.errstate(over="ignore"):
            steep: Floats = np.diff(self.chances) / np.diff(self.knots)
        steep[np.isposinf(steep)] = np.finfo(np.float64).max
        return steep

    def __call__(self, raw: Floats) -> Floats:
        """Return chances: `low + (x - knot) * slope` of the piece, no more than where it ends."""
        first, slopes, most = self._pieces()
        kept = np.minimum(np.maximum(raw, self.knots[0]), self.knots[-1])
        piece = np.searchsorted(self.knots[1:-1], kept, side="left")
        risen: Floats = (kept - first[piece]) * slopes[piece] + self.chances[piece]
        np.minimum(risen, most[piece], out=risen)
        return risen

    def nodes(self) -> Nodes:
        """Return a search tree over the knots, and the line of the piece that it finds."""
        from onnx import TensorProto, helper  # noqa: PLC0415

        first, slopes, most = self._pieces()
        constants = [
            _constant(self.knots[0], "lowest"),
            _constant(self.knots[-1], "highest"),
            _constant(first, "knots"),
            _constant(slopes, "slopes"),
            _constant(self.chances[: len(first)], "chances"),
            _constant(most, "chances_next"),
        ]
        nodes = [
            helper.make_node("Max", [MARGIN, "lowest"], ["from_lowest"]),
            helper.make_node("Min", ["from_lowest", "highest"], ["kept"]),
            _search_tree(self.knots[1:-1], "kept", "piece_number"),
            helper.make_node("Cast", ["piece_number"], ["piece"], to=TensorProto.INT64),
            *(
                helper.make_node("Gather", [table, "piece"], [f"{table}_here"])
                for table in ("knots", "slopes", "chances", "chances_next")
            ),
            helper.make_node("Sub", ["kept", "knots_here"], ["beyond"]),
            helper.make_node("Mul", ["beyond", "slopes_here"], ["risen"]),
            helper.make_node("Add", ["risen", "chances_here"], ["on_line"]),
            helper.make_node("Min", ["on_line", "chances_next_here"], [OUTPUT]),
        ]
        return nodes, constants

    def to_dict(self) -> dict[str, Any]:
        """Return method and number of knots."""
        return {
            "method": self.method,
            "knots": len(self.knots),
            "digest": _digest(np.concatenate([self.knots, self.chances])),
        }

    def _pieces(self) -> tuple[Floats, Floats, Floats]:
        """Return of each piece the knot where it begins, its slope, and the chance at its end."""
        if len(self.knots) == 1:
            return self.knots, np.zeros(1), self.chances
        return self.knots[:-1], self.slopes, self.chances[1:]


def fit_calibrator(method: Method, raw: Floats, labels: Floats) -> Calibrator:
    """Return the map from raw scores float64 [n] to chances that fits 0/1 labels [n].

    The rows must not be those that the model learned from.  Raises ValidationError:
    `training_data` for fewer than 20 rows of a class, `not_calibratable` where larger scores don't
    mean more, or scores aren't finite.
    """
    for label in (0, 1):
        if (rows := int((labels == label).sum())) < ROWS_PER_CLASS_MIN:
            raise ValidationError(
                f"{rows} validation rows are of class {label}; calibration needs "
                f"{ROWS_PER_CLASS_MIN}",
                code="training_data",
                hint="Give the job a larger valid_share or more rows, or no calibration.",
            )
    if not np.isfinite(raw).all():
        raise _not_calibratable("a raw score is infinite")
    return _fit_isotonic(raw, labels) if method == "isotonic" else _fit_sigmoid(raw, labels)


def add_calibrator(onnx: bytes, calibrator: Calibrator) -> bytes:
    """Return a graph with the output OUTPUT [-1, 1] with a calibrator behind it.

    What was the output is MARGIN inside; the same arguments give the same bytes.
    """
    from onnx import load_from_string  # noqa: PLC0415

    model = load_from_string(onnx)
    for node in model.graph.node:
        node.output[:] = [MARGIN if name == OUTPUT else name for name in node.output]
    nodes, constants = calibrator.nodes()
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(constants)
    written: bytes = model.SerializeToString(deterministic=True)
    return written


def _fit_isotonic(raw: Floats, labels: Floats) -> Isotonic:
    """Fit by pooling; chances stay 1/(n + 2) away from 0 and 1, as nothing is certain (Laplace)."""
    knots, means = isotonic(raw, labels)
    least = 1.0 / (len(labels) + 2)
    chances = np.clip(means, least, 1.0 - least)
    if not chances[-1] > chances[0]:
        raise _not_calibratable("no larger score has a higher rate of 1 than the smallest one")
    return Isotonic(knots, chances)


def _fit_sigmoid(raw: Floats, labels: Floats) -> Sigmoid:
    """Fit by Newton's method with halved steps, in the form that never overflows.

    Platt (1999) with his targets, a little inside of 0 and 1; the algorithm by Lin, Lin and Weng
    (2007), "A note on Platt's probabilistic outputs for support vector machines".
    """
    positives = float(labels.sum())
    negatives = len(labels) - positives
    wanted = np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    # Newton's steps are those of standardized scores: the Hessian is then well conditioned.
    centre, spread = float(raw.mean()), float(raw.std()) or 1.0
    inputs = np.stack([(raw - centre) / spread, np.ones(len(raw))])
    at = np.array([0.0, math.log((positives + 1) / (negatives + 1))])
    loss = _cross_entropy(at @ inputs, wanted)
    for _ in range(_ROUNDS_MAX):
        chances = _chances(at @ inputs)
        gradient = inputs @ (chances - wanted) / len(raw)
        if np.abs(gradient).max() < _GRADIENT_MIN:
            break
        weights = chances * (1 - chances) / len(raw)
        hessian = (inputs * weights) @ inputs.T + _RIDGE * np.eye(2)
        step: Floats = np.linalg.solve(hessian, gradient).astype(np.float64)
        found = _descend(at, step, float(gradient @ step), loss, inputs, wanted)
        if found is None:
            break
        at, loss = found
    slope = float(at[0]) / spread
    if not slope > 0:
        raise _not_calibratable("the rate of 1 doesn't rise with the score")
    return Sigmoid(slope, float(at[1]) - slope * centre)


def _descend(
    at: Floats, step: Floats, promised: float, loss: float, inputs: Floats, wanted: Floats
) -> tuple[Floats, float] | None:
    """Return where a step, halved until it helps, leads, and the loss there; None for nowhere."""
    size = 1.0
    for _ in range(_HALVINGS_MAX):
        there: Floats = at - size * step
        found = _cross_entropy(there @ inputs, wanted)
        if found < loss - _DESCENT * size * promised:
            return there, found
        size /= 2
    return None


def _cross_entropy(logits: Floats, wanted: Floats) -> float:
    """Return the mean loss of chances given as logits, for wanted chances."""
    return float(np.mean(np.logaddexp(0.0, logits) - wanted * logits))


def _chances(logits: Floats) -> Floats:
    fallen: Floats = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1.0, fallen) / (1.0 + fallen)


def _search_tree(thresholds: Floats, source: str, target: str) -> "NodeProto":
    """Return a balanced tree that gives how many of the ascending `thresholds` are below a value.

    As a float64 [n, 1].  Without thresholds both branches of its one node are the leaf 0.
    """
    from onnx import helper  # noqa: PLC0415

    splits: list[float] = []
    children: list[list[tuple[int, bool]]] = []  # of each node: number and whether it's a leaf

    def plant(low: int, high: int) -> tuple[int, bool]:
        """Return the root of a tree over thresholds low to high - 1."""
        if low == high:
            return low, True
        middle = (low + high) // 2
        node = len(splits)
        splits.append(float(thresholds[middle]))
        children.append([])
        children[node] = [plant(low, middle), plant(middle + 1, high)]
        return node, False

    if not plant(0, len(thresholds))[1]:
        pairs = children
    else:
        splits, pairs = [0.0], [[(0, True), (0, True)]]
    left, right = ([pair[side] for pair in pairs] for side in (0, 1))
    return helper.make_node(
        "TreeEnsemble",
        [source],
        [target],
        domain="ai.onnx.ml",
        aggregate_function=_SUM,
        post_transform=_NO_TRANSFORM,
        n_targets=1,
        tree_roots=[0],
        leaf_targetids=[0] * (len(thresholds) + 1),
        leaf_weights=_constant(np.arange(len(thresholds) + 1.0), "pieces"),
        nodes_featureids=[0] * len(splits),
        nodes_modes=_constant(np.full(len(splits), _BRANCH_LEQ, np.uint8), "modes"),
        nodes_splits=_constant(np.array(splits), "splits"),
        nodes_truenodeids=[number for number, _ in left],
        nodes_trueleafs=[int(leaf) for _, leaf in left],
        nodes_falsenodeids=[number for number, _ in right],
        nodes_falseleafs=[int(leaf) for _, leaf in right],
    )


def _constant(value: Any, name: str) -> "TensorProto":
    from onnx.numpy_helper import from_array  # noqa: PLC0415

    return from_array(np.asarray(value), name)


def _digest(values: Floats) -> str:
    return f"sha256:{hashlib.sha256(values.astype('<f8').tobytes()).hexdigest()}"


def _not_calibratable(reason: str) -> ValidationError:
    return ValidationError(
        f"the scores of the validation rows can't be calibrated: {reason}",
        code="not_calibratable",
        hint="The model ranks no better than chance there: look at its AUC, or train without "
        "calibration.",
    )
