"""Trainer `command`: a program of the user's own reads Parquet and writes ONNX and metrics.

The operator names what may be started in `[plugins] commands`; a job picks one by name:
`params={"command": "churn"}`.  docs/paths/plugins.md describes the files.
"""

from mlpd_command.trainer import CommandTrainer

TRAINER = CommandTrainer()

__all__ = ["TRAINER", "CommandTrainer"]
