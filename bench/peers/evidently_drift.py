"""Evidently's data drift report: 0 by PSI, 1 by its default, the normed Wasserstein distance."""

import pandas as pd
from drift_turns import serve
from evidently import DataDefinition, Dataset, Report
from evidently.presets import DataDriftPreset


def by_psi(reference: pd.DataFrame, live: pd.DataFrame) -> float:
    return report(DataDriftPreset(num_method="psi"), reference, live)


def by_default(reference: pd.DataFrame, live: pd.DataFrame) -> float:
    return report(DataDriftPreset(), reference, live)


def report(preset: DataDriftPreset, reference: pd.DataFrame, live: pd.DataFrame) -> float:
    known = DataDefinition(numerical_columns=list(live.columns))
    sides = (Dataset.from_pandas(rows, data_definition=known) for rows in (live, reference))
    return float(Report([preset]).run(*sides).dict()["metrics"][1]["value"])


serve(by_psi, by_default)
