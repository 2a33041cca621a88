"""ONNX files opened with onnxruntime: one way, on one thread, and nothing but the file itself.

CPU provider, intra-op and inter-op threads 1, sequential: more threads would sum in another order
and spin on idle cores.  No custom operators, no external data, ONNX format only.
"""

from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _errors

from mlpd.core.errors import MlpdError, ValidationError
from mlpd.serving.datatypes import ONNX_DATATYPES
from mlpd.serving.package import Signature, TensorSpec

ORT_ERRORS: tuple[type[Exception], ...] = (
    *(
        error
        for error in vars(_errors).values()
        if isinstance(error, type) and issubclass(error, Exception)
    ),
    UnicodeDecodeError,
)
"""All that onnxruntime raises; its classes share no base but Exception.

Its messages quote names out of the file: where those are no UTF-8, that error comes in their place.
"""

MISSING_KEY = "mlpd.missing"
"""In a user's file: whether NaN in its inputs is refused."""

_SILENT = 4  # only fatal messages: every error is raised and reported by us


def read_signature(onnx: bytes, what: str = "the model") -> Signature:
    """Return the inputs and outputs of an ONNX file as its graph names them.

    Builds a session; for untrusted bytes do it in a child process with a memory limit.
    Raises ValidationError as `Session` does, code="unsupported_tensor" for a sequence or map, or
    "invalid_model" for metadata that says nothing known of missing values.
    """
    refuse_external_data(onnx, what)
    inference = build_inference(onnx, what)
    return Signature(
        inputs=tuple(tensor_spec(node, what) for node in inference.get_inputs()),
        outputs=tuple(tensor_spec(node, what) for node in inference.get_outputs()),
        refuses_missing=_refuses_missing(inference, what),
    )


def _refuses_missing(inference: Any, what: str) -> bool:
    """Return what the file's metadata says of NaN: MISSING_KEY is `refuse`, `allow`, or absent."""
    try:
        said = inference.get_modelmeta().custom_metadata_map.get(MISSING_KEY, "allow")
    except ORT_ERRORS as error:
        raise _invalid(what, error) from error
    if said not in ("refuse", "allow"):
        raise ValidationError(
            f"{what} says {MISSING_KEY} = {said[:60]!r} in its metadata",
            code="invalid_model",
            hint="Known are refuse and allow; onnx.helper.set_model_props sets it.",
        )
    return bool(said == "refuse")


def refuse_external_data(onnx: bytes, what: str) -> None:
    """Raise ValidationError(code="external_data") if a tensor's data stands outside the file.

    onnxruntime would read any path, and any memory address, that the file names.  A location is
    text under the key "location", so a file without that word is clean: 0.1 ms per MB.
    """
    if b"location" not in onnx:
        return
    if _has_external_data(parse_model(onnx, what)):
        raise ValidationError(
            f"{what} keeps tensors in external files, which are never read",
            code="external_data",
            hint="Save it as one file: onnx.save(model, path, save_as_external_data=False).",
        )


def parse_model(onnx: bytes, what: str) -> Any:
    """Return the ModelProto in the bytes; raises ValidationError(code="invalid_model")."""
    import onnx as onnx_format  # noqa: PLC0415 - 0.2 s, and the daemon hardly ever needs it
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # noqa: PLC0415

    try:
        return onnx_format.ModelProto.FromString(onnx)
    except DecodeError as error:
        raise _invalid(what, error) from error


def _has_external_data(message: Any) -> bool:
    if message.DESCRIPTOR.name == "TensorProto" and message.external_data:
        return True
    return any(
        _has_external_data(child)
        for field, value in message.ListFields()
        if field.message_type is not None
        for child in ([value] if hasattr(value, "DESCRIPTOR") else value)
    )


def build_inference(onnx: bytes, what: str) -> Any:
    """Return an InferenceSession of the file; raises ValidationError(code="invalid_model")."""
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


def tensor_spec(node: Any, what: str) -> TensorSpec:
    """Return onnxruntime's description of an input or output; raises as `read_signature`."""
    if node.type not in ONNX_DATATYPES:
        raise ValidationError(
            f"tensor {node.name!r} of {what} is a {node.type}, which can't be served",
            code="unsupported_tensor",
            hint="Export plain tensors (for scikit-learn: zipmap=False).",
        )
    shape = tuple(size if isinstance(size, int) else -1 for size in node.shape)
    return TensorSpec(node.name, ONNX_DATATYPES[node.type], shape)


def _invalid(what: str, error: Exception) -> MlpdError:
    return ValidationError(
        f"{what} is no ONNX model that can be served: {first_line(error)}",
        code="invalid_model",
        hint="Custom operators and other formats are refused; check the file with onnx.checker.",
    )


def first_line(error: Exception) -> str:
    """Return what onnxruntime says, without its stack."""
    return str(error).partition("\n")[0][:300]
