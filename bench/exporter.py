"""Scenario exporter: our float64 graph of a booster against what onnxmltools makes of the same."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.options import Options, SkippedError
from bench.turns import Case, in_turns

FEATURES, TREES, LEAVES = 40, 200, 63
CATEGORIES = {3: 6, 11: 24, 26: 60, 38: 300}
"""Of the booster that has categorical features: how many values each takes."""
TRAINING_ROWS, ROWS = 20_000, 8_192
GRID = 1_024
"""Values are multiples of 1 / GRID: no threshold between two of them moves by rounding it."""
CALLS = {1: 2_000, 16: 500, 256: 40, 4_096: 3}
"""Of a side at a time, by rows a call."""
REPEATS = 3
"""A round is the fastest of so many: beside other work a cache is cold more often."""

Rows = NDArray[np.float64]
Run = Callable[[NDArray[Any]], NDArray[Any]]


def exporter(options: Options) -> dict[str, Case]:
    """Run both graphs of 200 trees of 63 leaves, 40 features, on one thread of onnxruntime.

    Processor time of a call with 1 to 4,096 rows.  Each graph gets rows of its own type, ours
    float64 and theirs float32, and gives the raw score.  Before that ours must equal LightGBM's to
    the bit; theirs must be as near as a sum of 200 float32 leaves can be, on rows that float32
    holds and whose thresholds stay on their side when rounded, so that both take the same branches.
    """
    found: dict[str, Case] = {}
    for name, categories in (("numeric", {}), ("4 categorical", CATEGORIES)):
        rng = np.random.default_rng(1)
        booster = _train(_draw(rng, TRAINING_ROWS, categories), rng, [*categories])
        ours, theirs = _export(booster), _convert(booster)
        rows = _draw(rng, ROWS, categories)
        sides = _open(ours), _open(theirs)
        _check(booster, rows, *sides)
        for batch, calls in CALLS.items():
            run_ours = partial(_timed, sides[0], rows, batch, calls)
            run_theirs = partial(_timed, sides[1], rows.astype(np.float32), batch, calls)
            run_ours(), run_theirs()
            found[f"{name}, {batch:,} rows"] = in_turns(
                run_ours,
                run_theirs,
                rounds=options.rounds,
                measure="cpu_us",
                file_bytes=len(ours),
                file_bytes_against=len(theirs),
            )
    return found


def _draw(rng: np.random.Generator, count: int, categories: Mapping[int, int]) -> Rows:
    rows = np.round(rng.normal(size=(count, FEATURES)) * GRID) / GRID
    for column, values in categories.items():
        rows[:, column] = rng.integers(0, values, count)
    return rows


def _train(rows: Rows, rng: np.random.Generator, categorical: list[int]) -> Any:
    import lightgbm  # noqa: PLC0415 - costs 0.3 s, as do the others: other scenarios don't pay

    label = rows[:, :8].sum(axis=1) + rows[:, 8] * rows[:, 9] + rng.normal(size=len(rows))
    for column in categorical:
        label += np.sin(7 * rows[:, column])
    params = {"objective": "regression", "num_leaves": LEAVES, "num_threads": 1, "verbose": -1}
    data = lightgbm.Dataset(rows, label, categorical_feature=categorical)
    return lightgbm.train(params, data, TREES)


def _export(booster: Any) -> bytes:
    from mlpd.training.exporter import export_model  # noqa: PLC0415

    return export_model(booster.model_to_string()).onnx


def _convert(booster: Any) -> bytes:
    try:
        from onnxmltools import convert_lightgbm  # noqa: PLC0415
        from onnxmltools.convert.common.data_types import FloatTensorType  # noqa: PLC0415
    except ImportError:
        raise SkippedError("onnxmltools is missing: pip install 'mlpd[exports]'") from None
    types = [("features", FloatTensorType([None, FEATURES]))]
    made: bytes = convert_lightgbm(booster, initial_types=types).SerializeToString()
    return made


def _open(onnx: bytes) -> Run:
    import onnxruntime  # noqa: PLC0415

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(onnx, settings, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda rows: np.asarray(session.run(None, {name: rows})[0])


def _check(booster: Any, rows: Rows, ours: Run, theirs: Run) -> None:
    """Both graphs must be of the same trees."""
    expected = booster.predict(rows, raw_score=True, num_threads=1)
    if ours(rows).ravel().tobytes() != expected.tobytes():
        raise RuntimeError("our scores are not LightGBM's to the bit")
    away = np.abs(theirs(rows.astype(np.float32)).ravel() - expected).max()
    allowed = TREES * np.finfo(np.float32).eps * np.abs(expected).max()
    if not away <= allowed:
        raise RuntimeError(f"onnxmltools is off by {away}, of which float32 explains {allowed}")


def _timed(run: Run, rows: NDArray[Any], batch: int, calls: int) -> Mapping[str, float]:
    """Each call gets other rows: the processor would learn the branches of the same ones."""
    parts = [*itertools.islice(_parts(rows, batch), calls)]
    taken_ns = []
    for _ in range(REPEATS):
        started_ns = time.process_time_ns()
        for part in parts:
            run(part)
        taken_ns.append(time.process_time_ns() - started_ns)
    return {"cpu_us": min(taken_ns) / 1e3 / calls}


def _parts(rows: NDArray[Any], batch: int) -> Iterator[NDArray[Any]]:
    starts = itertools.cycle(range(0, len(rows) - batch + 1, batch))
    return (rows[start : start + batch] for start in starts)
