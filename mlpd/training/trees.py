"""Reads LightGBM's model text into arrays, to the bit (`dump_model` turns inf into 1e300)."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError

MISSING_NONE, MISSING_ZERO, MISSING_NAN = 0, 1, 2
_CATEGORICAL, _DEFAULT_LEFT = 1, 2
_WORD_BITS = 32
_T = TypeVar("_T", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Tree:
    """One tree as LightGBM writes it: `I` inner nodes (0 for a stump) and `I + 1` leaves.

    A child `c >= 0` is the inner node `c`, a child `c < 0` the leaf `~c`; node 0 is the root.
    `threshold` of a categorical node is the index of its set in `categories`.  `split_gain` has the
    six digits of the text, and no part in the digest.
    """

    split_feature: NDArray[np.int32]
    threshold: NDArray[np.float64]
    decision_type: NDArray[np.int8]
    left_child: NDArray[np.int32]
    right_child: NDArray[np.int32]
    leaf_value: NDArray[np.float64]
    split_gain: NDArray[np.float64]
    categories: tuple[NDArray[np.int32], ...]

    @property
    def categorical(self) -> NDArray[np.bool_]:
        """Inner nodes that ask `category in set`, not `value <= threshold`."""
        return (self.decision_type & _CATEGORICAL) > 0

    @property
    def default_left(self) -> NDArray[np.bool_]:
        """Inner nodes that send a missing value to the left."""
        return (self.decision_type & _DEFAULT_LEFT) > 0

    @property
    def missing_type(self) -> NDArray[np.int8]:
        """What each inner node takes for missing: MISSING_NONE, MISSING_ZERO or MISSING_NAN."""
        return (self.decision_type >> 2) & 3


@dataclass(frozen=True)
class TreeModel:
    """A parsed model; tree `i` adds to output `i % outputs`, in this order."""

    feature_names: tuple[str, ...]
    objective: str | None
    outputs: int
    averaged: bool
    trees: tuple[Tree, ...]

    @cached_property
    def digest(self) -> str:
        """`sha256:` over structure, thresholds and leaves, bit for bit; names are left out."""
        sha = hashlib.sha256(np.array([self.outputs, len(self.trees)], "<i8").tobytes())
        for tree in self.trees:
            for array in _digested(tree):
                sha.update(len(array).to_bytes(8, "little"))
                sha.update(array.tobytes())
        return f"sha256:{sha.hexdigest()}"


def parse_model(model_text: str) -> TreeModel:
    """Parse what `Booster.model_to_string()` gives (format v4); costs about 2 us per node.

    Raises ValidationError (`model_text`) where the text isn't such a model.
    """
    header, *blocks = model_text.split("\nTree=")
    fields = _fields(header)
    if fields.get("version") != "v4":
        raise _broken(f"its version is {fields.get('version')!r}, expected 'v4'")
    blocks = [block.split("\n\n", 1)[0] for block in blocks]
    return TreeModel(
        feature_names=tuple(_required(fields, "feature_names").split(" ")),
        objective=fields.get("objective"),
        outputs=int(_required(fields, "num_tree_per_iteration")),
        averaged="average_output" in fields,
        trees=tuple(_parse_tree(_fields(block)) for block in blocks),
    )


def _parse_tree(fields: Mapping[str, str]) -> Tree:
    leaves = int(_required(fields, "num_leaves"))
    if fields.get("is_linear", "0") != "0":
        raise ValidationError(
            "the model has linear_tree leaves, which an ONNX tree can't hold",
            code="export_unsupported",
            hint="train with linear_tree=false",
        )
    inner = leaves - 1
    return Tree(
        split_feature=_array(fields, "split_feature", inner, np.int32),
        threshold=_array(fields, "threshold", inner, np.float64),
        decision_type=_array(fields, "decision_type", inner, np.int8),
        left_child=_array(fields, "left_child", inner, np.int32),
        right_child=_array(fields, "right_child", inner, np.int32),
        leaf_value=_array(fields, "leaf_value", leaves, np.float64),
        split_gain=_array(fields, "split_gain", inner, np.float64),
        categories=tuple(_category_sets(fields)),
    )


def _category_sets(fields: Mapping[str, str]) -> Iterator[NDArray[np.int32]]:
    count = int(_required(fields, "num_cat"))
    if count == 0:
        return
    bounds = _array(fields, "cat_boundaries", count + 1, np.int32)
    words = _array(fields, "cat_threshold", int(bounds[-1]), np.uint32)
    bits = (words[:, None] >> np.arange(_WORD_BITS, dtype=np.uint32)) & np.uint32(1)
    for start, stop in pairwise(bounds.tolist()):
        yield np.flatnonzero(bits[start:stop]).astype(np.int32)


def _array(fields: Mapping[str, str], name: str, length: int, dtype: type[_T]) -> NDArray[_T]:
    """Read one line of numbers; Python's float() rounds correctly, so doubles return to the bit."""
    number = float if dtype is np.float64 else int
    values = np.array([number(word) for word in fields.get(name, "").split()], dtype=dtype)
    if len(values) != length:
        raise _broken(f"a tree's {name!r} has {len(values)} values, expected {length}")
    return values


def _fields(block: str) -> dict[str, str]:
    pairs = (line.partition("=") for line in block.split("\n"))
    return {name: value for name, _, value in pairs}


def _required(fields: Mapping[str, str], name: str) -> str:
    if name not in fields:
        raise _broken(f"it has no {name!r}")
    return fields[name]


def _digested(tree: Tree) -> Iterator[NDArray[np.generic]]:
    yield tree.split_feature.astype("<i4")
    yield tree.threshold.astype("<f8")
    yield tree.decision_type
    yield tree.left_child.astype("<i4")
    yield tree.right_child.astype("<i4")
    yield tree.leaf_value.astype("<f8")
    for members in tree.categories:
        yield members.astype("<i4")


def _broken(reason: str) -> ValidationError:
    return ValidationError(
        f"this isn't a LightGBM model text: {reason}",
        code="model_text",
        hint="pass what Booster.model_to_string() returns",
    )
