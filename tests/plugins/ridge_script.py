"""A user's training program: least squares with numpy, and the ONNX file of it."""

import json
import sys
from pathlib import Path

import numpy as np
import polars as pl
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array

order = json.loads(Path(sys.argv[1]).read_text())
names = order["features"]


def design(frame: pl.DataFrame) -> np.ndarray:
    values = frame.select(names).to_numpy().astype(np.float64)
    return np.clip(np.nan_to_num(values, nan=0.0), -1e6, 1e6)


train = pl.read_parquet(order["train"])
x, y = design(train), train[order["label"]].to_numpy()
weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]) * order["params"].get("alpha", 1.0), x.T @ y)
base = float(y.mean() - x.mean(axis=0) @ weights)
rmse = float((x @ weights + base - y).std())
sys.stdout.write(json.dumps({"round": 1, "rounds": 1, "metrics": {"rmse": rmse}}) + "\n")


def score(frame: pl.DataFrame) -> np.ndarray:
    raw = (design(frame) * weights).sum(axis=1) + base
    return 1 / (1 + np.exp(-np.clip(raw, -500, 500))) if order["objective"] == "binary" else raw


nodes = [
    helper.make_node("IsNaN", ["x"], ["null"]),
    helper.make_node("Where", ["null", "zero", "x"], ["known"]),
    helper.make_node("Clip", ["known", "least", "most"], ["inside"]),
    helper.make_node("MatMul", ["inside", "weights"], ["sum"]),
    helper.make_node("Add", ["sum", "base"], ["y"]),
]
link = {"kind": "sigmoid", "scale": 1.0} if order["objective"] == "binary" else {"kind": "identity"}
constants = {
    "zero": np.array(0.0),
    "least": np.array(-1e6),
    "most": np.array(1e6),
    "weights": weights.reshape(-1, 1),
    "base": np.array(base),
}
graph = helper.make_graph(
    nodes,
    "ridge",
    [helper.make_tensor_value_info("x", TensorProto.DOUBLE, [None, len(names)])],
    [helper.make_tensor_value_info("y", TensorProto.DOUBLE, [None, 1])],
    initializer=[from_array(value, name) for name, value in constants.items()],
)
opset = [helper.make_opsetid("", 18)]
Path(order["model"]).write_bytes(
    helper.make_model(graph, ir_version=10, opset_imports=opset).SerializeToString()
)
pl.DataFrame({"score": score(pl.read_parquet(order["sample"]))}).write_parquet(order["scores"])
importance = dict(zip(names, np.abs(weights).tolist(), strict=True))
Path(order["result"]).write_text(
    json.dumps({"link": link, "importance": importance, "bound": [1e-9, 1e-9]})
)
