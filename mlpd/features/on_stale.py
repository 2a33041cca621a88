"""What a value older than its view's ttl becomes: null (or its default), itself, or an error."""

from typing import Literal

import numpy as np

from mlpd.core.errors import ConflictError
from mlpd.features.assemble import FeatureFrame
from mlpd.features.status import Status

OnStale = Literal["null", "value", "error"]
ON_STALE: tuple[OnStale, ...] = ("null", "value", "error")
"""`null`: the value is null, or the feature's default.  `value`: it stays.  Its status is STALE."""


def apply_on_stale(frame: FeatureFrame, on_stale: OnStale, *, first_row: int = 0) -> None:
    """Raise ConflictError(code="stale_feature") if `on_stale` is "error" and a value is stale.

    Features that only transforms read count too.  `first_row`: the number of the frame's first.
    """
    if on_stale != "error":
        return
    for part in frame.layout.latest:
        stale = frame.block.state[part.rows] == Status.STALE
        if bool(stale.any()):
            feature, place = np.argwhere(stale)[0].tolist()
            row = first_row + place
            name = f"{part.view.view.name}.{part.features[feature]}"
            raise ConflictError(
                f"feature {name!r} of row {row} is older than its ttl",
                code="stale_feature",
                hint='Send fresher events, or read with on_stale "null" or "value".',
                details={"feature": name, "index": row},
            )
