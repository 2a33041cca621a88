"""Kernels are compiled before the first test: no test's timeout pays for a compiler."""

import pytest

from mlpd.core.kernels import precompile
from mlpd.daemon.app import KERNEL_MODULES


def pytest_sessionstart(session: pytest.Session) -> None:
    """Fill the kernel cache, which takes a minute once; with xdist only the controller does it."""
    if hasattr(session.config, "workerinput"):
        return
    precompile(KERNEL_MODULES)
    # Tests of the features' kernels look at every index.
    checked = [[name for name in group if ".features." in name] for group in KERNEL_MODULES]
    precompile(checked, boundscheck=True)
