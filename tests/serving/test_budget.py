"""Models in memory: what is let go of, what comes back, and what stays."""

import asyncio
import dataclasses
import gc
import os
import random
from collections.abc import AsyncIterator, Callable, Collection, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlpd.core.allocator import heap_bytes
from mlpd.core.errors import ConflictError, NotFoundError, UnavailableError, ValidationError
from mlpd.serving import pool as pool_module
from mlpd.serving import table as table_module
from mlpd.serving.batcher import Batcher
from mlpd.serving.budget import Key, MemoryBudget
from mlpd.serving.package import ModelPackage
from mlpd.serving.pool import SessionPool, load_session
from mlpd.serving.routes import ModelRef, RouteSpec
from mlpd.serving.sessions import Session
from mlpd.serving.table import ModelTable

MakePackage = Callable[..., ModelPackage]
Rows = Callable[..., NDArray[np.float64]]
MODELS = int(os.environ.get("MLPD_MODELS", "300"))
ROOM = MODELS // 20
keys = st.tuples(st.sampled_from("abc"), st.integers(1, 4))


@given(
    st.dictionaries(keys, st.integers(0, 100)),
    st.lists(keys, max_size=20),
    st.sets(keys),
    st.integers(0, 400),
)
def test_the_longest_unused_go_until_the_rest_fits(
    sizes: Mapping[Key, int], used: list[Key], keep: Collection[Key], bytes_max: int
) -> None:
    budget = MemoryBudget(bytes_max)
    for key in used:
        budget.touch(key)
    chosen = budget.choose(sizes, keep)
    assert not set(chosen) & set(keep)
    left = {key: size for key, size in sizes.items() if key not in chosen}
    assert sum(left.values()) <= bytes_max or set(left) <= set(keep)
    if chosen:  # none of them in vain
        assert sum(left.values()) + sizes[chosen[-1]] > bytes_max
    ages = {key: i for i, key in enumerate(used)}  # the last use of each
    order = [ages.get(key, -1) for key in chosen]
    assert order == sorted(order)
    if order:
        assert all(ages.get(key, -1) >= order[-1] for key in left if key not in keep)


class Registry:
    """Any number of models, each version 1, all made from one package."""

    def __init__(self, made: ModelPackage) -> None:
        self.made = made
        self.fetched: list[str] = []
        self.broken: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()

    def package(self, model: str) -> ModelPackage:
        digest = f"sha256:{int(model[1:]):064x}"
        return dataclasses.replace(self.made, name=model, version=1, digest=digest)

    def aliases(self, _: str) -> Mapping[str, int]:
        return {"champion": 1}

    async def fetch(self, model: str, _: int) -> ModelPackage:
        self.fetched.append(model)
        await self.gate.wait()
        if model in self.broken:
            raise ValidationError(f"{model} is damaged", code="damaged")
        return self.package(model)


@pytest.fixture
async def registry(tree_package: MakePackage) -> Registry:
    return Registry(tree_package(trees=3))


@pytest.fixture
def equal_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are guessed from the file's, as where nothing can be measured."""
    monkeypatch.setattr(pool_module, "heap_bytes", lambda: None)


MakeTable = Callable[[float], ModelTable]


@pytest.fixture
async def make_table(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[MakeTable]:
    """Make a table with room for so many models, as one of them measures."""
    monkeypatch.setattr(table_module, "LOAD_WAIT_S", 30.0)
    pool, batcher = SessionPool(), Batcher()
    await pool.start()
    for model in ("m998", "m999"):  # the first one allocates for all
        size = (await pool.load(registry.package(model))).memory_bytes
    tables: list[ModelTable] = []

    def make(models: float) -> ModelTable:
        tables.append(
            ModelTable(
                pool,
                batcher,
                aliases=registry.aliases,
                fetch=registry.fetch,
                bytes_max=int(models * size),
            )
        )
        return tables[-1]

    yield make
    for table in tables:
        await table.close()
    await batcher.close()
    await pool.close()


def loaded(table: ModelTable) -> set[str]:
    return set(table.models())


def route(*models: str) -> RouteSpec:
    arms = [{"name": model, "model": f"{model}@champion"} for model in models]
    return RouteSpec.from_dict({"name": "r", "service": "s", "arms": arms})


async def check(table: ModelTable, registry: Registry, model: str, rows: Rows) -> None:
    """Ask a model and compare with a session of its own, to the bit."""
    served = await table.get(model)
    reply = await served.predict(rows(3))
    assert reply.raw.tobytes() == Session(registry.package(model)).run(rows(3)).tobytes()


@pytest.mark.skipif(heap_bytes() is None, reason="the C library measures nothing")
def test_memory_is_measured(tree_package: MakePackage) -> None:
    load_session(tree_package(trees=20))  # the first one allocates for all
    small, large = (load_session(tree_package(trees=trees)) for trees in (20, 400))
    assert small.memory_bytes > 2 * len(small.package.onnx)
    assert large.memory_bytes > 4 * len(large.package.onnx)
    assert large.memory_bytes > 3 * small.memory_bytes


async def test_many_models_are_served_from_memory_for_few(
    make_table: MakeTable, registry: Registry, some_rows: Rows
) -> None:
    table, rng = make_table(ROOM), random.Random(3)
    for number in range(MODELS):
        await table.load(ModelRef(f"m{number}", "champion"))
        assert table.memory_bytes <= table._budget.bytes_max
    assert (
        0.4 * ROOM <= len(loaded(table)) <= 1.2 * ROOM
    )  # measured beside what other threads allocate
    gc.collect()
    assert len(table._pool._sessions) == len(loaded(table))
    for _ in range(2 * ROOM):
        await check(table, registry, f"m{rng.randrange(MODELS)}", some_rows)
        assert table.memory_bytes <= table._budget.bytes_max
    assert table.evictions >= MODELS - 1.2 * ROOM
    for number in range(MODELS):
        table.check(f"m{number}")
        assert table.versions(f"m{number}") == [1]


@pytest.mark.usefixtures("equal_sizes")
async def test_the_least_recently_used_goes_and_comes_back_when_asked(
    make_table: MakeTable, registry: Registry, some_rows: Rows
) -> None:
    table = make_table(3.5)
    for model in ("m1", "m2", "m3"):
        await table.load(ModelRef(model, "champion"))
    await check(table, registry, "m1", some_rows)
    await table.load(ModelRef("m4", "1"))
    assert loaded(table) == {"m1", "m3", "m4"}
    with pytest.raises(UnavailableError) as caught:
        table.find("m2")
    assert caught.value.code == "model_evicted"
    await check(table, registry, "m2", some_rows)
    assert loaded(table) == {"m1", "m2", "m4"}
    await table.refresh()  # what was evicted stays so
    assert loaded(table) == {"m1", "m2", "m4"}
    await table.unload("m3")
    with pytest.raises(NotFoundError):
        await table.get("m3")


@pytest.mark.usefixtures("equal_sizes")
async def test_many_who_ask_for_an_evicted_version_load_it_once(
    make_table: MakeTable, registry: Registry
) -> None:
    table = make_table(1.5)
    for model in ("m1", "m2"):
        await table.load(ModelRef(model, "champion"))
    registry.fetched.clear()
    found = await asyncio.gather(*(table.get("m1") for _ in range(20)))
    assert len(set(map(id, found))) == 1
    assert registry.fetched == ["m1"]


@pytest.mark.usefixtures("equal_sizes")
async def test_who_waits_too_long_for_a_load_is_told_to_come_again(
    make_table: MakeTable, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_module, "LOAD_WAIT_S", 0.01)
    table = make_table(1.5)
    for model in ("m1", "m2"):
        await table.load(ModelRef(model, "champion"))
    registry.gate.clear()
    with pytest.raises(UnavailableError) as caught:
        await table.get("m1")
    assert caught.value.code == "model_loading"
    assert caught.value.details["retry_after_s"] > 0
    registry.gate.set()
    monkeypatch.setattr(table_module, "LOAD_WAIT_S", 30.0)
    assert (await table.get("m1")).package.name == "m1"


@pytest.mark.usefixtures("equal_sizes")
async def test_a_version_that_cant_be_loaded_again_says_why_each_time(
    make_table: MakeTable, registry: Registry, some_rows: Rows
) -> None:
    table = make_table(1.5)
    for model in ("m1", "m2"):
        await table.load(ModelRef(model, "champion"))
    registry.broken.add("m1")
    for _ in range(2):
        with pytest.raises(ValidationError, match="m1 is damaged"):
            await table.get("m1")
    registry.broken.clear()
    await check(table, registry, "m1", some_rows)


@pytest.mark.usefixtures("equal_sizes")
async def test_what_routes_refer_to_stays_and_an_explicit_load_must_fit_beside_it(
    make_table: MakeTable, registry: Registry, some_rows: Rows
) -> None:
    table = make_table(2.5)
    await table.load(ModelRef("m9", "champion"))
    await table.apply([route("m1", "m2", "m3")])  # more than the budget, but asked for
    assert loaded(table) == {"m1", "m2", "m3"}
    with pytest.raises(ConflictError, match="MB are allowed") as caught:
        await table.load(ModelRef("m4", "champion"))
    assert caught.value.code == "model_memory_full"
    assert loaded(table) == {"m1", "m2", "m3"}
    with pytest.raises(NotFoundError):
        table.find("m4")
    await table.load(ModelRef("m2", "champion"))  # is there anyhow
    await table.apply([route("m1")])
    await check(table, registry, "m9", some_rows)


@pytest.mark.usefixtures("equal_sizes")
async def test_an_evicted_version_serves_its_last_requests(
    make_table: MakeTable, registry: Registry, some_rows: Rows
) -> None:
    table = make_table(1.5)
    held = await table.load(ModelRef("m1", "champion"))
    await table.load(ModelRef("m2", "champion"))
    assert loaded(table) == {"m2"}
    assert len((await held.predict(some_rows(2))).raw) == 2
    await check(table, registry, "m1", some_rows)
