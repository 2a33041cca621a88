"""PyTriton around a session: `python pytriton_serve.py MODEL WIDTH PORT`; its own environment."""

import sys
from typing import Any

import numpy as np
import onnxruntime
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


def main(model: str, width: int, port: int) -> None:
    """Serve until killed."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options)

    @batch
    def score(features: Any) -> Any:
        raw = session.run(["raw_score"], {"features": features})[0]
        return [1.0 / (1.0 + np.exp(-raw))]

    ports = {"http_port": port, "grpc_port": port + 1, "metrics_port": port + 2}
    with Triton(config=TritonConfig(http_address="127.0.0.1", **ports)) as triton:
        triton.bind(
            model_name="bench",
            infer_func=score,
            inputs=[Tensor(name="features", dtype=np.float64, shape=(width,))],
            outputs=[Tensor(name="score", dtype=np.float64, shape=(1,))],
            config=ModelConfig(max_batch_size=256),
        )
        triton.serve()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
