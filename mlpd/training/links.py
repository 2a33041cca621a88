"""From a model's objective to its link: how a raw score becomes what predict() returns."""

from typing import Any

from mlpd.core.errors import ValidationError

_RANKING = ("lambdarank", "rank_xendcg")
_REGRESSION = ("regression", "regression_l1", "huber", "fair", "quantile", "mape")
_LOG = ("poisson", "gamma", "tweedie")
_CLASSES = ("binary", "cross_entropy", "multiclass", "multiclassova")
EXPORTABLE = (*_CLASSES, *_REGRESSION, *_LOG, *_RANKING)
"""Objectives whose link we apply to the bit."""


def parse_link(
    objective: str | None, *, outputs: int, average_of: int | None = None
) -> dict[str, Any]:
    """Return the link of a model text's `objective=` line, as JSON; `x` is one raw score.

    `{"kind": "identity"}`                x
    `{"kind": "reg_sqrt"}`                sign(x) * x * x
    `{"kind": "exp"}`                     exp(x)
    `{"kind": "sigmoid", "scale": s}`     1 / (1 + exp(-s * x)), for every output on its own
    `{"kind": "softmax"}`                 exp(x - max) / sum, summed from output 0 upwards

    `exp` is libm's, one value at a time (`math.exp`; numpy's own differs by an ulp).
    `multiclassova` is a sigmoid with several outputs.  `average_of` trees (`boosting=rf`) comes as
    a further key: `x` is then the raw score, a sum, divided by it.  The scale has the digits that
    the text has: LightGBM writes six, and predicts with those once the text is loaded.

    Raises ValidationError (`export_unsupported`) for any other objective.
    """
    link = _one_output(objective) if outputs == 1 else _many_outputs(objective, outputs)
    if link is None:
        raise ValidationError(
            f"a model with objective {objective!r} and {outputs} outputs has no exact export",
            code="export_unsupported",
            hint=f"train with one of: {', '.join(EXPORTABLE)}",
            details={"objective": objective, "outputs": outputs},
        )
    return link if average_of is None else {**link, "average_of": average_of}


def _one_output(objective: str | None) -> dict[str, Any] | None:
    name, settings = _split(objective)
    if name in _REGRESSION and settings == {"sqrt": ""}:
        return {"kind": "reg_sqrt"}
    if name == "binary" and settings.keys() == {"sigmoid"}:
        return {"kind": "sigmoid", "scale": float(settings["sigmoid"])}
    if settings:
        return None
    if name in _REGRESSION or name in _RANKING:
        return {"kind": "identity"}
    if name in _LOG:
        return {"kind": "exp"}
    return {"kind": "sigmoid", "scale": 1.0} if name == "cross_entropy" else None


def _many_outputs(objective: str | None, outputs: int) -> dict[str, Any] | None:
    name, settings = _split(objective)
    if settings.pop("num_class", None) != str(outputs):
        return None
    if name == "multiclass" and not settings:
        return {"kind": "softmax"}
    if name == "multiclassova" and settings.keys() == {"sigmoid"}:
        return {"kind": "sigmoid", "scale": float(settings["sigmoid"])}
    return None


def _split(objective: str | None) -> tuple[str, dict[str, str]]:
    name, *words = (objective or "").split(" ")
    pairs = (word.partition(":") for word in words if word)
    return name, {key: value for key, _, value in pairs}
