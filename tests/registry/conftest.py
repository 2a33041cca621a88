"""A real LMDB environment with its writer, and one valid lineage document."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlpd.core.time import system_clock
from mlpd.registry.catalog import Change
from mlpd.registry.models import Registry
from mlpd.registry.records import Cause
from mlpd.storage.environment import Environment
from mlpd.storage.writer import Writer


@pytest.fixture
def env(tmp_path: Path) -> Iterator[Environment]:
    with Environment.open(tmp_path / "lmdb", clock=system_clock, map_bytes=64 << 20) as env:
        yield env


@pytest.fixture
def writer(env: Environment) -> Iterator[Writer]:
    writer = Writer(env)
    yield writer
    writer.close()


@pytest.fixture
def change(writer: Writer) -> Callable[..., Any]:
    """Run one verb of a `Change` durably: change("clf", "register", DIGEST, 10, READY)."""

    def run(model: str, verb: str, *args: Any, cause: Cause | None = None) -> Any:
        who = cause or Cause("tester", "because")
        return writer.write_blocking(lambda txn: getattr(Change(txn, model, who), verb)(*args))

    return run


@pytest.fixture
def lineage() -> dict[str, Any]:
    return {
        "service": "flight_risk",
        "service_hash": "ab" * 16,
        "definitions_hash": "cd" * 16,
        "spine": {"source": "arrivals", "time": "event_time", "filter": None},
        "label": "arr_delay > 15",
        "mode": "as_known",
        "as_of_us": 1_380_585_600_000_000,
        "as_of_sequence": 812_345,
        "rows": 3,
        "row_set_digest": "sha256:" + "0" * 64,
        "columns": ["carrier", "distance"],
        "dtypes": {"carrier": "string", "distance": "float64"},
        "categorical": ["carrier"],
        "split": {"train": 2, "valid": 1, "test": 0},
        "trainer": "lightgbm",
        "seed": 7,
        "params": {"num_threads": 2, "learning_rate": 0.1},
        "best_iteration": 41,
        "tree_digest": "sha256:" + "1" * 64,
        "metrics": {"auc": 0.7431},
        "packages": {"lightgbm": "4.7.0"},
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@pytest.fixture
def registry(env: Environment, writer: Writer, root: Path) -> Registry:
    return Registry.open(env, writer, root)


@pytest.fixture
def files() -> dict[str, bytes | Path]:
    """Files of a version; the registry does not look into them."""
    return {
        "model.onnx": bytes(range(256)) * 40,
        "model.txt": b"tree\nversion=v4\n",
        "signature.json": b'{"inputs":[]}',
        "profile.msgpack": b"\x80",
        "golden.msgpack": b"\x90",
        "parity.json": b'{"bit_equal":10000}',
    }
