"""Judges for the exporter: onnxruntime runs what it made, LightGBM says what is right."""

from collections.abc import Callable

import lightgbm
import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

Scores = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@pytest.fixture(scope="session")
def onnx_scores() -> Callable[[bytes], Scores]:
    def open_session(onnx: bytes) -> Scores:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        return lambda rows: session.run(["raw_score"], {"features": rows})[0]

    return open_session


@pytest.fixture(scope="session")
def lightgbm_scores() -> Callable[[str], Scores]:
    def load(model_text: str) -> Scores:
        booster = lightgbm.Booster(model_str=model_text)
        return lambda rows: booster.predict(rows, raw_score=True, num_threads=1).reshape(
            len(rows), -1
        )

    return load
