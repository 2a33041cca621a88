"""Training engine: LightGBM training, evaluation, the ONNX exporter, runs and schedules."""
