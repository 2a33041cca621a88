"""Trainers as a child of a run finds them: in the repository's plugins/, without installing it."""

import contextlib
import sys
from importlib import import_module
from pathlib import Path

import pytest

from mlpd.core.config import PluginsConfig
from mlpd.daemon.plugins import Plugins

PLUGINS = Path(__file__).parents[2] / "plugins"
SCRIPT = Path(__file__).parent / "ridge_script.py"


def pytest_collection_finish() -> None:
    """Import scikit-learn before any test's clock runs: on a loaded machine it takes a minute."""
    with contextlib.suppress(ModuleNotFoundError):
        import_module("skl2onnx")


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    """The trainers of this repository, and a command that fits a ridge regression with numpy."""
    paths = tuple(str(PLUGINS / name) for name in ("mlpd_sklearn", "mlpd_command"))
    return Plugins.find(PluginsConfig(paths, (f"ridge = {sys.executable} {SCRIPT}",)))
