"""NannyML's univariate drift, Jensen-Shannon distance, all live rows in one chunk.

0: the calculator is fitted, too; 1: it was fitted before.
"""

import nannyml
import pandas as pd
from drift_turns import serve


def fit(reference: pd.DataFrame) -> nannyml.UnivariateDriftCalculator:
    calculator = nannyml.UnivariateDriftCalculator(
        column_names=list(reference.columns),
        continuous_methods=["jensen_shannon"],
        chunk_number=1,
    )
    return calculator.fit(reference)


def calculate(calculator: nannyml.UnivariateDriftCalculator, live: pd.DataFrame) -> float:
    found = calculator.calculate(live).filter(period="analysis").to_df()
    return float(found["f0"]["jensen_shannon"]["value"].iloc[0])


def from_scratch(reference: pd.DataFrame, live: pd.DataFrame) -> float:
    return calculate(fit(reference), live)


fitted: list[nannyml.UnivariateDriftCalculator] = []


def when_fitted(reference: pd.DataFrame, live: pd.DataFrame) -> float:
    if not fitted:  # by the first question, which nobody times
        fitted.append(fit(reference))
    return calculate(fitted[0], live)


serve(from_scratch, when_fitted)
