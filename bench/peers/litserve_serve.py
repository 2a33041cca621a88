"""LitServe around a session: `python litserve_serve.py MODEL PORT`; runs in its own environment."""

import sys
from typing import Any

import litserve
import numpy as np
import onnxruntime
from fastapi import Request


class Scorer(litserve.LitAPI):
    """One vector in, its score out."""

    def setup(self, device: str) -> None:  # noqa: ARG002 - it is the CPU
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(sys.argv[1], options)

    def decode_request(self, request: Request) -> Any:
        body: Any = request  # LitServe takes the annotation for how, and hands the JSON over
        return np.array(body["vector"], np.float64)

    def predict(self, x: Any) -> Any:
        raw = self.session.run(["raw_score"], {"features": x.reshape(1, -1)})[0]
        return 1.0 / (1.0 + np.exp(-raw[:, 0]))

    def encode_response(self, output: Any) -> Any:
        return {"score": float(output[0])}


if __name__ == "__main__":
    server = litserve.LitServer(Scorer(), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False)
