"""Changes of versions and aliases over HTTP, on a daemon of its own per test."""

import asyncio
from typing import Any

import pytest

from mlpd.client import Client
from mlpd.core.errors import ConflictError, InvalidRequestError
from mlpd.registry.records import Cause

LINEAGE: dict[str, Any] = {
    **dict.fromkeys(("service", "service_hash", "definitions_hash", "label"), "x"),
    "spine": {},
    "split": {},
    "metrics": {},
    "packages": {},
    "params": {"num_threads": 1},
    "mode": "as_known",
    "as_of_us": 0,
    "as_of_sequence": 0,
    "rows": 0,
    "seed": 0,
    "row_set_digest": "x",
    "tree_digest": "x",
    "trainer": "x",
    "best_iteration": 0,
    "columns": ["a"],
    "dtypes": {"a": "float64"},
}


def register(edge: Any, versions: int) -> None:
    """Give the daemon's registry versions of `clf` that nobody could serve."""
    for seed in range(versions):
        files = {"model.onnx": b"x" * (seed + 1)}
        work = edge.daemon.registry.register("clf", files, LINEAGE | {"seed": seed}, Cause("me"))
        asyncio.run_coroutine_threadsafe(work, edge.loop).result(30)


def code_of(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises((ConflictError, InvalidRequestError)) as caught:
        call(*arguments, **options)
    return caught.value.code


def test_states_and_pins(fresh: Any) -> None:
    register(fresh, 2)
    with Client(fresh.url, by="ada") as client:
        models = client.models
        archived = models.set_state("clf", 1, "archived", why="old")
        assert (archived["version"]["state"], archived["pinned"]) == ("archived", False)
        assert code_of(models.move_alias, "clf", "champion", 1) == "version_not_ready"
        assert models.set_state("clf", 1, "ready")["version"]["state"] == "ready"
        models.move_alias("clf", "champion", 2)
        assert code_of(models.set_state, "clf", "champion", "deleted") == "version_in_use"
        assert models.pin("clf", 1, why="reference")["pinned"]
        assert models.get("clf")["pinned"] == [1]
        assert code_of(models.set_state, "clf", 1, "deleted") == "version_pinned"
        models.pin("clf", 1, pinned=False)
        assert models.set_state("clf", 1, "deleted")["version"]["state"] == "deleted"
        assert code_of(models.set_state, "clf", 2, "pending") == "unknown_choice"
        first = models.history("clf")["events"][-3]
        assert (first["by"], first["why"], first["to"]) == ("ada", "old", "archived")


def test_a_version_that_answers_requests_is_not_deleted(edge: Any, client: Client) -> None:
    client.models.move_alias("risk", "other", 1)
    client.models.delete_alias("risk", "other")
    for state in ("archived", "deleted"):
        assert code_of(client.models.set_state, "risk", 1, state) == "version_in_use"
    assert edge.call("GET", "/v1/routes/risk")[1]["serving"] == {"risk": "risk@1"}


def test_a_protected_alias_moves_by_force_and_by_rollback(fresh: Any) -> None:
    register(fresh, 2)
    with Client(fresh.url) as client:
        client.models.move_alias("clf", "champion", 1)
        assert client.models.protect("clf", "champion", why="audit")["protected"]
        assert code_of(client.models.move_alias, "clf", "champion", 2) == "alias_protected"
        assert code_of(client.models.delete_alias, "clf", "champion") == "alias_protected"
        moved = client.models.move_alias("clf", "champion", 2, force=True)
        assert (moved["version"], moved["trail"]) == (2, [1])
        assert client.models.history("clf")["events"][0]["force"] is True
        assert client.models.roll_back("clf", "champion")["version"] == 1
        assert not client.models.protect("clf", "champion", protected=False)["protected"]
        assert client.models.move_alias("clf", "champion", 2)["version"] == 2


def test_a_collection_tells_first_and_removes_when_told(fresh: Any) -> None:
    register(fresh, 3)
    with Client(fresh.url) as client:
        client.models.set_state("clf", 1, "deleted")
        told = client.models.collect(grace="1us", keep=1)
        assert (told["deleted"], told["blobs"]) == (False, 4)
        assert [v["number"] for v in told["versions"]] == [2]
        assert client.models.get("clf")["versions"][1]["state"] == "ready"
        waiting = client.models.collect()
        assert (waiting["blobs"], waiting["waiting_blobs"]) == (0, 4)
        done = client.models.collect(grace="1us", keep=1, delete=True)
        assert (done["deleted"], done["blobs"], done["size_bytes"]) == (
            *(True, 4),
            told["size_bytes"],
        )
        assert client.models.collect(grace="1us", delete=True)["blobs"] == 4  # of version 2
        assert client.fsck()["clean"]
        assert code_of(client.models.collect, keep=0) == "invalid_policy"
        assert code_of(client.models.collect, grace="soon") == "invalid_duration"


def test_no_collection_while_a_backup_is_under_way(fresh: Any) -> None:
    backup = fresh.daemon.backup
    asyncio.run_coroutine_threadsafe(backup._lock.acquire(), fresh.loop).result(10)
    try:
        with Client(fresh.url) as client:
            assert code_of(client.models.collect) == "backup_running"
    finally:
        fresh.loop.call_soon_threadsafe(backup._lock.release)
