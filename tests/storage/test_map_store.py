"""The map on disk: whole or not at all, one winner of two, and no map that may not follow."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from mlpd.core.errors import (
    ConflictError,
    InternalError,
    MlpdError,
    NotFoundError,
    StorageFullError,
)
from mlpd.core.hashing import SLOTS
from mlpd.core.shards import Shard, ShardMap
from mlpd.storage.map_store import FileMapStore, MapStore, Member

A, B = Shard("a", "http://127.0.0.1:1"), Shard("b", "http://127.0.0.1:2")
FIRST = Member("a", ShardMap("0f" * 16, 1, (A, B), tuple(slot % 2 for slot in range(SLOTS))))


def after(member: Member, owners: int = 0) -> Member:
    return replace(member, shard_map=member.shard_map.next((A, B), (owners,) * SLOTS))


@pytest.fixture
def store(tmp_path: Path) -> MapStore:
    return FileMapStore(tmp_path)


def refusal(store: MapStore, member: Member, expected: int) -> str:
    with pytest.raises(MlpdError) as refused:
        store.store(member, expected)
    return refused.value.code


def test_what_is_stored_is_loaded(store: MapStore, tmp_path: Path) -> None:
    assert store.load() is None
    store.store(FIRST, 0)
    assert store.load() == FileMapStore(tmp_path).load() == FIRST
    assert (tmp_path / "cluster.json").stat().st_mode & 0o777 == 0o600
    store.store(after(FIRST), 1)
    assert store.load() == after(FIRST)


def test_only_the_expected_epoch_is_replaced(store: MapStore) -> None:
    assert refusal(store, FIRST, 1) == "epoch_moved"
    store.store(FIRST, 0)
    assert refusal(store, after(FIRST), 0) == "epoch_moved"
    store.store(after(FIRST), 1)
    assert refusal(store, after(after(FIRST)), 1) == "epoch_moved"
    assert store.load() == after(FIRST)


def test_a_map_that_may_not_follow_is_refused(store: MapStore) -> None:
    second = after(FIRST)
    store.store(FIRST, 0)
    store.store(second, 1)
    other = replace(second.shard_map, cluster="aa" * 16)
    assert refusal(store, replace(second, shard_map=other), 2) == "other_cluster"
    assert refusal(store, FIRST, 2) == "older_map"
    assert refusal(store, after(FIRST, owners=1), 2) == "map_differs"
    assert refusal(store, replace(second, shard="b"), 2) == "other_shard"
    assert store.load() == second


def test_a_shard_that_the_map_does_not_have_is_refused() -> None:
    with pytest.raises(NotFoundError, match="no shard 'c'"):
        Member("c", FIRST.shard_map)


def test_of_many_that_set_at_once_one_wins(store: MapStore) -> None:
    store.store(FIRST, 0)

    def try_it(owners: int) -> str:
        try:
            store.store(after(FIRST, owners % 2), 1)
        except ConflictError as error:
            return error.code
        return "stored"

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(try_it, range(16)))
    assert found.count("stored") == 1
    assert set(found) <= {"stored", "epoch_moved", "map_differs"}


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b'{"shard": "a"}', b'{"shard": "a", "map": {}}', b'{"shard": 1, "map": {}}'],
)
def test_a_damaged_file_is_no_empty_one(tmp_path: Path, store: MapStore, data: bytes) -> None:
    (tmp_path / "cluster.json").write_bytes(data)
    with pytest.raises(InternalError, match="damaged"):
        store.load()
    assert refusal(store, FIRST, 0) == "damaged_map"
    assert (tmp_path / "cluster.json").read_bytes() == data


DYING = """
import os, sys
from pathlib import Path
from mlpd.core.hashing import SLOTS
from mlpd.storage.map_store import FileMapStore, Member

root, call = sys.argv[1:]
store = FileMapStore(Path(root))
member = store.load()
shard_map = member.shard_map
second = Member("a", shard_map.next(shard_map.shards, (0,) * SLOTS))
setattr(Path if call == "replace" else os, call, lambda *_, **__: os._exit(1))
store.store(second, 1)
"""


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_death_before_the_rename_leaves_the_old_map(
    tmp_path: Path, store: MapStore, call: str
) -> None:
    store.store(FIRST, 0)
    command = [sys.executable, "-c", DYING, str(tmp_path), call]
    assert subprocess.run(command, check=False).returncode == 1
    assert store.load() == FIRST
    store.store(after(FIRST), 1)  # its lock went with it, and its file is no hindrance
    assert store.load() == after(FIRST)


def test_a_directory_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(StorageFullError, match="can't be stored"):
        FileMapStore(tmp_path / "missing").store(FIRST, 0)
