"""`mlpd shard serve`: a cluster on one machine by one command, and nothing left when it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlpd.cli.local_cluster import ClusterPlan, LocalCluster
from mlpd.cli.main import main
from mlpd.client import Client
from mlpd.core.errors import ConfigurationError, UnavailableError
from mlpd.storage.lock import read_holder

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(200)


def plan_file(folder: Path, text: str) -> Path:
    path = folder / "shards.toml"
    path.write_text(text)
    return path


def started(folder: Path, plan: str) -> "tuple[subprocess.Popen[str], dict[str, Any]]":
    """Return a running `mlpd shard serve` in a folder, and what it printed when all were ready."""
    command = [sys.executable, "-m", "mlpd", "shard", "serve", "--json"]
    command += ["--config", str(plan_file(folder, plan)), "--data-dir", str(folder / "data")]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    assert child.stdout is not None
    line = child.stdout.readline()
    assert line, child.communicate()[1]
    return child, json.loads(line)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def pids_of(found: dict[str, Any]) -> list[int]:
    return [found["router_pid"], *(shard["pid"] for shard in found["shards"])]


def test_two_shards_answer_at_one_address_until_a_signal_and_leave_nothing(tmp_path: Path) -> None:
    child, found = started(tmp_path, "[router]\nport = 0\n[shards]\na = 0\nb = 0\n")
    try:
        with Client(found["url"]) as client:
            assert client.status()["ready"]
            members = client.cluster.map()["map"]["shards"]
        assert {name: shard["url"] for name, shard in members.items()} == {
            shard["name"]: shard["url"] for shard in found["shards"]
        }
    finally:
        child.send_signal(signal.SIGTERM)
        told = child.communicate()[1]
    assert child.returncode == 0, told
    assert "Starting 2 daemons (a, b)" in told
    assert "All are stopped." in told
    assert not any(map(is_alive, pids_of(found)))


def test_the_end_of_one_is_told_with_its_log_and_ends_all(tmp_path: Path) -> None:
    child, found = started(tmp_path, "[router]\nport = 0\n[shards]\na = 0\n")
    try:
        os.kill(found["shards"][0]["pid"], signal.SIGKILL)
        told = child.communicate(timeout=60)[1]
    finally:
        child.kill()
        child.communicate()
    assert child.returncode == 1
    assert "shard a has ended" in told
    assert "mlpd is ready at" in told  # the end of its log
    assert not any(map(is_alive, pids_of(found)))


def test_a_port_that_is_taken_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cluster = LocalCluster(tmp_path, ClusterPlan({"a": 0}, port))
        with pytest.raises(UnavailableError) as caught:
            cluster.start()
    assert caught.value.code == "daemon_failed"
    assert "the router did not start" in caught.value.message
    assert str(port) in caught.value.message
    assert read_holder(cluster.daemons["a"].paths.lock_file) is None
    assert not any(map(is_alive, cluster.pids))


def test_the_example_is_what_is_started_without_one() -> None:
    assert ClusterPlan.load(ROOT / "conf" / "shards.toml") == ClusterPlan.of(3)


def test_a_plan_is_the_file_that_it_writes(tmp_path: Path) -> None:
    plan = ClusterPlan({"a": 0, "b.c": 65_535}, 1, (tmp_path / "default.toml").resolve())
    assert ClusterPlan.load(plan_file(tmp_path, plan.to_toml())) == plan
    assert ClusterPlan.of(2, 0).ports == {"a": 0, "b": 0}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[shards", "can't be read"),
        ("[router]\nport = 1", "1 to 16 names"),
        ("[shards]", "1 to 16 names"),
        ("[shards]\na = 8700", "twice"),
        ("[shards]\na = 1\nb = 1", "twice"),
        ("[shards]\na = 65536", "from 0 to 65535"),
        ("[shards]\na = true", "from 0 to 65535"),
        ("[shards]\na = 1\n[router]\nhost = 'x'", "nothing else"),
        ("hosts = 1\n[shards]\na = 1", "nothing else"),
        ("config = 1\n[shards]\na = 1", "path of a file"),
        ("\n".join(["[shards]", *(f"s{i} = {i + 1}" for i in range(17))]), "1 to 16 names"),
    ],
)
def test_a_plan_that_is_none_says_what_is_wrong(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ClusterPlan.load(plan_file(tmp_path, text))
    assert caught.value.code == "invalid_shards_file"
    assert problem in caught.value.message


def test_dry_run_says_what_would_be_started_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("data")
    done = CliRunner().invoke(main, ["shard", "serve", "--dry-run", "--data-dir", str(folder)])
    assert done.exit_code == 0, done.output
    assert "Would start 3 daemons (a, b, c)" in done.output
    assert str(folder / "b") in done.output
    arguments = ["shard", "serve", "--dry-run", "--json", "--data-dir", str(folder)]
    told = json.loads(CliRunner().invoke(main, arguments).stdout)
    assert [shard["port"] for shard in told["shards"]] == [8701, 8702, 8703]
    assert not folder.exists()
