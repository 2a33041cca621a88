"""whylogs's profile of the live rows: what it counts of each column, without a comparison."""

import pandas as pd
import whylogs
from drift_turns import serve


def mean_of_profile(_: pd.DataFrame, live: pd.DataFrame) -> float:
    summary = whylogs.log(live).profile().view().get_column("f0").to_summary_dict()
    return float(summary["distribution/mean"])


serve(mean_of_profile)
