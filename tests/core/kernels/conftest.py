import sys
from pathlib import Path

import pytest

from mlpd.core.kernels import Kernels, load_kernels

sys.path.append(str(Path(__file__).parent))  # for the kernel modules that lie here


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels") / "cache"


@pytest.fixture(scope="session")
def kernels(shared_cache: Path) -> Kernels:
    return load_kernels("sample_kernels", cache_dir=shared_cache, boundscheck=True)


@pytest.fixture(scope="session")
def fast_kernels(shared_cache: Path) -> Kernels:
    """The same as production runs them, without the bounds check."""
    return load_kernels("sample_kernels", cache_dir=shared_cache, boundscheck=False)
