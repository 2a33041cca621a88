"""One Open Inference request, from its document to its answer."""

import time
from typing import Any

from mlpd.serving.oip import (
    InferRequest,
    build_response,
    check_outputs,
    features_of,
    named_inputs,
    parse_request,
)
from mlpd.serving.package import RAW_SCORE, SCORE, Tensors
from mlpd.serving.predictor import ServedModel


async def infer(
    served: ServedModel, document: object, *, deadline_s: float | None = None
) -> dict[str, Any]:
    """Return the answer to a decoded JSON body.

    The request's own `timeout` shortens the deadline, `time.monotonic()` seconds.
    Raises ValidationError for anything wrong with the body, and what predicting raises.
    """
    request = parse_request(document)
    check_outputs(request, served.package)
    outputs = await _run(served, request, _deadline_s(request, deadline_s))
    return build_response(request, served.package, outputs)


async def _run(served: ServedModel, request: InferRequest, deadline_s: float | None) -> Tensors:
    if not served.package.trained:
        inputs = named_inputs(request, served.package)
        return await served.infer(inputs, deadline_s=deadline_s)
    features = features_of(request, served.package)
    scores = await served.predict(features, deadline_s=deadline_s)
    return {SCORE: scores.score, RAW_SCORE: scores.raw}


def _deadline_s(request: InferRequest, deadline_s: float | None) -> float | None:
    if request.timeout_us is None:
        return deadline_s
    own_s = time.monotonic() + request.timeout_us / 1e6
    return own_s if deadline_s is None else min(own_s, deadline_s)
