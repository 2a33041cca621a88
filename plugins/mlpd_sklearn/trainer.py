"""Fits an estimator, exports it, and tells what scikit-learn itself says to the sample."""

import hashlib
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlpd.core.errors import DefinitionError, ValidationError
from mlpd.core.trainers import Bound, FittedModel, Floats, Tell, TrainingOrder
from mlpd.training.adapt import OPSETS, adapt_onnx
from mlpd_sklearn.estimators import (
    CLASSIFIES,
    REGRESSES,
    Estimator,
    build_estimator,
    find_estimator,
)
from mlpd_sklearn.prepare import Prepare

_log = logging.getLogger("mlpd_sklearn")


class SklearnTrainer:
    """Estimators of scikit-learn; `rounds` and `patience` of an order mean nothing to them."""

    objectives = (*CLASSIFIES, *REGRESSES)

    def fit(self, order: TrainingOrder, tell: Tell) -> FittedModel:
        """Return the estimator that the params name, fitted.

        Raises DefinitionError: `unknown_estimator`, `unknown_parameter`, `fixed_parameter`,
        `training_failed`; ValidationError: `too_many_categories`, `label_not_a_class`.
        """
        import sklearn  # noqa: PLC0415 - half a second

        name, form = find_estimator(order.params, order.objective)
        estimator = build_estimator(
            name, form, order.params, seed=order.seed, threads=order.threads
        )
        prepare = Prepare.fit(order, trees=form.trees)
        tell(round=0, rounds=1)
        _fit(estimator, prepare.apply(order.train.vectors), order.train.labels)
        tell(round=1, rounds=1)
        classes = _classes(estimator, order)
        onnx, link = _export(estimator, form, prepare, order, classes)
        scores = _scores(estimator, prepare.apply(order.sample), classes)
        if order.objective == "binary":
            scores = scores[:, 1:]
        scale = 1.0 if classes else max(1.0, float(np.abs(order.train.labels).max()))
        return FittedModel(
            onnx=onnx,
            rows=order.sample,
            scores=scores,
            trainer=f"scikit-learn {sklearn.__version__}",
            params=_told(name, estimator, order),
            digest=f"sha256:{hashlib.sha256(onnx).hexdigest()}",
            outputs=scores.shape[1],
            link=link,
            bound=Bound(form.tolerance * scale, form.tolerance),
            importance=_importance(estimator, prepare, order.features),
            packages=("scikit-learn", "skl2onnx"),
        )


def _fit(estimator: Any, matrix: Floats, labels: Floats) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            estimator.fit(matrix, labels)
        except (ValueError, TypeError) as error:  # InvalidParameterError is one of them
            raise DefinitionError(
                f"scikit-learn refuses to train: {error}"[:2000],
                code="training_failed",
                hint="mend the job's params or its data",
            ) from error
    for warning in caught:  # such as an optimization that did not converge: in the run's log
        _log.warning("%s", warning.message)


def _classes(estimator: Any, order: TrainingOrder) -> int:
    """Return the number of classes, 0 for a regression; they must be 0, 1, 2 ..."""
    if order.objective in REGRESSES:
        return 0
    found = estimator.classes_.tolist()
    if found != [float(i) for i in range(len(found))]:
        raise ValidationError(
            f"the training rows have the labels {found[:10]}, expected 0, 1, 2 ... without a gap",
            code="label_not_a_class",
            hint="Count classes from 0, and let the training rows hold all of them.",
        )
    return len(found)


_LINKS: Mapping[str, Mapping[str, Any]] = {
    "Sigmoid": {"kind": "sigmoid", "scale": 1.0},
    "Softmax": {"kind": "softmax"},
    "Exp": {"kind": "exp"},
}


def _export(
    estimator: Any, form: Estimator, prepare: Prepare, order: TrainingOrder, classes: int
) -> tuple[bytes, Mapping[str, Any]]:
    """Return the graph up to its last link, and that link."""
    from skl2onnx import to_onnx  # noqa: PLC0415 - a second
    from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType  # noqa: PLC0415

    width = len(prepare.sources)
    kind = FloatTensorType if form.trees else DoubleTensorType
    model = to_onnx(
        estimator,
        initial_types=[("X", kind([None, width]))],
        options={id(estimator): {"zipmap": False}} if classes else None,
        target_opset=OPSETS,
    )
    last = next((node for node in reversed(model.graph.node) if node.op_type in _LINKS), None)
    binary = order.objective == "binary"
    onnx = adapt_onnx(
        model.SerializeToString(),
        width=len(order.features),
        outputs=classes if classes and not binary else 1,
        output=last.input[0] if last else None,
        column=-1 if binary else None,
        chances=bool(classes) and last is None,
        preparation=prepare.to_onnx(),
    )
    return onnx, _LINKS[last.op_type] if last else {"kind": "identity"}


def _scores(estimator: Any, matrix: Floats, classes: int) -> Floats:
    """Return predictions [n, 1], or the chance of every class [n, classes]."""
    if not classes:
        with np.errstate(over="ignore"):  # exp of 1e30 is infinite, served so too
            return np.asarray(estimator.predict(matrix), np.float64).reshape(-1, 1)
    chances: Floats = np.asarray(estimator.predict_proba(matrix), np.float64)
    return chances


def _told(name: str, estimator: Any, order: TrainingOrder) -> dict[str, Any]:
    """Return every parameter that JSON can carry."""
    own = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in estimator.get_params(deep=False).items()
        if isinstance(value, str | int | float | bool | tuple | type(None))
    }
    return {**own, "estimator": name, "seed": order.seed, "num_threads": order.threads}


def _importance(estimator: Any, prepare: Prepare, features: tuple[str, ...]) -> dict[str, float]:
    """Return what each feature brought, as trees or coefficients tell it; zeros where none do."""
    weights = getattr(estimator, "feature_importances_", None)
    if weights is None:
        weights = np.abs(np.atleast_2d(getattr(estimator, "coef_", 0.0))).sum(axis=0)
    shares = np.zeros(len(features))
    if len(weights) == len(prepare.sources):
        np.add.at(shares, prepare.sources, weights)
    shares = shares / (shares.sum() or 1.0)
    order = np.argsort(-shares, kind="stable")
    return {features[i]: float(shares[i]) for i in order}
