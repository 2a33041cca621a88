"""One Open Inference request: prepare (any thread), run (the loop), answer (any thread)."""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlpd.serving.oip import (
    InferRequest,
    check_outputs,
    features_of,
    named_inputs,
    parse_request,
)
from mlpd.serving.oip_binary import Blobs
from mlpd.serving.package import RAW_SCORE, SCORE, ModelPackage, Tensors
from mlpd.serving.predictor import ServedModel


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request checked against its model: float64 [n, F] for a trained one, else its tensors."""

    request: InferRequest
    inputs: NDArray[np.float64] | Tensors


def prepare(package: ModelPackage, document: object, blobs: Blobs) -> Prepared:
    """Return what a decoded JSON body, and the bytes that follow it, ask of the model.

    Raises ValidationError for anything wrong with them.
    """
    request = parse_request(document, blobs)
    check_outputs(request, package)
    made = features_of(request, package) if package.trained else named_inputs(request, package)
    return Prepared(request, made)


async def run(
    served: ServedModel, prepared: Prepared, *, deadline_s: float | None = None
) -> Tensors:
    """Return the model's outputs by name; raises what predicting raises.

    The request's own `timeout` shortens the deadline, `time.monotonic()` seconds.
    """
    request, inputs = prepared.request, prepared.inputs
    deadline_s = _deadline_s(request, deadline_s)
    if not isinstance(inputs, np.ndarray):
        return await served.infer(inputs, deadline_s=deadline_s, priority=request.priority)
    scores = await served.predict(inputs, deadline_s=deadline_s, priority=request.priority)
    return {SCORE: scores.score, RAW_SCORE: scores.raw}


def _deadline_s(request: InferRequest, deadline_s: float | None) -> float | None:
    if request.timeout_us is None:
        return deadline_s
    own_s = time.monotonic() + request.timeout_us / 1e6
    return own_s if deadline_s is None else min(own_s, deadline_s)
