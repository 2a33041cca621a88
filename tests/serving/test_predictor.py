import asyncio
import dataclasses
import gc
import os
import random
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mlpd.core.errors import (
    ConflictError,
    DeadlineExceededError,
    NotFoundError,
    ValidationError,
)
from mlpd.serving.batcher import Batcher
from mlpd.serving.graphs import read_signature
from mlpd.serving.package import ModelPackage
from mlpd.serving.pool import SessionPool
from mlpd.serving.predictor import ServedModel
from mlpd.serving.routes import ModelRef, RouteSpec
from mlpd.serving.sessions import Session
from mlpd.serving.table import ModelTable

SWAPS = int(os.environ.get("MLPD_SWAPS", "20"))
"""Of a hot swap under load, 100 requests each; MLPD_SWAPS=100 is the whole measure."""
REQUESTS = 100 * SWAPS

MakePackage = Callable[..., ModelPackage]
Rows = Callable[..., NDArray[np.float64]]


class Registry:
    """Packages by name and version, and aliases, as the registry would give them."""

    def __init__(self) -> None:
        self.packages: dict[tuple[str, int], ModelPackage] = {}
        self.aliased: dict[str, dict[str, int]] = {}
        self.fetched: list[tuple[str, int]] = []

    def add(self, package: ModelPackage, *aliases: str) -> None:
        self.packages[package.name, package.version] = package
        for alias in aliases:
            self.point(package.name, alias, package.version)
        self.aliased.setdefault(package.name, {})

    def point(self, model: str, alias: str, version: int) -> None:
        self.aliased.setdefault(model, {})[alias] = version

    def aliases(self, model: str) -> Mapping[str, int]:
        if model not in self.aliased:
            raise NotFoundError(f"unknown model {model}", code="unknown_model")
        return self.aliased[model]

    async def fetch(self, model: str, version: int) -> ModelPackage:
        self.fetched.append((model, version))
        await asyncio.sleep(0)
        if (model, version) not in self.packages:
            raise NotFoundError(f"unknown version {version}", code="unknown_version")
        return self.packages[model, version]


@pytest.fixture
def registry(tree_package: MakePackage) -> Registry:
    registry = Registry()
    registry.add(tree_package(1, name="risk", version=1), "champion")
    registry.add(tree_package(2, name="risk", version=2))
    return registry


@pytest_asyncio.fixture
async def table(registry: Registry) -> AsyncIterator[ModelTable]:
    pool, batcher = SessionPool(), Batcher()
    await pool.start()
    yield ModelTable(pool, batcher, aliases=registry.aliases, fetch=registry.fetch)
    await batcher.close()
    await pool.close()


def route(name: str = "risk", *refs: str, shadows: tuple[str, ...] = ()) -> RouteSpec:
    arms = [{"name": f"arm{i}", "model": ref} for i, ref in enumerate(refs or ("risk@champion",))]
    return RouteSpec.from_dict(
        {"name": name, "service": "s", "arms": arms, "shadows": list(shadows)}
    )


def scores(session: Session, rows: NDArray[np.float64]) -> tuple[bytes, bytes]:
    raw = session.run(rows)
    return raw.tobytes(), session.score(raw).tobytes()


async def test_a_served_model_gives_raw_scores_scores_and_counts(
    table: ModelTable, some_rows: Rows
) -> None:
    await table.apply([route()])
    served = table.route("risk").arm("arm0")
    reply = await served.predict(some_rows(3))
    assert (reply.raw.tobytes(), reply.score.tobytes()) == scores(served.session, some_rows(3))
    with pytest.raises(DeadlineExceededError):
        await served.predict(some_rows(3), deadline_s=0.0)
    statistics = served.session.statistics.to_dict()
    assert statistics["inference_stats"]["success"]["count"] == 1
    assert statistics["inference_stats"]["fail"]["count"] == 1
    assert statistics["inference_count"] == 3
    assert statistics["last_inference"] > 1_600_000_000_000


async def test_requests_across_swaps_neither_fail_nor_mix(
    table: ModelTable, registry: Registry, tree_package: MakePackage, some_rows: Rows
) -> None:
    for version in range(1, SWAPS + 2):
        registry.add(tree_package(version, name="risk", version=version))
    judges = {key[1]: Session(package) for key, package in registry.packages.items()}
    await table.apply([route("a"), route("b", "risk@champion", "risk@1")])
    swapping, seen, done = True, set(), 0

    async def client(seed: int) -> None:
        nonlocal done
        rng = random.Random(seed)
        while swapping or done < REQUESTS:
            a, b = table.route("a").arm("arm0"), table.route("b").arm("arm0")
            assert a is b  # both routes change at once
            rows = some_rows(rng.choice((1, 1, 2, 5, 300)), seed=rng.randrange(1000))
            reply = await a.predict(rows)
            version = a.package.version
            assert (reply.raw.tobytes(), reply.score.tobytes()) == scores(judges[version], rows)
            seen.add(version)
            done += 1
            if rng.random() < 0.3:
                await asyncio.sleep(0)

    clients = [asyncio.create_task(client(seed)) for seed in range(16)]
    for version in range(2, SWAPS + 2):
        while done < (version - 2) * (REQUESTS // SWAPS):  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.005)
        registry.point("risk", "champion", version)
        await table.refresh()
    swapping = False
    await asyncio.gather(*clients)
    assert done >= REQUESTS
    assert len(seen) > SWAPS // 2
    assert list(table.models()["risk"]) == [1, SWAPS + 1]


async def test_a_version_swapped_out_is_freed_once_its_requests_end(
    table: ModelTable, registry: Registry, some_rows: Rows
) -> None:
    await table.apply([route()])
    held = table.route("risk").arm("arm0")
    gone = weakref.ref(held.session)
    registry.point("risk", "champion", 2)
    await table.refresh()
    assert table.route("risk").arm("arm0").package.version == 2
    assert len((await held.predict(some_rows(2))).raw) == 2
    gc.collect()
    assert gone() is not None
    del held
    await asyncio.sleep(0)
    gc.collect()
    assert gone() is None


async def test_a_change_that_fails_changes_nothing(
    table: ModelTable, registry: Registry, tree_package: MakePackage
) -> None:
    await table.apply([route()])
    before = table.route("risk")
    for bad in ("risk@9", "risk@canary", "other@champion"):
        with pytest.raises(NotFoundError):
            await table.apply([route("risk", "risk@2"), route("more", bad)])
        assert table.route("risk") is before
    registry.add(tree_package(5, name="risk", version=5, outputs=3))
    with pytest.raises(ValidationError, match="same outputs"):
        await table.apply([route("risk", "risk@1", "risk@5")])
    assert table.route("risk") is before
    assert list(table.models()["risk"]) == [1]


async def test_a_version_in_use_is_neither_fetched_nor_loaded_again(
    table: ModelTable, registry: Registry
) -> None:
    await table.apply([route()])
    first = table.route("risk").arm("arm0")
    await table.apply([route(), route("other", "risk@1", shadows=("risk@2",))])
    assert table.route("other").arm("arm0") is first
    assert table.route("other").shadows[0].package.version == 2
    assert registry.fetched == [("risk", 1), ("risk", 2)]


async def test_models_are_found_by_version_alias_and_champion(table: ModelTable) -> None:
    await table.apply([route("risk", "risk@champion", "risk@2")])
    assert [table.find("risk", t).package.version for t in (None, "1", 2, "champion")] == [
        1,
        1,
        2,
        1,
    ]
    for target in ("3", "canary"):
        with pytest.raises(NotFoundError, match="loaded: 1, 2") as caught:
            table.find("risk", target)
        assert caught.value.code == "unknown_version"
    with pytest.raises(NotFoundError, match="unknown model 'rsik'; served: risk"):
        table.find("rsik")
    with pytest.raises(NotFoundError, match="unknown route"):
        table.route("rsik")
    with pytest.raises(ValidationError, match="arm0, arm1"):
        table.route("risk").arm("arm2")


async def test_the_version_before_is_a_fallback_from_when_there_is_one(
    table: ModelTable, registry: Registry, tree_package: MakePackage
) -> None:
    spec = dataclasses.replace(
        route(), fallback_models=(ModelRef("risk", "champion~1"), ModelRef("risk", "2"))
    )

    def fallbacks() -> list[int]:
        return [model.package.version for model in table.route("risk").fallbacks]

    await table.apply([spec])
    assert fallbacks() == [2]
    registry.add(tree_package(3, name="risk", version=3), "champion")
    registry.point("risk", "champion~1", 1)
    await table.refresh()
    assert fallbacks() == [1, 2]
    with pytest.raises(ConflictError, match="route 'risk' uses risk@2"):
        await table.unload("risk", "2")
    registry.add(tree_package(4, name="risk", version=4, outputs=3))
    for unusable in (4, 9):  # of other outputs; not to be loaded
        registry.point("risk", "champion~1", unusable)
        await table.refresh()
        assert fallbacks() == [2]
        assert table.route("risk").arm("arm0").package.version == 3


async def test_explicit_loads_follow_their_alias_until_unloaded(
    table: ModelTable, registry: Registry
) -> None:
    served = await table.load(ModelRef("risk", "champion"))
    assert served.package.version == 1
    registry.point("risk", "champion", 2)
    await table.refresh()
    assert table.find("risk").package.version == 2
    await table.unload("risk")
    with pytest.raises(NotFoundError):
        table.find("risk")
    with pytest.raises(NotFoundError):
        await table.unload("risk")


async def test_what_a_route_uses_is_not_unloaded(table: ModelTable) -> None:
    await table.apply([route("risk", "risk@1", shadows=("risk@2",))])
    await table.load(ModelRef("risk", "champion"))
    for target in (None, "2"):
        with pytest.raises(ConflictError, match="route 'risk' uses"):
            await table.unload("risk", target)
    await table.unload("risk", "champion")
    assert list(table.models()["risk"]) == [1, 2]


async def test_concurrent_changes_take_turns(table: ModelTable) -> None:
    await asyncio.gather(table.apply([route()]), table.load(ModelRef("risk", "2")), table.refresh())
    assert list(table.models()["risk"]) == [1, 2]
    assert list(table.routes()) == ["risk"]


async def test_a_users_onnx_file_is_served_by_name(
    table: ModelTable, registry: Registry, graph_onnx: Callable[..., bytes], some_rows: Rows
) -> None:
    spec: dict[str, Any] = {"x": (TensorProto.DOUBLE, [None])}
    made = graph_onnx([helper.make_node("Neg", ["x"], ["y"])], spec, {"y": spec["x"]})
    registry.add(ModelPackage("user", 1, "sha256:u", made, read_signature(made)), "champion")
    served = await table.load(ModelRef("user", "champion"))
    for _ in range(3):  # the first run finds the cost out in a thread
        outputs = await served.infer({"x": np.array([1.0, 2.0])})
        assert outputs["y"].tolist() == [-1.0, -2.0]
    with pytest.raises(ValidationError, match="takes named tensors"):
        await served.predict(some_rows(1))
    with pytest.raises(ValidationError, match="not all trained"):
        await table.apply([route("user", "user@1")])


async def test_a_trained_model_takes_no_named_tensors(table: ModelTable, some_rows: Rows) -> None:
    served: ServedModel = await table.load(ModelRef("risk", "1"))
    with pytest.raises(ValidationError, match="takes a feature vector"):
        await served.infer({"features": some_rows(1)})
