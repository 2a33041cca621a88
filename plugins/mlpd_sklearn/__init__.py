"""Trainer `sklearn`: estimators of scikit-learn, served through skl2onnx.

A job names one in its params: `{"estimator": "LogisticRegression", "C": 0.5}`; every other param is
the estimator's own.  `pip install mlpd[sklearn]`.
"""

from mlpd_sklearn.trainer import SklearnTrainer

TRAINER = SklearnTrainer()

__all__ = ["TRAINER", "SklearnTrainer"]
