"""From vectors to the finite matrix that estimators want: the same bits in numpy and in ONNX.

Null numbers take the median of training, what lies beyond 1e30 becomes 1e30.  Linear models and
networks get standardized numbers and one column per category; trees get codes, null as -1.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.core.trainers import Floats, TrainingOrder
from mlpd.training.adapt import INPUT, Preparation

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

ONE_HOT_MAX = 2_000
LARGEST = 1e30
"""So far inside float32 that scikit-learn's own check, a sum of all values, doesn't overflow."""


@dataclass(frozen=True, slots=True)
class Prepare:
    """What was learned from the training rows; `center` and `scale` are 0 and 1 for trees.

    `fill`: [F], stands in for null, -1 for a tree's category.  `one_hot`: categories as columns.
    """

    fill: Floats
    center: Floats
    scale: Floats
    categorical: dict[int, int]
    one_hot: bool

    @classmethod
    def fit(cls, order: TrainingOrder, *, trees: bool) -> "Prepare":
        """Return what the training rows teach; raises ValidationError(`too_many_categories`)."""
        categorical = dict(order.categorical)
        if not trees and sum(categorical.values()) > ONE_HOT_MAX:
            raise ValidationError(
                f"{sum(categorical.values())} categories make as many columns; {ONE_HOT_MAX} do",
                code="too_many_categories",
                hint="Use an estimator of trees, or leave a feature with many values out.",
            )
        width = len(order.features)
        known = np.clip(order.train.vectors, -LARGEST, LARGEST)
        fill = np.array([_median(known[:, i]) for i in range(width)])
        fill[list(categorical)] = -1.0
        center, scale = np.zeros(width), np.ones(width)
        for i in set(range(width)) - categorical.keys() if not trees else ():
            column = np.where(np.isnan(known[:, i]), fill[i], known[:, i])
            center[i], deviation = column.mean(), column.std()
            scale[i] = deviation if np.isfinite(deviation) and deviation > 0 else 1.0
        return cls(fill, center, scale, categorical, one_hot=not trees)

    @property
    def numbers(self) -> NDArray[np.intp]:
        """Positions of what isn't spread over columns."""
        spread = self.categorical if self.one_hot else {}
        return np.array([i for i in range(len(self.fill)) if i not in spread], np.intp)

    @property
    def sources(self) -> NDArray[np.intp]:
        """For every column of the matrix, the feature it comes from."""
        spread = self.categorical if self.one_hot else {}
        return np.array([*self.numbers, *(i for i, n in spread.items() for _ in range(n))], np.intp)

    def apply(self, vectors: Floats) -> Floats:
        """Return the matrix float64 [n, P] of vectors [n, F]."""
        filled = np.where(np.isnan(vectors), self.fill, vectors)
        scaled = (np.clip(filled, -LARGEST, LARGEST) - self.center) / self.scale
        if not self.one_hot:
            return scaled.astype(np.float32).astype(np.float64)
        spread = [
            (filled[:, [i]] == np.arange(n, dtype=np.float64)).astype(np.float64)
            for i, n in self.categorical.items()
        ]
        return np.ascontiguousarray(np.concatenate([scaled[:, self.numbers], *spread], axis=1))

    def to_onnx(self) -> Preparation:
        """Return nodes that compute `apply`."""
        from onnx import TensorProto, helper  # noqa: PLC0415
        from onnx.numpy_helper import from_array  # noqa: PLC0415

        names = {"fill": self.fill, "center": self.center, "scale": self.scale}
        constants = [from_array(values, f"prepare_{name}") for name, values in names.items()]
        constants.append(from_array(np.array(-LARGEST), "prepare_least"))
        constants.append(from_array(np.array(LARGEST), "prepare_most"))
        nodes = [
            helper.make_node("IsNaN", [INPUT], ["prepare_null"]),
            helper.make_node("Where", ["prepare_null", "prepare_fill", INPUT], ["prepare_filled"]),
            helper.make_node(
                "Clip", ["prepare_filled", "prepare_least", "prepare_most"], ["prepare_inside"]
            ),
            helper.make_node("Sub", ["prepare_inside", "prepare_center"], ["prepare_moved"]),
            helper.make_node("Div", ["prepare_moved", "prepare_scale"], ["prepare_scaled"]),
        ]
        if not self.one_hot:
            return Preparation(nodes, constants, "prepare_scaled")
        parts = ["prepare_numbers"]
        constants.append(from_array(self.numbers.astype(np.int64), "prepare_places"))
        nodes.append(
            helper.make_node("Gather", ["prepare_scaled", "prepare_places"], parts, axis=1)
        )
        for i, n in self.categorical.items():
            parts.append(f"prepare_spread_{i}")
            added, more = _spread(i, n, TensorProto.DOUBLE)
            nodes += added
            constants += more
        nodes.append(helper.make_node("Concat", parts, ["prepare_matrix"], axis=1))
        return Preparation(nodes, constants, "prepare_matrix")


def _spread(i: int, n: int, kind: int) -> tuple[list["NodeProto"], list["TensorProto"]]:
    """Return nodes for one column per category of feature `i`."""
    from onnx import helper  # noqa: PLC0415
    from onnx.numpy_helper import from_array  # noqa: PLC0415

    place, codes, picked, equal = (f"prepare_{w}_{i}" for w in ("place", "codes", "at", "is"))
    nodes = [
        helper.make_node("Gather", ["prepare_filled", place], [picked], axis=1),
        helper.make_node("Equal", [picked, codes], [equal]),
        helper.make_node("Cast", [equal], [f"prepare_spread_{i}"], to=kind),
    ]
    constants = [
        from_array(np.array([i]), place),
        from_array(np.arange(n, dtype=np.float64).reshape(1, n), codes),
    ]
    return nodes, constants


def _median(column: Floats) -> float:
    known = column[~np.isnan(column)]
    return float(np.median(known)) if len(known) else 0.0
