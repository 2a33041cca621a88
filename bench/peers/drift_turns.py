"""What the drift peers' scripts share: the rows, and one timed report for each line of input."""

import json
import sys
import time
from collections.abc import Callable

import numpy as np
import pandas as pd

Report = Callable[[pd.DataFrame, pd.DataFrame], float]
"""Compares live rows with reference rows; returns its statistic for the first feature."""


def serve(*reports: Report) -> None:
    """Run the report of the number in each line; answer with its milliseconds and its statistic."""
    with np.load(sys.argv[1]) as rows:
        names = [f"f{i}" for i in range(rows["live"].shape[1])]
        reference = pd.DataFrame(rows["reference"], columns=names)
        live = pd.DataFrame(rows["live"], columns=names)
    for line in sys.stdin:
        started = time.perf_counter()
        statistic = reports[int(line)](reference, live)
        ms = 1e3 * (time.perf_counter() - started)
        sys.stdout.write(json.dumps({"ms": ms, "statistic": statistic}) + "\n")
        sys.stdout.flush()
