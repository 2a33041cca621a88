import asyncio
import dataclasses
import gc
import weakref
from collections.abc import AsyncIterator, Callable

import onnx
import pytest
import pytest_asyncio
from onnx import TensorProto, helper

from mlpd.core.errors import UnavailableError, ValidationError
from mlpd.serving import pool as pool_module
from mlpd.serving.package import ModelPackage
from mlpd.serving.pool import TINY_MODEL, SessionPool

MakePackage = Callable[..., ModelPackage]


@pytest_asyncio.fixture
async def pool() -> AsyncIterator[SessionPool]:
    pool = SessionPool()
    await pool.start()
    yield pool
    await pool.close()


def test_the_tiny_model_is_a_valid_identity() -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, [None])],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, [None])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    assert model.SerializeToString(deterministic=True) == TINY_MODEL
    onnx.checker.check_model(TINY_MODEL)


async def test_many_at_once_load_a_version_once(
    pool: SessionPool, tree_package: MakePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[ModelPackage] = []
    load = pool_module.load_session
    monkeypatch.setattr(
        pool_module, "load_session", lambda package: loads.append(package) or load(package)
    )
    package = tree_package()
    sessions = await asyncio.gather(*(pool.load(package) for _ in range(10)))
    assert len(set(map(id, sessions))) == len(loads) == 1
    assert await pool.load(package) is sessions[0] is pool.get(package)


async def test_another_digest_is_another_session(
    pool: SessionPool, tree_package: MakePackage
) -> None:
    first, second = await asyncio.gather(pool.load(tree_package(1)), pool.load(tree_package(2)))
    assert first is not second


async def test_loading_gives_a_first_estimate_of_the_cost(
    pool: SessionPool, tree_package: MakePackage
) -> None:
    assert (await pool.load(tree_package())).cost.us_per_row > 0


async def test_a_damaged_version_is_refused_and_may_be_tried_again(
    pool: SessionPool, tree_package: MakePackage
) -> None:
    package = tree_package()
    broken = dataclasses.replace(package, golden=tree_package(7).golden)
    for _ in range(2):
        with pytest.raises(ValidationError) as caught:
            await pool.load(broken)
        assert caught.value.code == "golden_mismatch"
    assert pool.get(broken) is None
    assert (await pool.load(package)).package is package


async def test_a_cancelled_caller_leaves_the_load_to_the_others(
    pool: SessionPool, tree_package: MakePackage
) -> None:
    package = tree_package()
    first, second = (asyncio.create_task(pool.load(package)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).package is package
    assert first.cancelled()


async def test_the_last_reference_frees_the_session_and_trims(
    pool: SessionPool, tree_package: MakePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, trimmed = asyncio.get_running_loop(), asyncio.Event()
    monkeypatch.setattr(pool_module, "trim_memory", lambda: loop.call_soon_threadsafe(trimmed.set))
    package = tree_package()
    session = await pool.load(package)
    gone = weakref.ref(session)
    gc.disable()
    try:
        del session
        await asyncio.sleep(0)
        assert gone() is None
    finally:
        gc.enable()
    assert pool.get(package) is None
    await asyncio.wait_for(trimmed.wait(), 40)


async def test_a_closed_pool_refuses(tree_package: MakePackage) -> None:
    pool = SessionPool()
    loading = asyncio.create_task(pool.load(tree_package(1)))
    await asyncio.sleep(0)
    await pool.close()
    session = await loading
    with pytest.raises(UnavailableError):
        await pool.load(tree_package(2))
    del session
