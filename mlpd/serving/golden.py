"""Golden rows of a user's ONNX file: a document of tensors, checked against its signature."""

import json
from typing import Any

from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.serving.oip_binary import Blobs
from mlpd.serving.oip_tensors import parse_tensor
from mlpd.serving.package import GoldenRows, Signature, TensorSpec


def load_golden(data: bytes) -> object:
    """Return the document in a file of golden rows; ValidationError(code="invalid_golden")."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _invalid_golden(f"the file is no JSON: {error}") from None


def parse_golden(document: object, signature: Signature) -> GoldenRows:
    """Return the golden rows of `{"inputs": [...], "outputs": [...], "rtol": 1e-6}`.

    Tensors are as in the Open Inference Protocol; all inputs and at least one output are named.
    `rtol` (0 when absent: bit for bit) is relative and absolute.  Raises
    ValidationError(code="invalid_golden"), and as `parse_tensor`.
    """
    rtol: Any
    match document:
        case {"inputs": [*inputs], "outputs": [_, *_] as outputs, **rest}:
            rtol = rest.get("rtol", 0.0)
        case _:
            raise _invalid_golden("it is no object with the lists `inputs` and `outputs`")
    if type(rtol) not in (int, float) or not 0 <= rtol < 1:
        raise _invalid_golden(f"rtol is from 0 to 1, got {rtol!r}")
    given = _tensors(inputs, signature.inputs, "input")
    if given.keys() != {spec.name for spec in signature.inputs}:
        raise _invalid_golden(f"it has the inputs {sorted(given)}, the model takes others, too")
    return GoldenRows(given, _tensors(outputs, signature.outputs, "output"), float(rtol))


def _tensors(forms: list[Any], specs: tuple[TensorSpec, ...], what: str) -> dict[str, Any]:
    known, found = {spec.name: spec for spec in specs}, dict[str, NDArray[Any]]()
    for form in forms:
        name, tensor = parse_tensor(form, Blobs())
        if name not in known or name in found:
            raise _invalid_golden(f"the model has no {what} {name!r}, or it stands twice")
        if tensor.datatype != known[name].datatype:
            raise _invalid_golden(f"{what} {name!r} is {known[name].datatype} in the model")
        found[name] = tensor.values
    return found


def _invalid_golden(problem: str) -> ValidationError:
    return ValidationError(
        f"the golden rows can't be used: {problem}",
        code="invalid_golden",
        hint='Give {"inputs": [...], "outputs": [...], "rtol": 1e-6} with tensors as in /v2.',
    )
