"""The check of users' ONNX files: what is served, what is refused, what it survives."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

import mlpd
from mlpd.core.errors import ValidationError
from mlpd.serving.check import NODES_MAX, check_model
from mlpd.serving.package import ModelPackage, TensorSpec
from mlpd.serving.sessions import Session

HERE = Path(__file__).parent
REFUSALS = {
    *("invalid_model", "external_data", "custom_operator", "unbounded_operator"),
    *("model_too_large", "model_does_not_run", "unsupported_tensor"),
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tests_serving_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hostile, inotify = load("hostile"), load("inotify")


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """A folder with a file that no check may open, and every kind of link to it."""
    folder = tmp_path / "secrets"
    folder.mkdir()
    (folder / "secret.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (folder / "symbolic").symlink_to(folder / "secret.bin")
    (folder / "hard").hardlink_to(folder / "secret.bin")
    (folder / "folder").symlink_to(folder)
    return folder


def outcomes(folder: Path, *kinds: str) -> dict[str, str]:
    """Check the hostile files of these kinds, each in a process of its own; see hostile.py."""
    done = subprocess.run(
        [sys.executable, str(HERE / "hostile.py"), str(folder), *kinds],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(Path(mlpd.__file__).parents[1])},
        timeout=55,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({entry["name"] for entry in found}) == len(found)
    return {entry["name"]: entry["outcome"] for entry in found}


def test_external_data_is_never_opened_wherever_it_hides(secrets: Path) -> None:
    with inotify.watched(secrets) as opened:
        found = outcomes(secrets, "external")
    assert opened == []
    assert len(found) == len(hostile.LOCATIONS) * len(hostile.PLACES) + 5
    assert set(found.values()) == {"external_data"}


def test_an_opened_secret_would_be_noticed(secrets: Path) -> None:
    with inotify.watched(secrets) as opened:
        (secrets / "symbolic").read_bytes()
        (secrets / "hard").read_bytes()
    assert set(opened) == {"secret.bin", "hard"}


def test_foreign_operators_and_loops_are_refused_by_name(secrets: Path) -> None:
    found = outcomes(secrets, "foreign", "loop")
    assert Counter(name.partition("/")[0] for name in found)["foreign"] == 40
    for name, outcome in found.items():
        loop = name.startswith("loop/")
        assert outcome == ("unbounded_operator" if loop else "custom_operator"), name


def test_giants_and_oddities_end_in_a_refusal(secrets: Path) -> None:
    found = outcomes(secrets, "giant", "strange", "endless")
    assert len(found) > 35
    assert found.pop("strange/newer") == "accepted"  # the model's own version may be any number
    assert found.pop("endless/scan") == "died with -9"  # of its limit on processor time
    assert set(found.values()) <= REFUSALS


def test_spoilt_files_end_in_a_refusal_or_are_models_still(secrets: Path) -> None:
    found = outcomes(secrets, "truncated", "mutated", "foreign-format")
    assert len(found) > 200
    assert set(found.values()) <= REFUSALS | {"accepted"}
    counts = Counter(found.values())
    assert counts["invalid_model"] > counts["accepted"] > 0


def test_a_good_file_is_described() -> None:
    found = check_model(hostile.good().SerializeToString())
    assert found.signature.inputs == (TensorSpec("x", "FP32", (-1, 4)),)
    assert [spec.name for spec in found.signature.outputs] == ["y"]
    assert found.opsets == {"ai.onnx": 17, "ai.onnx.ml": 3}
    assert (found.nodes, found.parameters) == (2, 12)


def test_functions_of_its_own_are_fine() -> None:
    made = hostile.in_function(hostile.constant("w", np.ones(4, np.float32)))
    found = check_model(made.SerializeToString())
    assert found.nodes == 3


def test_too_many_nodes_are_refused() -> None:
    nodes = [onnx.helper.make_node("Abs", ["x"], [f"y{i}"]) for i in range(NODES_MAX + 1)]
    with pytest.raises(ValidationError) as caught:
        check_model(hostile.model(nodes).SerializeToString())
    assert caught.value.code == "model_too_large"


def serve(data: bytes, inputs: dict[str, Any]) -> dict[str, Any]:
    """Check a file as an upload is, then run it as the daemon would."""
    signature = check_model(data).signature
    session = Session(ModelPackage("m", 1, "sha256:0", data, signature))
    return session.run_named(inputs)


def table(rows: int = 60) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(rows, 5)).astype(np.float32)
    return x, (x[:, 0] + x[:, 1] * x[:, 2] > 0).astype(np.int64)


def test_what_scikit_learn_exports_is_served_with_its_probabilities() -> None:
    pytest.importorskip("sklearn", reason="extra `exports`: pip install mlpd[exports]")
    skl2onnx = pytest.importorskip("skl2onnx", reason="extra `exports`: pip install mlpd[exports]")
    from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier  # noqa: PLC0415
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415
    from sklearn.neural_network import MLPClassifier  # noqa: PLC0415
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415

    x, y = table()
    for estimator in (
        make_pipeline(StandardScaler(), LogisticRegression()),
        RandomForestClassifier(10, random_state=0),
        GradientBoostingClassifier(n_estimators=10, random_state=0),
        MLPClassifier((8,), solver="lbfgs", max_iter=500, random_state=0),
    ):
        estimator.fit(x, y)
        made = skl2onnx.to_onnx(estimator, x[:1], options={"zipmap": False}, target_opset=17)
        outputs = serve(made.SerializeToString(), {"X": x})
        assert np.allclose(outputs["probabilities"], estimator.predict_proba(x), atol=1e-5)
        assert np.array_equal(outputs["label"], estimator.predict(x))


def test_a_map_of_probabilities_is_refused_with_what_to_do() -> None:
    skl2onnx = pytest.importorskip("skl2onnx", reason="extra `exports`: pip install mlpd[exports]")
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415

    x, y = table()
    made = skl2onnx.to_onnx(LogisticRegression().fit(x, y), x[:1], target_opset=17)
    with pytest.raises(ValidationError) as caught:
        check_model(made.SerializeToString())
    assert caught.value.code == "unsupported_tensor"
    assert "zipmap=False" in caught.value.hint


def test_what_xgboost_exports_is_served_with_its_probabilities() -> None:
    xgboost = pytest.importorskip("xgboost", reason="extra `exports`: pip install mlpd[exports]")
    onnxmltools = pytest.importorskip("onnxmltools", reason="extra `exports`")
    from onnxmltools.convert.common.data_types import FloatTensorType  # noqa: PLC0415

    x, y = table()
    model = xgboost.XGBClassifier(n_estimators=12, max_depth=3, n_jobs=1).fit(x, y)
    types = [("X", FloatTensorType([None, 5]))]
    made = onnxmltools.convert_xgboost(model, initial_types=types, target_opset=15)
    outputs = serve(made.SerializeToString(), {"X": x})
    assert np.allclose(outputs["probabilities"], model.predict_proba(x), atol=1e-5)
