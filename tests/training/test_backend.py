import subprocess
import sys
from pathlib import Path

import pytest

from mlpd.core.errors import DefinitionError
from mlpd.training.backend import canonical_params


def run_python(code: str, path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    return done.stdout.strip()


def test_lightgbm_comes_without_its_companions_and_they_stay_importable(tmp_path: Path) -> None:
    for name in ("sklearn", "pandas"):
        (tmp_path / f"{name}.py").write_text(f"print('{name} was imported')\n")
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from mlpd.training.backend import import_lightgbm\n"
        "print(import_lightgbm().__name__)\n"
        "import sklearn"
    )
    assert run_python(code, tmp_path).split("\n") == ["lightgbm", "sklearn was imported"]


def test_the_modules_of_training_import_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, pkgutil, importlib; sys.path.insert(0, '.')\n"
        "import mlpd.training, mlpd.core.vector\n"
        "for module in pkgutil.iter_modules(mlpd.training.__path__, 'mlpd.training.'):\n"
        "    importlib.import_module(module.name)\n"
        "heavy = {'lightgbm', 'onnx', 'polars', 'scipy', 'sklearn', 'numba', 'pandas'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert run_python(code, tmp_path) == "[]"


def test_every_name_of_a_parameter_becomes_the_main_one() -> None:
    found = canonical_params({"n_jobs": 2, "random_state": 3, "eta": 0.1, "num_leaves": 7})
    assert found == {"num_threads": 2, "seed": 3, "learning_rate": 0.1, "num_leaves": 7}


def test_a_parameter_that_lightgbm_would_ignore_is_an_error() -> None:
    with pytest.raises(DefinitionError, match="num_leafs") as refusal:
        canonical_params({"num_leafs": 7})
    assert refusal.value.code == "unknown_parameter"
