"""Serving engine: ONNX sessions, batching, routes, links, the Open Inference Protocol."""
