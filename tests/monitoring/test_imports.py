"""What importing the whole engine pulls in."""

import subprocess
import sys

SCRIPT = """
import importlib, pkgutil, sys
import mlpd.monitoring
for module in pkgutil.iter_modules(mlpd.monitoring.__path__, "mlpd.monitoring."):
    importlib.import_module(module.name)
heavy = {"scipy", "numba", "llvmlite", "polars", "lightgbm", "asyncio", "aiohttp", "lmdb"}
print(sorted(heavy & set(sys.modules)), len([m for m in sys.modules if "mlpd.monitoring." in m]))
"""


def test_the_engine_imports_nothing_heavy_and_no_io() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=30
    )
    found, _, modules = done.stdout.rpartition(" ")
    assert found == "[]"
    assert int(modules) >= 15
