"""Child entry `explain`: contributions of features to raw scores, for the versions of a request."""

from typing import Any

import numpy as np

from mlpd.daemon.child import Send
from mlpd.training.contributions import contributions


def run(request: dict[str, Any], send: Send) -> int:
    """Send one "contributions" message per part; returns the number of rows.

    A part has `model_text`, `vectors` (float64 bytes) and `width`.
    """
    rows = 0
    for part in request["parts"]:
        vectors = np.frombuffer(part["vectors"], np.float64).reshape(-1, part["width"])
        found = contributions(part["model_text"], vectors)
        send(
            {
                "kind": "contributions",
                "features": found.features.tolist(),
                "base": found.base.tolist(),
                "raw_score": found.raw_score.tolist(),
            }
        )
        rows += len(vectors)
    return rows
