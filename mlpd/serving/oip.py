"""Open Inference Protocol v2: infer requests and answers, as JSON values and bytes; pure.

request = parse_request(document, blobs)
features = features_of(request, package)          a trained model: float64 [n, F]
inputs = named_inputs(request, package)           a user's ONNX file: its own tensors
document, blobs = build_response(request, package, outputs)
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
from mlpd.serving.jobs import PRIORITIES, USUAL_PRIORITY
from mlpd.serving.oip_binary import Blobs
from mlpd.serving.oip_tensors import (
    Tensor,
    build_tensor,
    parse_tensor,
    rank_classes,
    refuse_shared_memory,
)
from mlpd.serving.package import FEATURES, RAW_SCORE, SCORE, ModelPackage, Tensors, TensorSpec

TENSORS_MAX = 10_000
"""Most inputs of a request: one for each feature of a wide model."""

_ROW_DIMENSIONS = (1, 2)
_DATATYPE_OF = {dtype: name for name, dtype in DATATYPES.items()}


@dataclass(frozen=True, slots=True)
class WantedOutput:
    """An output by name, as JSON or `binary`.

    `classes` is the k of `classification: k`, None for the tensor itself.
    """

    name: str
    binary: bool = False
    classes: int | None = None


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A parsed request; `outputs` is empty for the model's usual ones, as `binary` says.

    `timeout_us`: how long the caller will wait, None for ever.  `priority`: one of PRIORITIES.
    """

    id: str | None
    inputs: Mapping[str, Tensor]
    outputs: tuple[WantedOutput, ...]
    binary: bool
    timeout_us: int | None
    priority: int


def parse_request(document: object, blobs: Blobs) -> InferRequest:
    """Return the request in a decoded JSON body, and in the bytes that follow it.

    Unknown keys and parameters are ignored.

    Raises ValidationError: `invalid_request` or what `parse_tensor` raises.
    """
    if not isinstance(document, Mapping):
        raise _invalid("the body is not a JSON object")
    parameters = _parameters(document, "the request")
    binary = _parse_flag(parameters, "binary_data_output", "the request", default=False)
    request_id = document.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise _invalid(f"`id` is a string, got {request_id!r}")
    return InferRequest(
        id=request_id,
        inputs=_parse_inputs(document.get("inputs"), blobs),
        outputs=_parse_outputs(document.get("outputs"), binary=binary),
        binary=binary,
        timeout_us=_parse_whole(parameters, "timeout") or None,  # 0: the server decides
        priority=_parse_priority(_parse_whole(parameters, "priority")),
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

    Raises ValidationError: `unknown_input`, `missing_input`, `wrong_shape`, `wrong_datatype`, and
    `missing_value` for NaN where the model refuses it.
    """
    specs = {spec.name: spec for spec in package.signature.inputs}
    _check_names(request.inputs.keys(), specs.keys(), package.reference)
    for name, spec in specs.items():
        _check_spec(request.inputs[name], spec, package.reference)
        if package.signature.refuses_missing:
            _refuse_missing(name, request.inputs[name].values, package.reference)
    return {name: request.inputs[name].values for name in specs}


def _refuse_missing(name: str, values: NDArray[Any], reference: str) -> None:
    """Raise ValidationError(code="missing_value") for NaN; 1 us and 0.3 ns a value."""
    if values.dtype.kind != "f" or not np.isnan(values).any():
        return
    places = np.argwhere(np.isnan(values))
    first = ", ".join(map(str, places[0].tolist()))
    raise ValidationError(
        f"input {name!r} of model {reference} is NaN in {len(places)} places, first at [{first}]",
        code="missing_value",
        hint="It refuses missing values: fill them in as in its training, or leave rows out.",
    )


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
) -> tuple[dict[str, Any], bytes]:
    """Return the answer with the wanted outputs, in their order, and the request's id.

    The bytes of the binary ones are to follow the JSON.
    """
    usual = (WantedOutput(spec.name, request.binary) for spec in package.signature.outputs)
    built = [
        _build_output(wanted, outputs[wanted.name]) for wanted in request.outputs or tuple(usual)
    ]
    document = {
        "model_name": package.name,
        "model_version": str(package.version),
        **({} if request.id is None else {"id": request.id}),
        "outputs": [output for output, _ in built],
    }
    return document, b"".join(data for _, data in built)


def _build_output(wanted: WantedOutput, values: NDArray[Any]) -> tuple[dict[str, Any], bytes]:
    if wanted.classes is not None:
        if values.ndim == 0 or values.dtype.kind not in "fiu":
            raise _invalid(f"output {wanted.name!r} has no classes to rank")
        values = rank_classes(values, wanted.classes)
    datatype = _DATATYPE_OF[values.dtype]
    return build_tensor(wanted.name, values, datatype, binary=wanted.binary)


def _parse_inputs(documents: object, blobs: Blobs) -> Mapping[str, Tensor]:
    if not isinstance(documents, list) or not 1 <= len(documents) <= TENSORS_MAX:
        raise _invalid(f"`inputs` is a list of 1 to {TENSORS_MAX} tensors")
    inputs: dict[str, Tensor] = {}
    for document in documents:
        name, tensor = parse_tensor(document, blobs)
        if name in inputs:
            raise _invalid(f"input {name!r} is there twice")
        inputs[name] = tensor
    blobs.check_empty()
    return inputs


def _parse_outputs(documents: object, *, binary: bool) -> tuple[WantedOutput, ...]:
    if documents is None:
        return ()
    if not isinstance(documents, list) or len(documents) > TENSORS_MAX:
        raise _invalid(f"`outputs` is a list of at most {TENSORS_MAX} objects")
    return tuple(_parse_output(document, binary=binary) for document in documents)


def _parse_output(document: object, *, binary: bool) -> WantedOutput:
    if not isinstance(document, Mapping) or not isinstance(document.get("name"), str):
        raise _invalid("an element of `outputs` is an object with a `name`")
    what = f"output {document['name']!r}"
    parameters = _parameters(document, what)
    refuse_shared_memory(parameters, what)
    classes = parameters.get("classification")
    if classes is not None and (type(classes) is not int or classes < 1):
        raise _invalid(f"`classification` of {what} is a number from 1, got {classes!r}")
    own = _parse_flag(parameters, "binary_data", what, default=binary)
    return WantedOutput(document["name"], own, classes)


def _parse_flag(parameters: Mapping[str, Any], key: str, what: str, *, default: bool) -> bool:
    value = parameters.get(key)
    if value is None or isinstance(value, bool):
        return default if value is None else value
    raise _invalid(f"`{key}` of {what} is true or false, got {str(value)[:40]}")


def _parse_whole(parameters: Mapping[str, Any], key: str) -> int:
    """Return a whole number from 0, which also stands for one that isn't there."""
    value = parameters.get(key)
    if value is None:
        return 0
    if type(value) is int and value >= 0:
        return value
    raise _invalid(f"`{key}` is a whole number from 0, got {str(value)[:40]}")


def _parse_priority(number: int) -> int:
    """Return the queue for the protocol's number: 1 goes first, 0 is the usual one."""
    return min(number, PRIORITIES[-1]) if number else USUAL_PRIORITY


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
