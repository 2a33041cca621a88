import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.serving.package import ModelPackage
from mlpd.serving.sessions import Session
from mlpd.serving.shadow import PAIRS_MAX, ShadowJob, ShadowPair, ShadowResult, ShadowRunner

MakePackage = Callable[..., ModelPackage]
Rows = Callable[..., NDArray[np.float64]]


class Results:
    """Collects results and waits for a number of rows."""

    def __init__(self) -> None:
        self.all: list[ShadowResult] = []
        self.batches: list[int] = []
        self._changed = threading.Condition()

    def __call__(self, results: list[ShadowResult]) -> None:
        with self._changed:
            self.all += results
            self.batches.append(sum(len(result.job.features) for result in results))
            self._changed.notify_all()

    def wait(self, rows: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: sum(self.batches) >= rows, 40)


@contextmanager
def running(**options: Any) -> Iterator[ShadowRunner]:
    before = set(threading.enumerate())  # a daemon of another test area may run a shadow, too
    runner = ShadowRunner(**options)
    runner.start()
    try:
        yield runner
    finally:
        runner.close()
    left = set(threading.enumerate()) - before
    assert not any(thread.name == "mlpd-shadow" for thread in left)


@pytest.fixture
def primary(tree_package: MakePackage) -> Session:
    return Session(tree_package(1))


@pytest.fixture
def shadow(tree_package: MakePackage) -> Session:
    return Session(tree_package(2, version=2))


def job(primary: Session, shadow: Session, rows: NDArray[np.float64], tag: Any = None) -> ShadowJob:
    score = primary.score(primary.run(rows))
    return ShadowJob("risk", primary.package.reference, shadow, rows, score, tag)


def test_a_shadow_scores_the_primarys_rows_in_batches(
    primary: Session, shadow: Session, some_rows: Rows
) -> None:
    results = Results()
    jobs = [job(primary, shadow, some_rows(1 + i % 3, seed=i), tag=i) for i in range(200)]
    with running(on_results=results) as runner:
        assert all(map(runner.submit, jobs))
        total = sum(len(each.features) for each in jobs)
        results.wait(total)
        found = runner.statistics()[ShadowPair("risk", "flights@1", "flights@2")]
        counters = runner.counters()
    assert [result.job.tag for result in results.all] == list(range(200))
    for result in results.all:
        raw = shadow.run(result.job.features)
        assert result.scores.raw.tobytes() == raw.tobytes()
        assert result.scores.score.tobytes() == shadow.score(raw).tobytes()
        assert result.us_per_row > 0
    assert len(results.batches) < 20
    assert max(results.batches) <= 256
    d = np.concatenate([result.scores.score - result.job.score for result in results.all])
    assert found.n == total == counters["executed"] == counters["submitted"]
    assert found.mean == pytest.approx(d.mean())
    assert found.max_abs == np.abs(d).max()


def test_a_full_queue_drops_and_counts(primary: Session, shadow: Session, some_rows: Rows) -> None:
    busy = threading.Event()
    busy.set()
    results = Results()
    with running(on_results=results, busy=busy.is_set, queue_rows_max=10) as runner:
        accepted = [runner.submit(job(primary, shadow, some_rows(3))) for _ in range(5)]
        assert accepted == [True, True, True, False, False]
        assert runner.counters()["dropped"] == 6
        busy.clear()
        results.wait(9)
        assert runner.submit(job(primary, shadow, some_rows(10)))
        results.wait(19)


def test_nothing_runs_while_the_server_is_busy(
    primary: Session, shadow: Session, some_rows: Rows
) -> None:
    asked, busy = threading.Semaphore(0), threading.Event()
    busy.set()

    def is_busy() -> bool:
        asked.release()
        return busy.is_set()

    results = Results()
    with running(on_results=results, busy=is_busy) as runner:
        runner.submit(job(primary, shadow, some_rows(2)))
        for _ in range(3):
            assert asked.acquire(timeout=40)
        assert runner.counters()["waiting"] == 2
        assert not results.all
        busy.clear()
        results.wait(2)


def test_a_failing_shadow_and_a_failing_callback_stop_nothing(
    primary: Session, shadow: Session, some_rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Session(primary.package)
    broken.run = lambda _: (_ for _ in ()).throw(RuntimeError("broken"))  # type: ignore[method-assign]
    results = Results()

    def take(batch: list[ShadowResult]) -> None:
        results(batch)
        raise RuntimeError("taker")

    with caplog.at_level(logging.CRITICAL), running(on_results=take) as runner:
        runner.submit(job(primary, broken, some_rows(2)))
        for _ in range(2):
            runner.submit(job(primary, shadow, some_rows(3)))
            results.wait(3)
        counters = runner.counters()
    assert counters["failed"] == 2
    assert counters["executed"] >= 3


def test_a_large_job_runs_in_chunks(primary: Session, shadow: Session, some_rows: Rows) -> None:
    results = Results()
    rows = some_rows(1000)
    with running(on_results=results) as runner:
        runner.submit(job(primary, shadow, rows))
        results.wait(1000)
    assert results.all[0].scores.raw.tobytes() == shadow.run(rows).tobytes()


@pytest.mark.parametrize(("width", "outputs"), [(5, 1), (4, 3)])
def test_a_shadow_of_another_shape_is_refused(shadow: Session, width: int, outputs: int) -> None:
    runner = ShadowRunner()
    job = ShadowJob("risk", "a@1", shadow, np.zeros((1, width)), np.zeros((1, outputs)))
    with pytest.raises(ValidationError, match="makes 1 scores of 4 features"):
        runner.submit(job)


def test_closing_drops_what_waits(primary: Session, shadow: Session, some_rows: Rows) -> None:
    with running(busy=lambda: True) as runner:
        runner.submit(job(primary, shadow, some_rows(4)))
    runner.close()
    assert not runner.submit(job(primary, shadow, some_rows(1)))
    counters = runner.counters()
    assert (counters["dropped"], counters["waiting"], counters["submitted"]) == (5, 0, 5)


def test_the_number_of_pairs_is_bounded(primary: Session, shadow: Session, some_rows: Rows) -> None:
    results = Results()
    row = some_rows(1)
    score = primary.score(primary.run(row))
    with running(on_results=results) as runner:
        for i in range(PAIRS_MAX + 5):
            runner.submit(ShadowJob(f"route{i}", "a@1", shadow, row, score))
        results.wait(PAIRS_MAX + 5)
        routes = {pair.route for pair in runner.statistics()}
    assert len(routes) == PAIRS_MAX
    assert "route0" not in routes
