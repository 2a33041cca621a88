"""What a version's scores were worth on held-out rows: calibrated chances, and the usual loss.

Fitted in the training process on the test rows, which neither trees nor early stopping saw, and
frozen into the version: estimates of performance and the test for concept drift start from it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.core.isotonic import isotonic
from mlpd.monitoring.scores import PROBABILITY_MIN

Floats = NDArray[np.float64]
Task = Literal["binary", "regression"]

FORMAT_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Calibration:
    """`rows` held-out rows: mean and variance (ddof 1) of their loss, and the isotonic map.

    The loss is log loss of chances, squared error of numbers.  `scores` ascend, `chances` belong
    to them and never fall; both are empty for numbers.
    """

    task: Task
    rows: int
    loss_mean: float
    loss_variance: float
    scores: tuple[float, ...] = ()
    chances: tuple[float, ...] = ()

    def chances_of(self, scores: Floats) -> Floats:
        """Return the calibrated P(label = 1) of each score: linear between knots, flat outside."""
        found: Floats = np.interp(scores, self.scores, self.chances)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return JSON- and msgpack-able values."""
        return {"format": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Calibration":
        """Return what `to_dict` wrote; raises ValidationError on another format."""
        if data.get("format") != FORMAT_VERSION:
            raise ValidationError(
                f"calibration has format {data.get('format')!r}, expected {FORMAT_VERSION}",
                code="calibration_format",
                hint="train the model again, or read it with the mlpd that wrote it",
            )
        return cls(
            task=data["task"],
            rows=data["rows"],
            loss_mean=data["loss_mean"],
            loss_variance=data["loss_variance"],
            scores=tuple(data["scores"]),
            chances=tuple(data["chances"]),
        )


def fit_calibration(labels: Floats, scores: Floats, task: Task) -> Calibration:
    """Return the calibration of held-out rows, float64 [n], n >= 1; `binary` labels are 0 or 1.

    Chances stay 1/(n + 2) away from 0 and 1: nothing is certain after n rows (Laplace).
    """
    losses = losses_of(labels, scores, task)
    variance = float(losses.var(ddof=1)) if len(losses) > 1 else 0.0
    found = Calibration(task, len(labels), float(losses.mean()), variance)
    if task == "regression":
        return found
    knots, means = isotonic(scores, labels)
    least = 1.0 / (len(labels) + 2)
    chances = np.clip(means, least, 1.0 - least)
    return replace(found, scores=tuple(knots.tolist()), chances=tuple(chances.tolist()))


def losses_of(labels: Floats, scores: Floats, task: Task) -> Floats:
    """Return each row's loss: -ln of the chance given to what came, or the squared error."""
    if task == "regression":
        return (scores - labels) ** 2
    return -np.log(np.maximum(np.where(labels == 1, scores, 1.0 - scores), PROBABILITY_MIN))
