"""An MLServer runtime around a session: `mlserver start FOLDER` with this file in the folder."""

import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Scorer(MLModel):
    """The tensor `features` in, `score` out."""

    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(self.settings.parameters.uri, options)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        features = NumpyCodec.decode_input(payload.inputs[0])
        raw = self.session.run(["raw_score"], {"features": features})[0]
        score = 1.0 / (1.0 + np.exp(-raw))
        return InferenceResponse(
            model_name=self.name, outputs=[NumpyCodec.encode_output("score", score)]
        )
