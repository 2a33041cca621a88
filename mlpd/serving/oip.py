"""Open Inference Protocol v2: infer requests and answers, as JSON values; pure.

request = parse_request(document)
features = features_of(request, package)          a trained model: float64 [n, F]
inputs = named_inputs(request, package)           a user's ONNX file: its own tensors
build_response(request, package, outputs)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column, Columns, DType
from mlpd.core.errors import ValidationError
from mlpd.core.vector import Vectorizer
from mlpd.serving.datatypes import DATATYPES
from mlpd.serving.oip_tensors import (
    Tensor,
    binary_unsupported,
    build_classes,
    build_tensor,
    parse_tensor,
)
from mlpd.serving.package import FEATURES, RAW_SCORE, SCORE, ModelPackage, Tensors, TensorSpec

TENSORS_MAX = 10_000
"""Most inputs of a request: one for each feature of a wide model."""

_ROW_DIMENSIONS = (1, 2)
_DATATYPE_OF = {dtype: name for name, dtype in DATATYPES.items()}


@dataclass(frozen=True, slots=True)
class WantedOutput:
    """An output by name; `classes` is the k of `classification: k`, None for the tensor itself."""

    name: str
    classes: int | None = None


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A parsed request; `outputs` is empty for the model's usual ones.

    `timeout_us`: how long the caller will wait, None for ever.
    """

    id: str | None
    inputs: Mapping[str, Tensor]
    outputs: tuple[WantedOutput, ...]
    timeout_us: int | None


def parse_request(document: object) -> InferRequest:
    """Return the request in a decoded JSON body; unknown keys and parameters are ignored.

    Raises ValidationError: `invalid_request` or what `parse_tensor` raises.
    """
    if not isinstance(document, Mapping):
        raise _invalid("the body is not a JSON object")
    parameters = _parameters(document, "the request")
    if parameters.get("binary_data_output"):
        raise binary_unsupported("the request", "binary_data_output")
    request_id = document.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise _invalid(f"`id` is a string, got {request_id!r}")
    return InferRequest(
        id=request_id,
        inputs=_parse_inputs(document.get("inputs")),
        outputs=_parse_outputs(document.get("outputs")),
        timeout_us=_parse_timeout(parameters.get("timeout")),
    )


def features_of(request: InferRequest, package: ModelPackage) -> NDArray[np.float64]:
    """Return the vectors float64 [n, F] for a trained model.

    From the one tensor `features` FP64 [-1, F], or from one tensor per feature by name, [-1] or
    [-1, 1], encoded with the version's own categories (BYTES for text).
    Raises ValidationError: `unknown_input`, `missing_input`, `wrong_shape`, `wrong_datatype`,
    `wrong_type`.
    """
    vectorizer = package.signature.vectorizer
    if vectorizer is None:
        raise _invalid(f"model {package.reference} takes no features")
    if request.inputs.keys() == {FEATURES} and vectorizer.names != (FEATURES,):
        named = named_inputs(request, package)
        return np.ascontiguousarray(named[FEATURES])
    columns = _columns(request.inputs, vectorizer, package.reference)
    return vectorizer.vectorize(columns)


def named_inputs(request: InferRequest, package: ModelPackage) -> dict[str, NDArray[Any]]:
    """Return the tensors that the model's signature names, checked against it.

    Raises ValidationError: `unknown_input`, `missing_input`, `wrong_shape`, `wrong_datatype`.
    """
    specs = {spec.name: spec for spec in package.signature.inputs}
    _check_names(request.inputs.keys(), specs.keys(), package.reference)
    for name, spec in specs.items():
        _check_spec(request.inputs[name], spec, package.reference)
    return {name: request.inputs[name].values for name in specs}


def check_outputs(request: InferRequest, package: ModelPackage) -> None:
    """Raise ValidationError(code="unknown_output") unless the model gives what is wanted."""
    known = _output_names(package)
    for wanted in request.outputs:
        if wanted.name not in known:
            raise ValidationError(
                f"model {package.reference} has no output {wanted.name!r}; "
                f"it has {', '.join(known)}",
                code="unknown_output",
                hint="Ask for one of its outputs, or leave `outputs` out.",
            )


def build_response(
    request: InferRequest, package: ModelPackage, outputs: Tensors
) -> dict[str, Any]:
    """Return the answer with the wanted outputs, in their order, and the request's id."""
    usual = tuple(WantedOutput(spec.name) for spec in package.signature.outputs)
    return {
        "model_name": package.name,
        "model_version": str(package.version),
        **({} if request.id is None else {"id": request.id}),
        "outputs": [
            _build_output(wanted, outputs[wanted.name]) for wanted in request.outputs or usual
        ],
    }


def _build_output(wanted: WantedOutput, values: NDArray[Any]) -> dict[str, Any]:
    if wanted.classes is None:
        return build_tensor(wanted.name, values, _DATATYPE_OF[values.dtype])
    if values.ndim == 0 or values.dtype.kind not in "fiu":
        raise _invalid(f"output {wanted.name!r} has no classes to rank")
    return build_classes(wanted.name, values, wanted.classes)


def _parse_inputs(documents: object) -> Mapping[str, Tensor]:
    if not isinstance(documents, list) or not 1 <= len(documents) <= TENSORS_MAX:
        raise _invalid(f"`inputs` is a list of 1 to {TENSORS_MAX} tensors")
    inputs: dict[str, Tensor] = {}
    for document in documents:
        name, tensor = parse_tensor(document)
        if name in inputs:
            raise _invalid(f"input {name!r} is there twice")
        inputs[name] = tensor
    return inputs


def _parse_outputs(documents: object) -> tuple[WantedOutput, ...]:
    if documents is None:
        return ()
    if not isinstance(documents, list) or len(documents) > TENSORS_MAX:
        raise _invalid(f"`outputs` is a list of at most {TENSORS_MAX} objects")
    return tuple(_parse_output(document) for document in documents)


def _parse_output(document: object) -> WantedOutput:
    if not isinstance(document, Mapping) or not isinstance(document.get("name"), str):
        raise _invalid("an element of `outputs` is an object with a `name`")
    what = f"output {document['name']!r}"
    parameters = _parameters(document, what)
    for key in ("binary_data", "shared_memory_region"):
        if parameters.get(key):
            raise binary_unsupported(what, key)
    classes = parameters.get("classification")
    if classes is not None and (type(classes) is not int or classes < 1):
        raise _invalid(f"`classification` of {what} is a number from 1, got {classes!r}")
    return WantedOutput(document["name"], classes)


def _parse_timeout(timeout: object) -> int | None:
    if timeout is None:
        return None
    if type(timeout) is not int or timeout < 0:
        raise _invalid(f"`timeout` is a number of microseconds, got {timeout!r}")
    return timeout or None  # 0 means that the server decides


def _parameters(document: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    parameters = document.get("parameters")
    if parameters is None:
        return {}
    if isinstance(parameters, Mapping):
        return parameters
    raise _invalid(f"`parameters` of {what} is an object")


def _columns(inputs: Mapping[str, Tensor], vectorizer: Vectorizer, reference: str) -> Columns:
    _check_names(inputs.keys(), vectorizer.names, reference)
    columns = {name: _column(name, inputs[name]) for name in vectorizer.names}
    heights = {len(column) for column in columns.values()}
    if len(heights) > 1:
        raise ValidationError(
            f"the features of model {reference} have {sorted(heights)} rows",
            code="wrong_shape",
            hint="Send the same number of rows for each feature.",
        )
    return columns


def _column(name: str, tensor: Tensor) -> Column:
    values = tensor.values
    if values.ndim not in _ROW_DIMENSIONS or values.shape[1:] not in ((), (1,)):
        raise ValidationError(
            f"feature {name!r} has shape {list(values.shape)}, expected [n] or [n, 1]",
            code="wrong_shape",
            hint="Send one value per row.",
        )
    values = values.reshape(-1)
    if tensor.datatype == "BYTES":
        return Column(DType.STRING, values)
    if tensor.datatype == "BOOL":
        return Column(DType.BOOL, values)
    if values.dtype.kind == "f":
        return Column(DType.FLOAT64, values.astype(np.float64))
    if values.dtype == np.uint64 and (values >= 2**63).any():
        raise ValidationError(
            f"feature {name!r} has a value over 2**63 - 1", code="wrong_value", hint="Send INT64."
        )
    return Column(DType.INT64, values.astype(np.int64))


def _check_names(found: Any, wanted: Any, reference: str) -> None:
    known = ", ".join(wanted)
    for name in found:
        if name not in wanted:
            raise ValidationError(
                f"model {reference} has no input {name!r}; it takes {known}",
                code="unknown_input",
                hint="See the model's metadata.",
            )
    for name in wanted:
        if name not in found:
            raise ValidationError(
                f"model {reference} needs input {name!r}, which isn't there; it takes {known}",
                code="missing_input",
                hint="Send every input of the model.",
            )


def _check_spec(tensor: Tensor, spec: TensorSpec, reference: str) -> None:
    what = f"input {spec.name!r} of model {reference}"
    if tensor.datatype != spec.datatype:
        raise ValidationError(
            f"{what} is {spec.datatype}, got {tensor.datatype}",
            code="wrong_datatype",
            hint=f"Send {spec.datatype}.",
        )
    shape = tensor.values.shape
    if len(shape) != len(spec.shape) or any(
        wanted not in (-1, size) for size, wanted in zip(shape, spec.shape, strict=True)
    ):
        raise ValidationError(
            f"{what} has shape {list(spec.shape)}, got {list(shape)}",
            code="wrong_shape",
            hint="-1 stands for any size.",
        )


def _output_names(package: ModelPackage) -> tuple[str, ...]:
    if package.trained:
        return SCORE, RAW_SCORE
    return tuple(spec.name for spec in package.signature.outputs)


def _invalid(problem: str) -> ValidationError:
    return ValidationError(
        f"infer request: {problem}",
        code="invalid_request",
        hint='Send {"inputs": [{"name", "shape", "datatype", "data"}]}; see /docs.',
    )
