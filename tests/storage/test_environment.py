"""The environment: snapshots, scans, restarts, forks, a failing disk."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mlpd.core.errors import (
    ConfigurationError,
    InternalError,
    StorageFullError,
    UnavailableError,
)
from mlpd.core.time import system_clock
from mlpd.storage.environment import Environment
from mlpd.storage.tables import FORMAT_KEY, Table, from_u64be, u64be
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer


def put(key: bytes, value: bytes) -> Any:
    return lambda txn: txn.put(Table.ROUTES, key, value)


def test_snapshot_does_not_see_later_writes(environment: Environment, writer: Writer) -> None:
    writer.write_blocking(put(b"a", b"1"))
    with environment.snapshot() as snapshot:
        writer.write_blocking(put(b"a", b"2"))
        assert snapshot.get(Table.ROUTES, b"a") == b"1"
    with environment.snapshot() as snapshot:
        assert snapshot.get_many(Table.ROUTES, [b"a", b"b"]) == [b"2", None]
        assert snapshot.count(Table.ROUTES) == 1


keys = st.binary(min_size=1, max_size=3)


@settings(max_examples=50)
@given(
    table=st.dictionaries(keys, st.binary(max_size=5), max_size=20),
    start=st.binary(max_size=3),
    stop=st.none() | keys,
)
def test_scan_yields_what_a_sorted_dict_holds(
    tmp_path_factory: Any, table: dict[bytes, bytes], start: bytes, stop: bytes | None
) -> None:
    directory = tmp_path_factory.mktemp("scan")
    with Environment.open(directory, clock=system_clock) as environment:
        txn = environment.begin_write(environment.times.begin_group())
        for key, value in table.items():
            txn.put(Table.JOBS, key, value)
        wanted = sorted(i for i in table.items() if start <= i[0] and (stop is None or i[0] < stop))
        assert list(txn.scan(Table.JOBS, start, stop)) == wanted
        assert list(txn.scan(Table.JOBS, start, stop, reverse=True)) == wanted[::-1]
        txn.abort()


@given(a=st.integers(0, 2**64 - 1), b=st.integers(0, 2**64 - 1))
def test_u64be_sorts_as_numbers_do(a: int, b: int) -> None:
    assert from_u64be(u64be(a)) == a
    assert (u64be(a) < u64be(b)) == (a < b)


def test_readonly_environment_follows_the_writer(environment: Environment, writer: Writer) -> None:
    code = (
        "import sys; from mlpd.storage.environment import Environment, Table;"
        "from mlpd.core.time import system_clock;"
        "e = Environment.open(sys.argv[1], clock=system_clock, readonly=True);"
        "s = e.snapshot(); print(s.get(Table.ROUTES, b'k').decode()); s.close(); e.close()"
    )
    writer.write_blocking(put(b"k", b"seen"))
    command = [sys.executable, "-c", code, str(environment.directory)]
    assert subprocess.run(command, check=True, capture_output=True).stdout == b"seen\n"


def test_readonly_needs_an_environment(tmp_path: Path, clock: Any) -> None:
    with pytest.raises(UnavailableError) as caught:
        Environment.open(tmp_path / "none", clock=clock, readonly=True)
    assert caught.value.code == "no_environment"
    assert not (tmp_path / "none").exists()


def test_unfinished_creation_is_begun_anew(tmp_path: Path, clock: Any) -> None:
    (tmp_path / "lmdb" / ".new").mkdir(parents=True)
    (tmp_path / "lmdb" / ".new" / "data.mdb").write_bytes(bytes(8192))
    with Environment.open(tmp_path / "lmdb", clock=clock) as environment:
        assert environment.usage().used_bytes > 0
    assert sorted(p.name for p in (tmp_path / "lmdb").iterdir()) == ["data.mdb", "lock.mdb"]


def test_unknown_format_is_refused(tmp_path: Path, clock: Any) -> None:
    with Environment.open(tmp_path, clock=clock) as environment:
        writer = Writer(environment)
        writer.write_blocking(lambda txn: txn.put(Table.META, FORMAT_KEY, b"999"))
        writer.close()
    with pytest.raises(ConfigurationError) as caught:
        Environment.open(tmp_path, clock=clock)
    assert caught.value.code == "unknown_format"


def test_closed_environment_says_so(tmp_path: Path, clock: Any) -> None:
    environment = Environment.open(tmp_path, clock=clock)
    environment.close()
    environment.close()
    with pytest.raises(UnavailableError) as caught:
        environment.snapshot()
    assert caught.value.code == "storage_closed"


def test_forked_child_refuses_the_environment(environment: Environment) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            environment.snapshot()
        except InternalError as error:
            os._exit(7 if error.code == "forked_environment" else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    environment.snapshot().close()


def test_usage_counts_bytes_and_lagging_snapshots(environment: Environment) -> None:
    with environment.snapshot() as snapshot:
        assert environment.usage().lagging_snapshots == 0
        snapshot.opened_s -= 2
        usage = environment.usage()
    assert usage.lagging_snapshots == 1
    assert 0 < usage.used_bytes < usage.map_bytes


def descriptors(path: Path, *, synchronous: bool) -> list[int]:
    """LMDB's descriptors of the data file: the meta page goes through one with O_DSYNC."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        if link.exists() and link.readlink() == path / "data.mdb":
            lines = Path("/proc/self/fdinfo", link.name).read_text().splitlines()
            flags = int(lines[1].split()[1], 8)
            if bool(flags & os.O_DSYNC) is synchronous and flags & os.O_ACCMODE:
                found.append(int(link.name))
    return found


def break_disk(descriptor: int) -> int:
    """Let writes through the descriptor fail with ENOSPC; return a copy to mend it with."""
    saved = os.dup(descriptor)
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, descriptor)
    os.close(full)
    return saved


def test_full_disk_fails_writes_not_reads_and_heals(
    environment: Environment, writer: Writer
) -> None:
    writer.write_blocking(put(b"a", b"1"))
    (descriptor,) = descriptors(environment.directory, synchronous=False)
    saved = break_disk(descriptor)
    for _ in range(3):
        with pytest.raises(StorageFullError):
            writer.write_blocking(put(b"a", b"2"))
        with environment.snapshot() as snapshot:
            assert snapshot.get(Table.ROUTES, b"a") == b"1"
    os.dup2(saved, descriptor)
    os.close(saved)
    writer.write_blocking(put(b"a", b"3"))
    with environment.snapshot() as snapshot:
        assert snapshot.get(Table.ROUTES, b"a") == b"3"
    assert writer.stats.storage_failures == 3


def test_failed_meta_page_reopens_the_environment(environment: Environment, writer: Writer) -> None:
    writer.write_blocking(put(b"a", b"1"))
    (descriptor,) = descriptors(environment.directory, synchronous=True)
    os.close(break_disk(descriptor))
    with pytest.raises(StorageFullError):
        writer.write_blocking(put(b"a", b"2"))
    with environment.snapshot() as snapshot:
        assert snapshot.get(Table.ROUTES, b"a") == b"1"
    writer.write_blocking(put(b"b", b"3"))
    with environment.snapshot() as snapshot:
        assert snapshot.get_many(Table.ROUTES, [b"a", b"b"]) == [b"1", b"3"]
    assert writer.stats.reopened == 1


class WriterMachine(RuleBasedStateMachine):
    """Writer and table against a dict, over restarts, with operations that fail half-way."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(os.environ["STORAGE_MACHINE"], os.urandom(8).hex())
        self.model: dict[bytes, bytes] = {}
        self.sequence = 0
        self.open()

    def open(self) -> None:
        self.environment = Environment.open(self.directory, clock=system_clock)
        self.writer = Writer(self.environment)

    @rule(key=keys, value=st.binary(max_size=2000))
    def put(self, key: bytes, value: bytes) -> None:
        self.writer.write_blocking(put(key, value))
        self.model[key] = value

    @rule(key=keys)
    def delete(self, key: bytes) -> None:
        existed = self.writer.write_blocking(lambda txn: txn.delete(Table.ROUTES, key))
        assert existed == (self.model.pop(key, None) is not None)

    @rule(count=st.integers(1, 9))
    def take(self, count: int) -> None:
        first = self.writer.write_blocking(lambda txn: txn.take_sequences(count))
        assert first == self.sequence + 1
        self.sequence += count

    @rule(items=st.dictionaries(keys, st.binary(max_size=9), min_size=1), count=st.integers(1, 5))
    def fail_half_way(self, items: dict[bytes, bytes], count: int) -> None:
        def op(txn: WriteTransaction) -> None:
            txn.take_sequences(count)
            for key, value in items.items():
                txn.put(Table.ROUTES, key, value)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            self.writer.write_blocking(op)

    @rule()
    def restart(self) -> None:
        self.teardown()
        self.open()

    @invariant()
    def agrees_with_the_model(self) -> None:
        with self.environment.snapshot() as snapshot:
            assert dict(snapshot.scan(Table.ROUTES)) == self.model
            assert snapshot.sequence == self.sequence

    def teardown(self) -> None:
        self.writer.close()
        self.environment.close()


def test_writer_agrees_with_a_dict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_MACHINE", str(tmp_path))
    machine = WriterMachine.TestCase
    machine.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
    machine().runTest()


def test_readonly_environment_hands_out_no_read_times(tmp_path: Path, clock: Any) -> None:
    Environment.open(tmp_path, clock=clock).close()
    with (
        Environment.open(tmp_path, clock=clock, readonly=True) as environment,
        pytest.raises(InternalError),
    ):
        environment.read_at()


def test_file_does_not_grow_under_steady_churn(environment: Environment, writer: Writer) -> None:
    rng = random.Random(3)

    def churn(txn: WriteTransaction) -> None:
        for _ in range(100):
            key, value = b"%08d" % rng.randrange(5_000), rng.randbytes(rng.randrange(50, 500))
            txn.put(Table.ROUTES, key, value)

    used_bytes = []
    for _ in range(2):
        for _ in range(150):
            writer.write_blocking(churn)
        used_bytes.append(environment.usage().used_bytes)
    assert used_bytes[1] < 1.15 * used_bytes[0]
