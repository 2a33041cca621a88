import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mlpd.core.errors import (
    DeadlineExceededError,
    InternalError,
    MlpdError,
    OverloadedError,
    TooLargeError,
    UnavailableError,
    ValidationError,
)
from mlpd.serving.batcher import Batcher
from mlpd.serving.datatypes import DATATYPES
from mlpd.serving.graphs import read_signature
from mlpd.serving.jobs import BATCH_ROWS, PRIORITIES
from mlpd.serving.package import ModelPackage
from mlpd.serving.sessions import Scores, Session
from mlpd.serving.statistics import BATCH_SIZES_MAX, Execution, ModelStatistics, RunCost

MakePackage = Callable[..., ModelPackage]
Floats = NDArray[np.float64]
Rows = Callable[..., Floats]
POISON = 1e300
CHEAP_US, DEAR_US = 1.0, 1e6


@pytest_asyncio.fixture
async def batcher() -> AsyncIterator[Batcher]:
    batcher = Batcher()
    yield batcher
    await batcher.close()


class FixedCost(RunCost):
    def add(self, rows: int, us: float) -> None:
        pass

    def estimate_us(self, rows: int) -> float:
        return rows * self.us_per_row


class WatchedSession(Session):
    """A real session that notes the thread and rows of each run, and fails on POISON."""

    def __init__(self, package: ModelPackage, us_per_row: float = CHEAP_US) -> None:
        super().__init__(package)
        self.runs: list[tuple[str, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fix_cost(us_per_row)

    def fix_cost(self, us_per_row: float) -> None:
        self.cost = FixedCost(us_per_row)

    def run(self, features: Floats) -> Floats:
        self.gate.wait(40)
        self.runs.append((threading.current_thread().name, len(features)))
        if (features == POISON).any():
            raise InternalError("a poisoned row")
        return super().run(features)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Runs in threads wait inside this block."""
        self.gate.clear()
        try:
            yield
        finally:
            self.gate.set()

    @property
    def sizes(self) -> list[int]:
        return [rows for _, rows in self.runs]


@pytest.fixture
def watched(tree_package: MakePackage) -> WatchedSession:
    return WatchedSession(tree_package())


def same(got: Scores, expected: Scores) -> bool:
    return got.raw.tobytes() == expected.raw.tobytes() and (
        got.score.tobytes() == expected.score.tobytes()
    )


def alone(session: Session, rows: Floats) -> Scores:
    raw = np.concatenate([Session.run(session, rows[i : i + 1]) for i in range(len(rows))])
    return Scores(raw, np.concatenate([session.score(raw[i : i + 1]) for i in range(len(rows))]))


async def test_a_lone_cheap_request_runs_at_once_on_the_loop(
    batcher: Batcher, watched: WatchedSession, some_rows: Rows
) -> None:
    rows = some_rows(3)
    with pytest.raises(StopIteration) as finished:
        batcher.predict(watched, rows).send(None)  # completes without giving the loop a turn
    assert same(finished.value.value, alone(watched, rows))
    assert watched.runs == [(threading.current_thread().name, 3)]


async def test_what_arrives_in_one_turn_of_the_loop_runs_as_one_batch(
    batcher: Batcher, watched: WatchedSession, some_rows: Rows
) -> None:
    requests = [some_rows(2, seed=i) for i in range(16)]
    for _ in range(2):
        replies = await asyncio.gather(*(batcher.predict(watched, rows) for rows in requests))
        assert all(map(same, replies, (alone(watched, rows) for rows in requests)))
    # The first one couldn't know that it had company; the second crowd is expected.
    assert watched.sizes == [2, 30, 32]


async def test_after_a_crowd_a_lone_request_runs_inline_again(
    batcher: Batcher, watched: WatchedSession, some_rows: Rows
) -> None:
    await asyncio.gather(*(batcher.predict(watched, some_rows(1)) for _ in range(4)))
    await batcher.predict(watched, some_rows(1))
    await asyncio.sleep(0)
    with pytest.raises(StopIteration):
        batcher.predict(watched, some_rows(1)).send(None)


async def test_a_tick_is_cut_by_rows_and_by_time(
    batcher: Batcher, watched: WatchedSession, some_rows: Rows
) -> None:
    watched.fix_cost(0.001)
    await asyncio.gather(*(batcher.predict(watched, some_rows(100)) for _ in range(7)))
    assert watched.sizes == [100, 200, 200, 200]
    watched.runs.clear()
    watched.fix_cost(300.0)
    await asyncio.gather(*(batcher.predict(watched, some_rows(1)) for _ in range(7)))
    assert (max(watched.sizes), sum(watched.sizes)) == (3, 7)


@pytest.mark.parametrize(("us_per_row", "count"), [(CHEAP_US, 1000), (DEAR_US, 5)])
async def test_large_and_dear_requests_run_in_a_thread_in_chunks(
    batcher: Batcher, watched: WatchedSession, some_rows: Rows, us_per_row: float, count: int
) -> None:
    watched.fix_cost(us_per_row)
    rows = some_rows(count)
    assert same(await batcher.predict(watched, rows), alone(watched, rows))
    assert {name for name, _ in watched.runs} == {"mlpd-predict_0"}
    assert max(watched.sizes) <= BATCH_ROWS
    assert sum(watched.sizes) == count


async def test_an_unknown_cost_is_found_out_in_a_thread(
    batcher: Batcher, tree_package: MakePackage, some_rows: Rows
) -> None:
    session = Session(tree_package())
    assert session.cost.estimate_us(1) == math.inf
    await batcher.predict(session, some_rows(1))
    assert session.cost.estimate_us(1) < math.inf


async def test_cheap_requests_pass_a_large_one(
    batcher: Batcher, watched: WatchedSession, tree_package: MakePackage, some_rows: Rows
) -> None:
    quick = WatchedSession(tree_package(1))
    with watched.held():
        large = asyncio.create_task(batcher.predict(watched, some_rows(2000)))
        await asyncio.sleep(0)
        await batcher.predict(quick, some_rows(1))
        assert not large.done()
    await large


@pytest.mark.parametrize("us_per_row", [1000.0, DEAR_US])
async def test_what_waits_is_taken_by_priority_and_then_in_order(
    batcher: Batcher, watched: WatchedSession, some_rows: Rows, us_per_row: float
) -> None:
    watched.fix_cost(us_per_row)  # one request at a time, on the loop or in a thread
    done: list[int] = []

    async def ask(name: int, priority: int) -> None:
        rows = some_rows(1, seed=name)
        assert same(await batcher.predict(watched, rows, priority=priority), alone(watched, rows))
        done.append(name)

    with watched.held() if us_per_row == DEAR_US else contextlib.nullcontext():
        waiting = [
            asyncio.create_task(ask(name, priority))
            for name, priority in enumerate((2, 3, 2, 1, 3, 2, 1))
        ]
        await asyncio.sleep(0)
    await asyncio.gather(*waiting)
    assert done == [0, 3, 6, 2, 5, 1, 4]  # the first one found nobody waiting


async def test_an_expired_deadline_runs_nothing(
    batcher: Batcher, watched: WatchedSession, some_rows: Rows
) -> None:
    with pytest.raises(DeadlineExceededError):
        await batcher.predict(watched, some_rows(1), deadline_s=time.monotonic() - 0.001)
    assert not watched.runs
    assert batcher.pending_rows == 0


async def test_work_that_expires_while_it_waits_is_dropped_unexecuted(
    batcher: Batcher, watched: WatchedSession, some_rows: Rows
) -> None:
    watched.fix_cost(DEAR_US)
    with watched.held():
        first = asyncio.create_task(batcher.predict(watched, some_rows(1)))
        await asyncio.sleep(0)
        soon = time.monotonic() + 0.02
        hopeless = asyncio.create_task(batcher.predict(watched, some_rows(5), deadline_s=soon))
        patient = asyncio.create_task(batcher.predict(watched, some_rows(2)))
        await asyncio.sleep(0.03)
    await asyncio.gather(first, patient)
    with pytest.raises(DeadlineExceededError):
        await hopeless
    assert watched.sizes == [1, 2]


async def test_cancelled_work_is_dropped_unexecuted(
    batcher: Batcher, watched: WatchedSession, some_rows: Rows
) -> None:
    with watched.held():
        large = asyncio.create_task(batcher.predict(watched, some_rows(5000)))
        await asyncio.sleep(0)
        assert batcher.pending_rows == 5000
        large.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await large
    rows = some_rows(700, seed=1)
    assert same(await batcher.predict(watched, rows), alone(watched, rows))
    assert sum(watched.sizes) == BATCH_ROWS + 700
    assert batcher.pending_rows == 0


async def test_a_full_queue_refuses_and_recovers(watched: WatchedSession, some_rows: Rows) -> None:
    batcher = Batcher(pending_rows_max=1000)
    with pytest.raises(TooLargeError):
        await batcher.predict(watched, some_rows(1001))
    with watched.held():
        waiting = asyncio.create_task(batcher.predict(watched, some_rows(999)))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError) as caught:
            await batcher.predict(watched, some_rows(2))
        assert caught.value.details["retry_after_s"] > 0
    await waiting
    await batcher.predict(watched, some_rows(2))
    await batcher.close()


@pytest.mark.parametrize("us_per_row", [CHEAP_US, DEAR_US])
async def test_a_failing_request_fails_alone(
    batcher: Batcher, watched: WatchedSession, some_rows: Rows, us_per_row: float
) -> None:
    watched.fix_cost(us_per_row)
    requests = [some_rows(2, seed=i) for i in range(6)]
    requests[3][1, 0] = POISON
    replies = await asyncio.gather(
        *(batcher.predict(watched, rows) for rows in requests), return_exceptions=True
    )
    failed = replies.pop(3)
    assert isinstance(failed, InternalError)
    assert failed.message == "a poisoned row"
    del requests[3]
    assert all(map(same, replies, (alone(watched, rows) for rows in requests)))


async def test_a_large_request_fails_whole_and_leaves_nothing_behind(
    batcher: Batcher, watched: WatchedSession, some_rows: Rows
) -> None:
    rows = some_rows(3000)
    rows[10, 0] = POISON
    with pytest.raises(InternalError):
        await batcher.predict(watched, rows)
    await batcher.predict(watched, some_rows(300))
    assert batcher.pending_rows == 0
    assert sum(watched.sizes) < 3000


@pytest.mark.parametrize(
    "features",
    [np.zeros((1, 5)), np.zeros(4), np.zeros((1, 4), np.float32), np.zeros((1, 4), np.int64)],
)
async def test_features_of_another_shape_or_type_are_refused(
    batcher: Batcher, session: Session, features: Any
) -> None:
    with pytest.raises(ValidationError, match=r"takes float64 \[n, 4\]"):
        await batcher.predict(session, features)


@pytest.mark.parametrize("us_per_row", [CHEAP_US, DEAR_US])
async def test_requests_on_named_tensors_are_never_merged(
    batcher: Batcher, graph_onnx: Callable[..., bytes], us_per_row: float
) -> None:
    column: dict[str, Any] = {"x": (TensorProto.DOUBLE, [None])}
    total = helper.make_node("ReduceSum", ["x"], ["y"], keepdims=1)
    made = graph_onnx([total], column, {"y": column["x"]})  # mixes the rows of a batch
    session = WatchedSession(
        ModelPackage("user", 1, "sha256:u", made, read_signature(made)), us_per_row
    )
    replies = await asyncio.gather(
        *(batcher.predict_named(session, {"x": np.array([i, i])}, 2) for i in (1.0, 2.0, 3.0))
    )
    assert [reply["y"].tolist() for reply in replies] == [[2.0], [4.0], [6.0]]
    assert session.statistics.execution_count == 3


async def test_no_rows_give_no_scores(batcher: Batcher, session: Session) -> None:
    scores = await batcher.predict(session, np.empty((0, 4)))
    assert scores.raw.shape == scores.score.shape == (0, 1)


async def test_closing_fails_what_waits_and_finishes_what_runs(
    watched: WatchedSession, some_rows: Rows
) -> None:
    batcher = Batcher()
    watched.fix_cost(DEAR_US)
    with watched.held():
        running, waiting = (
            asyncio.create_task(batcher.predict(watched, some_rows(200))) for _ in range(2)
        )
        await asyncio.sleep(0)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
    await closing
    assert len((await running).raw) == 200
    with pytest.raises(UnavailableError):
        await waiting
    with pytest.raises(UnavailableError):
        await batcher.predict(watched, some_rows(1))
    assert batcher.pending_rows == 0


async def test_statistics_count_rows_requests_and_batches(
    batcher: Batcher, watched: WatchedSession, some_rows: Rows
) -> None:
    await asyncio.gather(*(batcher.predict(watched, some_rows(2)) for _ in range(5)))
    stats = watched.statistics.to_dict()
    assert (stats["inference_count"], stats["execution_count"]) == (10, 2)
    assert stats["inference_stats"]["queue"]["count"] == 5
    assert stats["inference_stats"]["compute_infer"]["count"] == 5
    assert stats["inference_stats"]["compute_infer"]["ns"] > 0
    counts = {b["batch_size"]: b["compute_infer"]["count"] for b in stats["batch_stats"]}
    assert counts == {2: 1, 8: 1}


def test_the_number_of_batch_sizes_is_bounded_and_nothing_is_lost() -> None:
    stats = ModelStatistics()
    for rows in [*range(1, BATCH_SIZES_MAX + 50), 1]:
        stats.record_execution(Execution(rows, 0, 10, 0), requests=1, queue_ns=0)
    assert len(stats.batches) == BATCH_SIZES_MAX + 1
    assert stats.batches[0].executions == 49
    assert stats.execution_count == BATCH_SIZES_MAX + 50
    assert stats.to_dict()["inference_stats"]["compute_infer"]["ns"] == 10 * stats.execution_count


@given(st.integers(1, 300), st.floats(1, 100))
def test_one_preempted_run_moves_the_cost_by_little(rows: int, us_per_row: float) -> None:
    cost = RunCost()
    for _ in range(30):
        cost.add(rows, rows * us_per_row)
    assert cost.us_per_row == pytest.approx(us_per_row)
    cost.add(rows, 1e9)
    assert cost.us_per_row < us_per_row * 1.4
    for _ in range(30):
        cost.add(rows, rows * us_per_row)
    assert cost.us_per_row == pytest.approx(us_per_row, rel=0.05)


request_strategy = st.fixed_dictionaries(
    {
        "rows": st.integers(0, 8) | st.integers(200, 700),
        "model": st.integers(0, 1) | st.sampled_from(["FP32", "INT64", "BYTES", "BOOL"]),
        "poison": st.booleans() | st.just(value=False),
        "cancel_after": st.none() | st.integers(0, 3),
        "deadline": st.sampled_from([None, None, -1.0, 60.0]),
        "wait": st.integers(0, 3),
        "priority": st.sampled_from(PRIORITIES),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(request_strategy, min_size=1, max_size=24),
    costs=st.tuples(*[st.sampled_from([0.1, 20.0, DEAR_US])] * 2),
    threads=st.integers(1, 2),
)
def test_every_reply_is_its_own_and_equals_the_lone_run(
    requests: list[dict[str, Any]], costs: tuple[float, float], threads: int
) -> None:
    asyncio.run(play(requests, costs, threads))


async def play(requests: list[dict[str, Any]], costs: tuple[float, float], threads: int) -> None:
    sessions = [WatchedSession(PACKAGES[i], costs[i]) for i in range(2)]
    batcher = Batcher(threads=threads)
    tasks = []
    for seed, request in enumerate(requests):
        tasks.append(asyncio.create_task(one(batcher, sessions, request, seed)))
        for _ in range(request["wait"]):
            await asyncio.sleep(0)
    for task, request in zip(tasks, requests, strict=True):
        if request["cancel_after"] is not None:
            for _ in range(request["cancel_after"]):
                await asyncio.sleep(0)
            task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await batcher.close()
    assert batcher.pending_rows == 0
    for task, request in zip(tasks, requests, strict=True):
        if task.cancelled():
            assert request["cancel_after"] is not None
        else:
            assert task.result() == (
                "late"
                if request["deadline"] == -1.0
                else "poisoned"
                if request["poison"] and request["rows"] and isinstance(request["model"], int)
                else "equal"
            )


async def one(
    batcher: Batcher, sessions: list[WatchedSession], request: dict[str, Any], seed: int
) -> str:
    if isinstance(request["model"], str):
        return await one_named(batcher, request, seed)
    session = sessions[request["model"]]
    rows = np.random.default_rng(seed).normal(size=(request["rows"], 4))
    if request["poison"] and len(rows):
        rows[-1, 2] = POISON
    deadline_s = request["deadline"] and time.monotonic() + request["deadline"]
    try:
        reply = await batcher.predict(
            session, rows, deadline_s=deadline_s, priority=request["priority"]
        )
    except DeadlineExceededError:
        return "late"
    except MlpdError as error:
        return "poisoned" if error.message == "a poisoned row" else error.message
    expected = Session.run(session, rows) if len(rows) else np.empty((0, 1))
    return "equal" if same(reply, Scores(expected, session.score(expected))) else "different"


async def one_named(batcher: Batcher, request: dict[str, Any], seed: int) -> str:
    """A request to a user's graph that gives its tensor of any datatype back."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**31, max(1, request["rows"]))
    sent = values.astype(str).astype(object)
    if request["model"] != "BYTES":
        sent = values.astype(DATATYPES[request["model"]])
    deadline_s = request["deadline"] and time.monotonic() + request["deadline"]
    try:
        reply = await batcher.predict_named(
            GRAPHS[request["model"]],
            {"x": sent},
            len(sent),
            deadline_s=deadline_s,
            priority=request["priority"],
        )
    except DeadlineExceededError:
        return "late"
    return "equal" if np.array_equal(reply["y"], sent) else "different"


PACKAGES: list[ModelPackage] = []
GRAPHS: dict[str, Session] = {}


@pytest.fixture(autouse=True, scope="module")
def _packages(tree_package: MakePackage, graph_onnx: Callable[..., bytes]) -> None:
    PACKAGES[:] = [tree_package(1), tree_package(2)]
    elements = {
        "FP32": TensorProto.FLOAT,
        "INT64": TensorProto.INT64,
        "BYTES": TensorProto.STRING,
        "BOOL": TensorProto.BOOL,
    }
    for name, element in elements.items():
        column: Any = (element, [None])
        made = graph_onnx(
            [helper.make_node("Identity", ["x"], ["y"])], {"x": column}, {"y": column}
        )
        GRAPHS[name] = Session(ModelPackage(name, 1, f"sha256:{name}", made, read_signature(made)))
