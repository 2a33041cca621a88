"""The estimators that can be served, each with the form of its inputs and how exact its export is.

Trees are fed float32, as scikit-learn itself feeds them, and sum in float32 inside onnxruntime;
what multiplies matrices is exported in float64.  HistGradientBoosting is missing: skl2onnx 1.20
can't export what scikit-learn 1.9 fits (and LightGBM is built in).
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from mlpd.core.errors import DefinitionError

CLASSIFIES = ("binary", "multiclass")
REGRESSES = ("regression",)


@dataclass(frozen=True, slots=True)
class Estimator:
    """One estimator: where it is, for which objectives, and whether it is made of trees."""

    module: str
    objectives: tuple[str, ...]
    trees: bool = False

    @property
    def tolerance(self) -> float:
        """How far a served score may be off, relative to the scale of the scores.

        Measured on edges of splits and odd values: 6e-7 at worst for trees, 3e-14 for others.
        """
        return 1e-5 if self.trees else 1e-9


ESTIMATORS: Mapping[str, Estimator] = {
    "LogisticRegression": Estimator("sklearn.linear_model", CLASSIFIES),
    "MLPClassifier": Estimator("sklearn.neural_network", CLASSIFIES),
    "RandomForestClassifier": Estimator("sklearn.ensemble", CLASSIFIES, trees=True),
    "ExtraTreesClassifier": Estimator("sklearn.ensemble", CLASSIFIES, trees=True),
    "GradientBoostingClassifier": Estimator("sklearn.ensemble", CLASSIFIES, trees=True),
    "LinearRegression": Estimator("sklearn.linear_model", REGRESSES),
    "Ridge": Estimator("sklearn.linear_model", REGRESSES),
    "Lasso": Estimator("sklearn.linear_model", REGRESSES),
    "ElasticNet": Estimator("sklearn.linear_model", REGRESSES),
    "PoissonRegressor": Estimator("sklearn.linear_model", REGRESSES),
    "MLPRegressor": Estimator("sklearn.neural_network", REGRESSES),
    "RandomForestRegressor": Estimator("sklearn.ensemble", REGRESSES, trees=True),
    "ExtraTreesRegressor": Estimator("sklearn.ensemble", REGRESSES, trees=True),
    "GradientBoostingRegressor": Estimator("sklearn.ensemble", REGRESSES, trees=True),
}

_PINNED = ("random_state", "n_jobs", "verbose", "warm_start")


def find_estimator(params: Mapping[str, Any], objective: str) -> tuple[str, Estimator]:
    """Return name and form of the estimator that the params name; raises DefinitionError."""
    name = params.get("estimator")
    fitting = [n for n, form in ESTIMATORS.items() if objective in form.objectives]
    if name not in fitting:
        raise DefinitionError(
            f"params name the estimator {name!r}; for {objective!r} there are {', '.join(fitting)}",
            code="unknown_estimator",
            hint='Give one, such as params={"estimator": "LogisticRegression", "C": 0.5}.',
        )
    return name, ESTIMATORS[name]


def build_estimator(
    name: str, form: Estimator, params: Mapping[str, Any], *, seed: int, threads: int
) -> Any:
    """Return the estimator, not fitted; raises DefinitionError for params that it doesn't have."""
    cls = getattr(import_module(form.module), name)
    known = set(inspect.signature(cls).parameters)
    own = {k: v for k, v in params.items() if k not in ("estimator", "seed")}
    for param in own:
        if param in _PINNED:
            raise DefinitionError(
                f"parameter {param!r} can't be set among a job's params",
                code="fixed_parameter",
                hint="`seed` decides random_state, [training] threads decides n_jobs.",
            )
        if param not in known:
            raise DefinitionError(
                f"{name} has no parameter {param!r}; it has {', '.join(sorted(known))}",
                code="unknown_parameter",
                hint="See scikit-learn's page of this estimator.",
            )
    fixed = {"random_state": seed, "n_jobs": threads}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in own.items()}
    return cls(**given, **{k: v for k, v in fixed.items() if k in known})
