"""Vectors of served rows move from LMDB into files: none is lost, none comes twice."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.config import Config, PredictionsConfig
from mlpd.core.errors import StorageFullError, ValidationError
from mlpd.core.names import TimeUs
from mlpd.core.time import DAY_US
from mlpd.daemon import prediction_files
from mlpd.daemon.app import Daemon
from mlpd.daemon.fsck import check_stopped
from mlpd.daemon.predictions import Prediction, PredictionIds, prediction_key, scan_predictions
from mlpd.daemon.restore import restore
from mlpd.daemon.served_child import read_predictions
from mlpd.daemon.served_files import load_files
from mlpd.daemon.served_frames import decode_request, encode_request, from_frame, to_frame
from mlpd.daemon.served_pages import ServedSelection, read_page
from mlpd.storage.environment import Environment
from mlpd.storage.tables import Table

OpenDaemon = Callable[..., AbstractAsyncContextManager[Daemon]]
NOW_US = 1_700_000_000_000_000 - 1_700_000_000_000_000 % DAY_US + DAY_US // 2
ROWS = 100
CONFIG = Config(predictions=PredictionsConfig(file_rows=ROWS, retention_us=30 * DAY_US))


class Clock:
    now_us = NOW_US

    def __call__(self) -> TimeUs:
        return TimeUs(self.now_us)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_files, "PAUSE_S", 0.0)


@pytest.fixture
def opened(open_daemon: OpenDaemon, clock: Clock) -> OpenDaemon:
    @asynccontextmanager
    async def run() -> Any:
        async with open_daemon(config=CONFIG, clock=clock) as daemon:
            yield daemon

    return run


def prediction(ids: PredictionIds, i: int) -> Prediction:
    """One of several shapes: widths, units, bits that only an exact copy keeps."""
    vector = np.array([float(i), -0.0, np.nan, np.inf][: i % 5])
    given = {"user": f"u{i % 7}", "n": i, "x": i / 3, "raw": bytes([i % 256])}
    unit = None if i % 3 == 0 else f"u{i % 7}"
    name = ids.make(NOW_US - i, unit)
    arm = "ab"[i % 2]
    fields = {"unit": unit, "propensity": 0.5, "share": 1.0 if i % 2 else 0.25}
    return Prediction(name, NOW_US - i, i, f"r{i % 2}", arm, "m", 1, i / 7, vector, given, **fields)


async def log(daemon: Daemon, count: int) -> list[Prediction]:
    ids = PredictionIds()
    made = [prediction(ids, i) for i in range(count)]
    for i, one in enumerate(made):
        daemon.predictions.append(one)
        if i % 37 == 36:
            daemon.predictions.flush()
    daemon.predictions.flush()
    await daemon.writer.write(lambda _: None)
    return made


def exact(one: Prediction) -> tuple[Any, ...]:
    fields = {name: getattr(one, name) for name in one.__slots__}
    del fields["moved"]
    return (fields.pop("vector").tobytes(), repr(sorted(fields.pop("given").items())), str(fields))


def whole(daemon: Daemon) -> list[Prediction]:
    """Every vector there is: LMDB's, then the files', as the audit reads them."""
    found = [p for rows in scan_predictions(daemon.environment) for p, _ in rows if not p.moved]
    for rows in read_predictions(daemon.environment, daemon.paths):
        found += rows
    return found


def paged(daemon: Daemon, limit: int = 1000, **selection: Any) -> list[str]:
    """Read page by page; the ids, sorted: what is committed together has no order."""
    found, after = [], ""
    while True:
        page = ServedSelection(limit, after, **selection)
        frame, position = read_page(daemon.environment, daemon.paths.predictions, page)
        if not len(frame):
            return sorted(found)
        assert len(frame) < limit + 32
        found += frame["prediction_id"].to_list()
        after = position.hex()


def ids_of(predictions: Iterable[Prediction]) -> list[str]:
    return sorted(p.prediction_id for p in predictions)


def moved(daemon: Daemon) -> int:
    return sum(p.moved for rows in scan_predictions(daemon.environment) for p, _ in rows)


async def test_every_vector_is_in_one_place_and_labels_still_join(opened: OpenDaemon) -> None:
    async with opened() as daemon:
        made = await log(daemon, 250)
        assert paged(daemon) == ids_of(made)
        await daemon.prediction_files.run_if_due()
        sizes = daemon.prediction_files.sizes()
        assert sizes["files"] == 2  # the rest are fewer than a file, of a day that goes on
        assert moved(daemon) == sizes["rows"] >= 2 * ROWS
        assert sorted(map(exact, whole(daemon))) == sorted(map(exact, made))
        assert paged(daemon) == ids_of(made)
        assert paged(daemon, 1) == paged(daemon, 40) == paged(daemon)
        odd = ids_of(p for p in made if p.route == "r1")
        assert paged(daemon, route="r1") == odd
        labels = [{"prediction_id": p.prediction_id, "label": 1} for p in made]
        done = await daemon.feedback.record(labels)
        assert (done.joined, done.orphans) == (250, 0)
        frame, _ = read_page(
            daemon.environment, daemon.paths.predictions, ServedSelection(300, route="r0")
        )
        assert frame["label"].to_list() == [1.0] * 125
        scores = {p.prediction_id: p.score for p in made if p.route == "r0"}
        assert dict(frame.select("prediction_id", "score").iter_rows()) == scores
    async with opened() as daemon:
        assert sorted(map(exact, whole(daemon))) == sorted(map(exact, made))
    report = await asyncio.to_thread(check_stopped, daemon.paths.root, daemon.clock)
    assert report["clean"], report["problems"]
    assert report["checked"]["predictions"]["moved"] == sizes["rows"]


async def test_a_file_holds_one_day_and_a_day_that_is_over_goes(
    opened: OpenDaemon, clock: Clock
) -> None:
    async with opened() as daemon:
        first = await log(daemon, 10)
        await daemon.prediction_files.run_if_due()
        assert daemon.prediction_files.sizes()["files"] == 0
        clock.now_us += DAY_US
        second = await log(daemon, 20)
        await daemon.prediction_files.run_if_due()
        with daemon.environment.snapshot() as snapshot:
            (file,) = load_files(snapshot)
        assert (file.rows, file.path) == (10, "2023-11-14/1.parquet")
        assert file.first_us // DAY_US == file.last_us // DAY_US == NOW_US // DAY_US
        assert paged(daemon) == ids_of(first + second)
        start = NOW_US + DAY_US // 2
        assert paged(daemon, start_us=start) == ids_of(second)
        assert paged(daemon, end_us=start) == ids_of(first)


@pytest.mark.parametrize("kept", [0, 1])
async def test_an_export_cut_short_leaves_all_as_it_was(
    opened: OpenDaemon, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise StorageFullError("the disk is full")

    async with opened() as daemon:
        made = await log(daemon, 230)
        for _ in range(kept):
            await daemon.prediction_files.run()
        with monkeypatch.context() as patch:
            patch.setattr(prediction_files, "store_file", fail)
            with pytest.raises(StorageFullError):
                await daemon.prediction_files.run()
        assert len([*daemon.paths.predictions.rglob("*.parquet")]) == kept + 1
        assert paged(daemon) == ids_of(made)
        assert sorted(map(exact, whole(daemon))) == sorted(map(exact, made))
    async with opened() as daemon:
        assert len([*daemon.paths.predictions.rglob("*.parquet")]) == kept
        await daemon.prediction_files.run_if_due()
        assert sorted(map(exact, whole(daemon))) == sorted(map(exact, made))


async def test_vectors_that_could_not_leave_lmdb_yet_count_once(
    opened: OpenDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def fail_later(txn: Any, *, keys: Any, was: Any = prediction_files._take_vectors) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise StorageFullError("the disk is full")
        return int(was(txn, keys=keys))

    monkeypatch.setattr(prediction_files, "MOVED_PER_WRITE", 30)
    async with opened() as daemon:
        made = await log(daemon, 130)
        with monkeypatch.context() as patch:
            patch.setattr(prediction_files, "_take_vectors", fail_later)
            with pytest.raises(StorageFullError):
                await daemon.prediction_files.run_if_due()
        assert moved(daemon) == 30
        assert paged(daemon, 50) == ids_of(made)
    async with opened() as daemon:
        assert paged(daemon, 50) == ids_of(made)
        await daemon.prediction_files.run_if_due()
        assert moved(daemon) == daemon.prediction_files.sizes()["rows"] >= ROWS
        assert sorted(map(exact, whole(daemon))) == sorted(map(exact, made))


async def test_files_go_with_the_retention(opened: OpenDaemon, clock: Clock) -> None:
    async with opened() as daemon:
        await log(daemon, 110)
        await daemon.prediction_files.run_if_due()
        clock.now_us += 20 * DAY_US
        made = await log(daemon, 150)
        await daemon.prediction_files.run_if_due()
        assert daemon.prediction_files.sizes()["files"] >= 2
        clock.now_us += 11 * DAY_US
        await daemon.retention.run()
        kept_us = CONFIG.predictions.retention_us
        assert await daemon.prediction_files.remove_old(clock() - kept_us) == 110
        assert paged(daemon) == ids_of(made)
        assert len([*daemon.paths.predictions.rglob("*.parquet")]) == 1
        more = await log(daemon, 120)
        await daemon.prediction_files.run_if_due()
        assert paged(daemon) == ids_of(made + more)


async def test_what_an_erasure_names_leaves_files_and_lmdb(
    opened: OpenDaemon, trainable: dict[str, Any]
) -> None:
    async with opened() as daemon:
        await daemon.definitions.apply(trainable)
        made = await log(daemon, 250)
        await daemon.prediction_files.run_if_due()
        receipt = await daemon.erase.run("user", [{"user": "u3"}])
        left = [p for p in made if p.given["user"] != "u3"]
        assert receipt["predictions"] == 250 - len(left)
        assert sorted(map(exact, whole(daemon))) == sorted(map(exact, left))
        assert paged(daemon) == ids_of(left)
        with daemon.environment.snapshot() as snapshot:
            assert snapshot.count(Table.PREDICTIONS) == len(left)
            files = load_files(snapshot)
        assert {file.revision for file in files} == {1}
        paths = {str(daemon.paths.predictions / file.path) for file in files}
        assert {str(p) for p in daemon.paths.predictions.rglob("*.parquet")} == paths
        assert not any(
            '"u3"' in text for path in paths for text in pl.read_parquet(path)["request"]
        )
    report = await asyncio.to_thread(check_stopped, daemon.paths.root, daemon.clock)
    assert report["clean"], report["problems"]


async def test_a_backup_has_the_files(opened: OpenDaemon, tmp_path: Path) -> None:
    async with opened() as daemon:
        made = await log(daemon, 130)
        await daemon.prediction_files.run_if_due()
        await daemon.backup.run(str(tmp_path / "backup"))
    await asyncio.to_thread(restore, tmp_path / "backup", tmp_path / "again", daemon.clock)
    paths = type(daemon.paths)(tmp_path / "again")
    with Environment.open(paths.lmdb, clock=daemon.clock, readonly=True) as environment:
        frame, _ = read_page(environment, paths.predictions, ServedSelection(1000))
    assert sorted(frame["prediction_id"].to_list()) == ids_of(made)


async def test_damage_to_files_is_found(opened: OpenDaemon) -> None:
    async with opened() as daemon:
        await log(daemon, 230)
        await daemon.prediction_files.run_if_due()
        with daemon.environment.snapshot() as snapshot:
            first, second = load_files(snapshot)
    directory = daemon.paths.predictions
    (directory / "left.parquet").write_bytes(b"PAR1")
    content = bytearray((directory / first.path).read_bytes())
    content[len(content) // 2] ^= 1
    (directory / first.path).write_bytes(content)
    (directory / second.path).unlink()
    report = await asyncio.to_thread(check_stopped, daemon.paths.root, daemon.clock)
    found = {(p["code"], p["subject"]) for p in report["problems"]}
    assert found == {
        ("served_file_damaged", first.path),
        ("served_file_missing", second.path),
    }
    assert report["checked"]["predictions"]["unnamed_files"] == 1


async def test_pages_with_wrong_bounds_are_refused(opened: OpenDaemon) -> None:
    async with opened() as daemon:
        for limit, after in ((0, ""), (10_001, ""), (5, "xy"), (5, "ab" * 23)):
            with pytest.raises(ValidationError):
                await daemon.prediction_files.page(ServedSelection(limit, after), arrow=False)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.text("abc $", min_size=1), VALUES, max_size=4))
def test_requests_come_back_exactly(request: dict[str, Any]) -> None:
    assert repr(decode_request(encode_request(request))) == repr(request)


@given(st.lists(st.lists(st.integers(0, 2**64 - 1), max_size=4), max_size=6))
def test_vectors_come_back_to_the_bit(bits: list[list[int]]) -> None:
    vectors = [np.array(words, np.uint64).view(np.float64) for words in bits]
    rows = [
        (bytes(24), Prediction("00" * 16, 1, 2, "r", "a", "m", 1, 0.5, vector, {}))
        for vector in vectors
    ]
    frame = to_frame(rows)
    assert frame.schema == to_frame([]).schema
    assert frame["vector"].dtype == pl.List(pl.Float64)
    assert [p.vector.tobytes() for p in from_frame(frame)] == [v.tobytes() for v in vectors]


KILLED = """
import asyncio, sys
from pathlib import Path
import numpy as np
from mlpd.core.config import Config, PredictionsConfig
from mlpd.daemon.app import Daemon
from mlpd.daemon.predictions import Prediction, PredictionIds

async def main():
    daemon = Daemon(Path(sys.argv[1]), Config(predictions=PredictionsConfig(file_rows=40)))
    await daemon.start()
    ids, number = PredictionIds(), int(sys.argv[2])

    async def serve():
        nonlocal number
        while True:
            made = []
            for _ in range(10):
                name = ids.make(1_700_000_000_000_000 + number, None)
                vector = np.array([float(number)])
                given = {"n": number}
                daemon.predictions.append(
                    Prediction(name, 1, number, "r", "a", "m", 1, 0.5, vector, given)
                )
                made.append(number)
                number += 1
            daemon.predictions.flush()
            await daemon.writer.write(lambda _: None)
            print(made[-1], daemon.prediction_files.sizes()["files"], flush=True)
            await asyncio.sleep(0.01)

    async def move():
        while True:
            await daemon.prediction_files.run_if_due()
            await asyncio.sleep(0.01)

    await asyncio.gather(serve(), move())

asyncio.run(main())
"""


def run_until_killed(directory: Path, first: int, files: int, rows: int) -> int:
    """Serve until there are so many files, then so many rows, and kill -9; the last number."""
    command = [sys.executable, "-c", KILLED, str(directory), str(first)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last, found, stop = first - 1, 0, 0
    try:
        while found < files or last < stop:
            line = process.stdout.readline()
            assert line, "it ended by itself"
            last, found = map(int, line.split())
            if found < files:
                stop = last + rows
    finally:
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().splitlines()
        process.wait()
        process.stdout.close()
    return max([last, *(int(line.split()[0]) for line in rest if line.count(" ") == 1)])


def numbers(environment: Environment, directory: Path) -> Iterator[int]:
    page = ServedSelection(100_000)
    frame, _ = read_page(environment, directory, page)
    for vector, request in zip(frame["vector"], frame["request"], strict=True):
        assert vector.to_list() == [float(json.loads(request)["n"])]
        yield json.loads(request)["n"]


async def test_a_kill_at_any_moment_neither_loses_nor_doubles(
    open_daemon: OpenDaemon, tmp_path: Path
) -> None:
    first, acknowledged = 0, set[int]()
    for files, rows in ((1, 0), (2, 30)):
        last = await asyncio.to_thread(run_until_killed, tmp_path, first, files, rows)
        acknowledged |= set(range(first, last + 1))
        first = last + 1000  # what was not acknowledged may be there
    async with open_daemon(tmp_path) as daemon:
        found = [*numbers(daemon.environment, daemon.paths.predictions)]
        assert len(found) == len(set(found))
        assert acknowledged <= set(found)
        await daemon.prediction_files._move_all()
        assert daemon.prediction_files.sizes()["rows"] == moved(daemon) > 0
        assert [*numbers(daemon.environment, daemon.paths.predictions)] == found
        assert prediction_key(whole(daemon)[0].prediction_id)
    report = await asyncio.to_thread(check_stopped, daemon.paths.root, daemon.clock)
    assert report["clean"], report["problems"]
