"""What a model version brings to the server: its ONNX bytes, signature, link and golden rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.vector import Vectorizer

FEATURES, RAW_SCORE, SCORE = "features", "raw_score", "score"
"""Tensor names of a trained model: its input, its graph's output, and what the link makes of it."""

Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as the Open Inference Protocol writes it: `datatype` like FP64, -1 for any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the protocol's JSON form."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}

    @classmethod
    def parse(cls, form: Mapping[str, Any]) -> "TensorSpec":
        """Return the tensor in the protocol's JSON form."""
        return cls(form["name"], form["datatype"], tuple(form["shape"]))


@dataclass(frozen=True, slots=True)
class Signature:
    """Inputs and outputs of a model; `vectorizer` is None for a user's ONNX file.

    `refuses_missing`: a user's file says that it gives nonsense for NaN, so none is let in.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    vectorizer: Vectorizer | None = None
    refuses_missing: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that `from_dict` reads: a user's ONNX file's, without vectors."""
        sides = {"inputs": self.inputs, "outputs": self.outputs}
        return {
            **{side: [spec.to_dict() for spec in specs] for side, specs in sides.items()},
            **({"missing": "refuse"} if self.refuses_missing else {}),
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Signature":
        """Return the signature of a user's ONNX file."""
        inputs, outputs = (tuple(map(TensorSpec.parse, document[s])) for s in ("inputs", "outputs"))
        return cls(inputs, outputs, refuses_missing=document.get("missing") == "refuse")

    @classmethod
    def of_vectors(cls, vectorizer: Vectorizer, outputs: int) -> "Signature":
        """Return a trained model's signature: `features` FP64 [-1, F] to `score` FP64 [-1, K]."""
        return cls(
            inputs=(TensorSpec(FEATURES, "FP64", (-1, len(vectorizer.features))),),
            outputs=(TensorSpec(SCORE, "FP64", (-1, outputs)),),
            vectorizer=vectorizer,
        )


@dataclass(frozen=True, slots=True, eq=False)
class GoldenRows:
    """Inputs of a few rows and the outputs that every load must give again.

    Of a trained model: `features` to `raw_score` and `score`, compared bit for bit.  Of a user's
    ONNX file: its own names; `rtol` is the tolerance, relative and
    absolute, that its registration granted.
    """

    inputs: Tensors
    outputs: Tensors
    rtol: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class ModelPackage:
    """A model version as the registry hands it over; `link` is None for a user's ONNX file.

    `onnx`: a whole ModelProto without external data.  `digest`: of the version's manifest, so equal
    digests are equal models.  `metadata`: JSON values shown under the protocol's `parameters`.
    """

    name: str
    version: int
    digest: str
    onnx: bytes
    signature: Signature
    link: Mapping[str, Any] | None = None
    golden: GoldenRows | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        """Whether the model takes a feature vector and has a link."""
        return self.link is not None and self.signature.vectorizer is not None

    @property
    def reference(self) -> str:
        """`name@version`, as routes and messages write it."""
        return f"{self.name}@{self.version}"


def rows_of(tensors: Tensors) -> int:
    """Return the first dimension of the first tensor, at least 1: what counts as rows."""
    for tensor in tensors.values():
        return max(1, len(tensor)) if tensor.ndim else 1
    return 1


def bit_equal(left: NDArray[Any], right: NDArray[Any]) -> bool:
    """Tell whether two arrays agree in shape, dtype and every bit (NaN equals the same NaN)."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if left.dtype == np.dtype(object):
        return bool(np.array_equal(left, right))
    return left.tobytes() == right.tobytes()
