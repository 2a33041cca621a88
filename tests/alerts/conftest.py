"""What tests of alerts share: a receiver, kernels that are compiled beforehand."""

from collections.abc import AsyncIterator

import pytest

from mlpd.core.kernels import precompile
from mlpd.daemon.app import KERNEL_MODULES
from tests.alerts.receiver import Receiver, receiving


def pytest_collection_finish() -> None:
    """Compile kernels before any test's clock runs: on a new machine it takes up to a minute."""
    precompile(KERNEL_MODULES)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A receiver that takes everything."""
    async with receiving() as running:
        yield running
