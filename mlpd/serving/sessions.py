"""Sessions: one loaded model each, on one CPU thread, giving the same bits every time.

CPU provider, intra-op and inter-op threads 1, sequential: more threads would sum in another order
and spin on idle cores.  No custom operators, no external data, ONNX format only.
"""

import threading
import time
from typing import Any, Final, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as _errors

from mlpd.core.errors import InternalError, MlpdError, ValidationError
from mlpd.serving.datatypes import ONNX_DATATYPES
from mlpd.serving.link import Link
from mlpd.serving.package import (
    FEATURES,
    RAW_SCORE,
    SCORE,
    ModelPackage,
    Signature,
    Tensors,
    TensorSpec,
    bit_equal,
    rows_of,
)
from mlpd.serving.statistics import ModelStatistics, RunCost

Floats = NDArray[np.float64]

ORT_ERRORS: tuple[type[Exception], ...] = tuple(
    error
    for error in vars(_errors).values()
    if isinstance(error, type) and issubclass(error, Exception)
)
"""All that onnxruntime raises; its classes share no base but Exception."""

_SILENT = 4  # only fatal messages: every error is raised and reported by us


class Scores(NamedTuple):
    """Raw scores and what the link made of them, both float64 [n, K]."""

    raw: Floats
    score: Floats


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
        self._inference: Final = _build_inference(package.onnx, package.reference)
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
                f"model {self.package.reference} refused its inputs: {_first_line(error)}",
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


def read_signature(onnx: bytes, what: str = "the model") -> Signature:
    """Return the inputs and outputs of an ONNX file as its graph names them.

    Builds a session; for untrusted bytes do it in a child process with a memory limit.
    Raises ValidationError as `Session` does, or code="unsupported_tensor" for a sequence or map.
    """
    refuse_external_data(onnx, what)
    inference = _build_inference(onnx, what)
    return Signature(
        inputs=tuple(_tensor_spec(node, what) for node in inference.get_inputs()),
        outputs=tuple(_tensor_spec(node, what) for node in inference.get_outputs()),
    )


def refuse_external_data(onnx: bytes, what: str) -> None:
    """Raise ValidationError(code="external_data") if a tensor's data stands outside the file.

    onnxruntime would read any path, and any memory address, that the file names.  A location is
    text under the key "location", so a file without that word is clean: 0.1 ms per MB.
    """
    if b"location" not in onnx:
        return
    import onnx as onnx_format  # noqa: PLC0415 - 0.2 s, and hardly any file has the word
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # noqa: PLC0415

    try:
        model = onnx_format.ModelProto.FromString(onnx)
    except DecodeError as error:
        raise _invalid(what, error) from error
    if _has_external_data(model):
        raise ValidationError(
            f"{what} keeps tensors in external files, which are never read",
            code="external_data",
            hint="Save it as one file: onnx.save(model, path, save_as_external_data=False).",
        )


def _has_external_data(message: Any) -> bool:
    if message.DESCRIPTOR.name == "TensorProto" and message.external_data:
        return True
    return any(
        _has_external_data(child)
        for field, value in message.ListFields()
        if field.message_type is not None
        for child in ([value] if hasattr(value, "DESCRIPTOR") else value)
    )


def _build_inference(onnx: bytes, what: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.log_severity_level = _SILENT
    # Without the arena freed tensors go back to malloc, where malloc_trim finds them; it costs
    # nothing that could be measured at 1, 64 or 256 rows.
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.add_session_config_entry("session.load_model_format", "ONNX")
    try:
        inference = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        raise _invalid(what, error) from error
    inference.disable_fallback()
    return inference


def _check_signature(package: ModelPackage, inference: Any) -> None:
    declared = package.signature
    wanted_outputs = declared.outputs
    if package.trained:
        wanted_outputs = (TensorSpec(RAW_SCORE, "FP64", declared.outputs[0].shape),)
    for side, wanted, nodes in (
        ("inputs", declared.inputs, inference.get_inputs()),
        ("outputs", wanted_outputs, inference.get_outputs()),
    ):
        found = tuple(_tensor_spec(node, package.reference) for node in nodes)
        if found != wanted:
            raise ValidationError(
                f"the {side} of model {package.reference} are "
                f"{[spec.to_dict() for spec in found]}, but its signature says "
                f"{[spec.to_dict() for spec in wanted]}",
                code="signature_mismatch",
                hint="Register the model again with the signature of its graph.",
            )


def _tensor_spec(node: Any, what: str) -> TensorSpec:
    if node.type not in ONNX_DATATYPES:
        raise ValidationError(
            f"tensor {node.name!r} of {what} is a {node.type}, which can't be served",
            code="unsupported_tensor",
            hint="Export plain tensors (for scikit-learn: zipmap=False).",
        )
    shape = tuple(size if isinstance(size, int) else -1 for size in node.shape)
    return TensorSpec(node.name, ONNX_DATATYPES[node.type], shape)


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


def _invalid(what: str, error: Exception) -> MlpdError:
    return ValidationError(
        f"{what} is no ONNX model that can be served: {_first_line(error)}",
        code="invalid_model",
        hint="Custom operators and other formats are refused; check the file with onnx.checker.",
    )


def _failed(reference: str, error: Exception) -> MlpdError:
    return InternalError(
        f"model {reference} failed to run: {_first_line(error)}", code="inference_failed"
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
