"""The feed: what commits did, replayed elsewhere, gives the same bytes; kills and restarts."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mlpd.core.errors import InternalError, UnavailableError, ValidationError
from mlpd.core.time import system_clock
from mlpd.storage.environment import Environment
from mlpd.storage.feed import Commit, Feed, decode_commits, encode_commit
from mlpd.storage.tables import EMPTY_HEAD, Head, Table
from mlpd.storage.transactions import WriteTransaction
from mlpd.storage.writer import Writer

TABLES = (Table.ONLINE, Table.TILES, Table.MODELS)


def everything(environment: Environment) -> dict[Table, list[tuple[bytes, bytes]]]:
    with environment.snapshot() as snapshot:
        return {table: list(snapshot.scan(table)) for table in Table}


def head_of(environment: Environment) -> Head:
    with environment.snapshot() as snapshot:
        return snapshot.head


def replay(writer: Writer, data: bytes) -> None:
    """Replay records as one transaction, as a follower does."""

    def op(txn: WriteTransaction) -> None:
        for commit in decode_commits(data):
            assert commit.previous == Head.decode(txn.get(Table.META, b"head"))
            txn.replay(commit.ops)

    writer.write_blocking(op)


class Closed:
    """A gate that lets nothing in."""

    def check_begin(self) -> None:
        raise UnavailableError("closed", code="closed")

    def check_end(self) -> None:
        return


@pytest.fixture
def feed(tmp_path: Path, environment: Environment) -> Iterator[Feed]:
    opened = Feed(tmp_path / "feed", 1 << 20, head_of(environment))
    yield opened
    opened.close()


@pytest.fixture
def owner(environment: Environment, feed: Feed) -> Iterator[Writer]:
    writer = Writer(environment, feed=feed)
    writer.write_blocking(lambda _: feed.start())
    yield writer
    writer.close()


@pytest.fixture
def follower(tmp_path: Path, environment: Environment, owner: Writer) -> Iterator[Environment]:
    """A copy of the owner's environment as it was when its feed had just begun."""
    owner.write_blocking(lambda _: None)
    environment.copy(tmp_path / "copy")
    with Environment.open(tmp_path / "copy", clock=system_clock) as opened:
        yield opened


def raise_it(error: Exception) -> None:
    raise error


def drawn(rng: random.Random) -> Any:
    """An operation that puts and deletes at random, and fails now and then, all of it or half."""
    steps = [(rng.choice(TABLES), b"%d" % rng.randrange(40), rng.random()) for _ in range(9)]
    fails, half_fails = rng.random() < 0.2, rng.random() < 0.3

    def work(txn: WriteTransaction) -> None:
        for table, key, chance in steps:
            if chance < 0.3:
                txn.delete(table, key)
            elif chance < 0.6:
                txn.put_many(table, ((key + b"%d" % i, key * 9) for i in range(3)))
            else:
                txn.put(table, key, repr(chance).encode())

    def op(txn: WriteTransaction) -> None:
        work(txn)
        txn.take_sequences(2)
        if half_fails:
            with suppress(KeyError), txn.savepoint():
                work(txn)
                txn.put(Table.RUNS, b"never", b"")
                raise_it(KeyError())
        if fails:
            raise ValidationError("no", code="mine")

    return op


@pytest.mark.parametrize("seed", range(6))
def test_commits_replayed_elsewhere_give_the_same_bytes_in_all_tables(
    environment: Environment, owner: Writer, feed: Feed, follower: Environment, seed: int
) -> None:
    rng, applied = random.Random(seed), Writer(follower)
    for _ in range(30):
        for _ in range(rng.randrange(4)):
            owner.post(drawn(rng))
        with suppress(ValidationError):
            owner.write_blocking(drawn(rng))
        if rng.random() < 0.4:
            data = feed.read(head_of(follower), rng.choice([1, 500, 1 << 20]))
            assert data is not None
            replay(applied, data)
    while data := feed.read(head_of(follower)):
        replay(applied, data)
    assert data == b""
    assert everything(follower) == everything(environment)
    with environment.snapshot() as snapshot:
        assert snapshot.get(Table.RUNS, b"never") is None
        assert snapshot.count(Table.ONLINE) > 5
    closed = Writer(follower, gate=Closed())
    applied.close()  # which commits an empty group: a follower's gate holds that up, too
    before = everything(follower)
    closed.close()
    assert everything(follower) == before


def test_a_closed_gate_refuses_all_but_what_passes(environment: Environment) -> None:
    writer = Writer(environment, gate=Closed())
    with pytest.raises(UnavailableError, match="closed"):
        writer.write_blocking(lambda txn: txn.put(Table.RUNS, b"a", b""))
    writer.close()
    assert not everything(environment)[Table.RUNS]


async def test_what_passes_is_written_beside_what_is_refused(environment: Environment) -> None:
    writer = Writer(environment, gate=Closed())
    await writer.write(lambda txn: txn.put(Table.RUNS, b"a", b""), passes=True)
    with pytest.raises(UnavailableError, match="closed"):
        await writer.write(lambda txn: txn.put(Table.RUNS, b"b", b""))
    writer.close()
    assert everything(environment)[Table.RUNS] == [(b"a", b"")]


def test_old_files_go_and_a_head_from_before_them_is_not_found(
    tmp_path: Path, environment: Environment
) -> None:
    feed = Feed(tmp_path / "feed", 40_000, head_of(environment))
    writer = Writer(environment, feed=feed)
    writer.write_blocking(lambda _: feed.start())
    start, heads = head_of(environment), []
    for i in range(200):
        value = b"%d" % i * 300
        writer.write_blocking(
            partial(WriteTransaction.put, table=Table.RUNS, key=b"k", value=value)
        )
        heads.append(head_of(environment))
    assert feed.read(start) is None
    assert 20_000 < feed.size_bytes < 60_000
    assert len(list((tmp_path / "feed").iterdir())) > 3
    known = [feed.read(head, 1 << 30) is not None for head in heads]
    assert known == sorted(known)
    assert known.count(True) > 20
    found = feed.read(heads[-20], 1)
    seen: list[Head] = []
    while found:  # also over the ends of files
        seen += [commit.head for commit in decode_commits(found)]
        found = feed.read(seen[-1], 1)
    assert seen == heads[-19:]
    writer.write_blocking(lambda _: feed.stop())
    assert not (tmp_path / "feed").exists()
    writer.close()
    assert feed.read(heads[-1]) is None


def test_a_head_of_another_history_is_not_found(
    environment: Environment, owner: Writer, feed: Feed
) -> None:
    owner.write_blocking(lambda txn: txn.put(Table.RUNS, b"k", b""))
    head = head_of(environment)
    assert feed.read(head) == b""
    assert feed.read(head._replace(sequence=head.sequence + 1)) is None  # type: ignore[arg-type]
    assert feed.read(EMPTY_HEAD) is None


def test_after_a_restart_the_feed_goes_on_and_what_was_not_committed_is_cut_off(
    tmp_path: Path, environment: Environment, owner: Writer, feed: Feed
) -> None:
    start = head_of(environment)
    owner.write_blocking(lambda txn: txn.put(Table.RUNS, b"a", b""))
    owner.close()
    newest = head_of(environment)
    lost = newest._replace(group_us=newest.group_us + 5)  # type: ignore[arg-type]
    feed.begin(Commit(newest, lost, [(Table.RUNS, b"lost", b"")]))
    feed.close()

    again = Feed(tmp_path / "feed", 1 << 20, newest)
    assert again.is_on
    data = again.read(start)
    assert data is not None
    assert [*decode_commits(data)][-1].head == newest
    writer = Writer(environment, feed=again)
    writer.write_blocking(lambda txn: txn.put(Table.RUNS, b"b", b""))
    (commit,) = decode_commits(again.read(newest) or b"")
    assert (Table.RUNS, b"b", b"") in commit.ops
    writer.close()
    again.close()
    # Only the uncommitted record is in the file that comes last.
    (tmp_path / "feed" / f"{lost.group_us + 99:020d}.feed").write_bytes(
        encode_commit(Commit(lost, lost._replace(group_us=lost.group_us + 10**9), []))  # type: ignore[arg-type]
    )
    third = Feed(tmp_path / "feed", 1 << 20, head_of(environment))
    assert third.read(newest)
    third.close()


def test_a_feed_that_lacks_the_newest_commit_begins_anew(
    tmp_path: Path, environment: Environment, owner: Writer, feed: Feed
) -> None:
    start = head_of(environment)
    owner.write_blocking(lambda txn: txn.put(Table.RUNS, b"a", b""))
    owner.close()
    feed.close()
    path = max((tmp_path / "feed").iterdir())
    os.truncate(path, path.stat().st_size - 3)  # as a power cut may leave it
    again = Feed(tmp_path / "feed", 1 << 20, head_of(environment))
    assert again.is_on
    assert again.read(start) is None
    assert not list((tmp_path / "feed").iterdir())


def test_a_flipped_bit_in_a_record_is_noticed() -> None:
    record = encode_commit(Commit(EMPTY_HEAD, EMPTY_HEAD, [(Table.RUNS, b"k", b"v" * 9)]))
    assert [c.ops for c in decode_commits(record)] == [[(Table.RUNS, b"k", b"v" * 9)]]
    for at in range(4, len(record)):  # the first four are its size
        damaged = bytearray(record)
        damaged[at] ^= 4
        with pytest.raises(InternalError, match="damaged"):
            list(decode_commits(bytes(damaged)))
    for size in range(1, len(record)):
        with pytest.raises(InternalError, match="damaged"):
            list(decode_commits(record[:size]))


def test_a_full_disk_ends_the_feed_and_not_the_commit(
    environment: Environment, owner: Writer, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlpd.storage.feed.os.pwrite", full)
    owner.write_blocking(lambda txn: txn.put(Table.RUNS, b"a", b""))
    assert everything(environment)[Table.RUNS] == [(b"a", b"")]
    assert not feed.is_on


WRITES = """
import sys
from pathlib import Path
from mlpd.core.time import system_clock
from mlpd.storage.environment import Environment
from mlpd.storage.feed import Feed
from mlpd.storage.tables import Table
from mlpd.storage.writer import Writer
root = Path(sys.argv[1])
with Environment.open(root / "lmdb", clock=system_clock, map_bytes=1 << 26) as environment:
    with environment.snapshot() as snapshot:
        feed = Feed(root / "feed", 1 << 20, snapshot.head)
    writer = Writer(environment, feed=feed)
    writer.write_blocking(lambda _: feed.start())
    print("go", flush=True)
    i = 0
    while True:
        writer.write_blocking(lambda txn: txn.put(Table.RUNS, b"%d" % (i % 50), b"%d" % i * 50))
        i += 1
"""


def test_kill_9_leaves_a_feed_that_ends_with_the_newest_commit(tmp_path: Path) -> None:
    rng = random.Random(3)
    for _ in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITES, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"go\n"
        try:
            child.wait(rng.uniform(0.02, 0.2))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        with Environment.open(tmp_path / "lmdb", clock=system_clock) as environment:
            head = head_of(environment)
        feed = Feed(tmp_path / "feed", 1 << 20, head)
        assert feed.read(head) == b""  # else: None
        feed.close()
