"""Sessions: one loaded model each, on one CPU thread, giving the same bits every time."""

import threading
import time
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import InternalError, MlpdError, ValidationError
from mlpd.serving.graphs import (
    ORT_ERRORS,
    build_inference,
    first_line,
    refuse_external_data,
    tensor_spec,
)
from mlpd.serving.link import Link
from mlpd.serving.package import (
    FEATURES,
    RAW_SCORE,
    SCORE,
    ModelPackage,
    Tensors,
    TensorSpec,
    bit_equal,
    rows_of,
)
from mlpd.serving.statistics import ModelStatistics, RunCost

Floats = NDArray[np.float64]

ROWS_AT_ONCE = 4_096
"""Of more rows, parts are run one after the other: a graph may hold 1,000 numbers per row then.
From 256 rows on a row costs the same, whatever their number."""


class Scores(NamedTuple):
    """Raw scores and what the link made of them, both float64 [n, K]."""

    raw: Floats
    score: Floats

    @property
    def chosen(self) -> NDArray[np.intp] | None:
        """The output of each row's largest score [n], the first of equals; None with one output."""
        return None if self.score.shape[1] == 1 else self.score.argmax(axis=1)

    @property
    def served(self) -> Floats:
        """Each row's one number, float64 [n]: its score, or with several outputs the largest."""
        several = self.score.shape[1] > 1
        numbers: Floats = self.score.max(axis=1) if several else self.score[:, 0]
        return numbers


class Session:
    """A loaded model; any thread may run it.

    Constructing costs 10 to 20 ms for 200 trees of 63 leaves: do it in a thread.
    Raises ValidationError: `external_data`, `invalid_model` (onnxruntime refuses the bytes),
    `signature_mismatch` (the graph doesn't take or give what the package says).
    """

    def __init__(self, package: ModelPackage) -> None:
        refuse_external_data(package.onnx, package.reference)
        self.package: Final = package
        self.statistics: Final = ModelStatistics()
        self.cost: Final = RunCost()
        self.memory_bytes = len(package.onnx)
        """What loading took, with the file; whoever loads measures it."""
        self._inference: Final = build_inference(package.onnx, package.reference)
        _check_signature(package, self._inference)
        self._link = Link(package.link) if package.link is not None else None
        self._one_row = _OneRow(self._inference, package) if package.trained else None

    @property
    def width(self) -> int:
        """Length of a trained model's feature vector."""
        return self.package.signature.inputs[0].shape[1]

    @property
    def outputs(self) -> int:
        """Number of a trained model's outputs, K."""
        return self.package.signature.outputs[0].shape[1]

    def run(self, features: Floats) -> Floats:
        """Return the raw scores [n, K] of a C-contiguous float64 array [n, F] with n > 0.

        The bits of a row's score don't depend on the other rows.  Raises InternalError(
        code="inference_failed").
        """
        if len(features) == 1 and self._one_row is not None:
            bound = self._one_row.run(features)
            if bound is not None:
                return bound
        starts = range(0, len(features), ROWS_AT_ONCE)
        parts = [self._run(features[start : start + ROWS_AT_ONCE]) for start in starts]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _run(self, features: Floats) -> Floats:
        try:
            raw: Floats = self._inference.run([RAW_SCORE], {FEATURES: features})[0]
        except ORT_ERRORS as error:
            raise _failed(self.package.reference, error) from error
        return raw

    def score(self, raw: Floats) -> Floats:
        """Return what LightGBM's `predict` returns for the raw scores, as a new array."""
        if self._link is None:
            raise InternalError(f"model {self.package.reference} has no link")
        return self._link(raw)

    def run_named(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Return all outputs of a user's ONNX file by name.

        Wrong values inside well-shaped tensors (an index out of range) raise ValidationError(
        code="inference_refused"): with a foreign graph they are the caller's.
        """
        names = [output.name for output in self.package.signature.outputs]
        try:
            return dict(zip(names, self._inference.run(names, dict(inputs)), strict=True))
        except ORT_ERRORS as error:
            raise ValidationError(
                f"model {self.package.reference} refused its inputs: {first_line(error)}",
                code="inference_refused",
                hint="Check shapes and values against the model's metadata.",
            ) from error

    def verify(self) -> None:
        """Run the golden rows and compare; this also warms the session and learns its cost.

        Raises ValidationError(code="golden_mismatch") naming the output and the first wrong row.
        """
        golden = self.package.golden
        if golden is None:
            return
        got = self._golden_outputs(golden.inputs)
        for name, expected in golden.outputs.items():
            if name not in got or not _agrees(got[name], expected, golden.rtol):
                raise _mismatch(self.package.reference, name, got.get(name), expected)

    def _golden_outputs(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        started_ns = time.perf_counter_ns()
        if not self.package.trained:
            outputs = self.run_named(inputs)
            self.cost.add(rows_of(inputs), (time.perf_counter_ns() - started_ns) / 1000)
            return outputs
        rows = np.ascontiguousarray(inputs[FEATURES], np.float64)
        alone = np.concatenate([self.run(rows[i : i + 1]) for i in range(len(rows))])
        self.cost.add(len(rows), (time.perf_counter_ns() - started_ns) / 1000)
        raw = self.run(rows)
        if not bit_equal(alone, raw):
            raise _mismatch(self.package.reference, RAW_SCORE, alone, raw)
        return {RAW_SCORE: raw, SCORE: self.score(raw)}


class _OneRow:
    """Buffers bound once for runs of one row: 8 us less than onnxruntime's `run`, which takes 30.

    One caller at a time; another one meanwhile gets None and takes the general way.
    """

    def __init__(self, inference: Any, package: ModelPackage) -> None:
        self._row = np.empty((1, package.signature.inputs[0].shape[1]))
        self._raw = np.empty((1, package.signature.outputs[0].shape[1]))
        self._lock = threading.Lock()
        self._inference, self._reference = inference, package.reference
        self._binding = inference.io_binding()
        for bind, name, buffer in (
            (self._binding.bind_input, FEATURES, self._row),
            (self._binding.bind_output, RAW_SCORE, self._raw),
        ):
            bind(name, "cpu", 0, np.float64, buffer.shape, buffer.ctypes.data)

    def run(self, features: Floats) -> Floats | None:
        if not self._lock.acquire(blocking=False):
            return None
        try:
            self._row[:] = features
            self._inference.run_with_iobinding(self._binding)
            return self._raw.copy()
        except ORT_ERRORS as error:
            raise _failed(self._reference, error) from error
        finally:
            self._lock.release()


def _check_signature(package: ModelPackage, inference: Any) -> None:
    declared = package.signature
    wanted_outputs = declared.outputs
    if package.trained:
        wanted_outputs = (TensorSpec(RAW_SCORE, "FP64", declared.outputs[0].shape),)
    for side, wanted, nodes in (
        ("inputs", declared.inputs, inference.get_inputs()),
        ("outputs", wanted_outputs, inference.get_outputs()),
    ):
        found = tuple(tensor_spec(node, package.reference) for node in nodes)
        if found != wanted:
            raise ValidationError(
                f"the {side} of model {package.reference} are "
                f"{[spec.to_dict() for spec in found]}, but its signature says "
                f"{[spec.to_dict() for spec in wanted]}",
                code="signature_mismatch",
                hint="Register the model again with the signature of its graph.",
            )


def _agrees(got: NDArray[Any], expected: NDArray[Any], rtol: float) -> bool:
    if rtol == 0.0 or got.dtype.kind not in "fc":
        return bit_equal(got, expected)
    return got.shape == expected.shape and bool(
        np.allclose(got, expected, rtol=rtol, atol=rtol, equal_nan=True)
    )


def _mismatch(
    reference: str, name: str, got: NDArray[Any] | None, expected: NDArray[Any]
) -> MlpdError:
    details: dict[str, Any] = {"output": name}
    if got is not None and got.shape == expected.shape:
        for row, (left, right) in enumerate(zip(got, expected, strict=True)):
            if not bit_equal(np.atleast_1d(left), np.atleast_1d(right)):
                details |= {"row": row, "got": repr(left), "expected": repr(right)}
                break
    return ValidationError(
        f"model {reference} doesn't reproduce its golden rows: output {name!r} differs "
        f"in row {details.get('row', 'count')}",
        code="golden_mismatch",
        hint="The version was made for another onnxruntime or processor, or is damaged: "
        "register it again. It was not loaded.",
        details=details,
    )


def _failed(reference: str, error: Exception) -> MlpdError:
    return InternalError(
        f"model {reference} failed to run: {first_line(error)}", code="inference_failed"
    )
