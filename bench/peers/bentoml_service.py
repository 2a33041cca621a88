"""BentoML around a session: `bentoml serve bentoml_service:Scorer`, the model in BENCH_MODEL."""

import os

import bentoml
import numpy as np
import onnxruntime


@bentoml.service(workers=1)
class Scorer:
    """One vector in, its score out."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.environ["BENCH_MODEL"], options)

    @bentoml.api
    async def score(self, vector: list[float]) -> float:
        """Return the score of one vector; on the loop, which is its quickest way."""
        features = np.array(vector, np.float64).reshape(1, -1)
        raw = self.session.run(["raw_score"], {"features": features})[0]
        return float(1.0 / (1.0 + np.exp(-raw[0, 0])))
