"""Real daemons for the edge's tests: one with a model for all of them, and empty ones."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlpd.client import Client
from mlpd.core.kernels import precompile
from mlpd.daemon.app import KERNEL_MODULES
from tests.http import edge as edges


def pytest_collection_finish() -> None:
    """Compile kernels before any test's clock runs: on a new machine it takes up to a minute."""
    precompile(KERNEL_MODULES)


@pytest.fixture(scope="session")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[edges.Edge]:
    """A daemon with definitions, events, a trained model, a route; tests leave it as it is."""
    directory = tmp_path_factory.mktemp("edge")
    with edges.serve(directory, body_bytes_max=edges.BODY_BYTES_MAX) as running:
        edges.fill(running)
        yield running


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[edges.Edge]:
    """An empty daemon for tests that change things; its definitions are applied."""
    with edges.serve(tmp_path / "data") as running:
        with Client(running.url) as client:
            client.apply(edges.DOCUMENT)
        yield running


@pytest.fixture
def client(edge: edges.Edge) -> Iterator[Client]:
    with Client(edge.url) as found:
        yield found
