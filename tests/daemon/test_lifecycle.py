"""Routes, experiments and runs of a real daemon process: stopped, killed, cancelled, retried."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlpd.client import Client
from mlpd.core.errors import ConflictError
from tests.conftest import children_of

EXPERIMENT: dict[str, Any] = {
    "unit": "user",
    "arms": {"control": 1.0, "treatment": 1.0},
    "metrics": [{"name": "label"}],
    "planned_units": 100,
}
USERS = 40
DEADLINE_S = 40.0


def wait_for(reached: Callable[[], Any]) -> Any:
    """Return what `reached` returns once it is true."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not (found := reached()):
        assert time.monotonic() < deadline_s, "it never happened"
        time.sleep(0.01)
    return found


def training_children(process: Any) -> list[int]:
    """Return the process ids of the daemon's children that train."""
    return [pid for pid in children_of(process.pid) if is_training(pid)]


def is_training(pid: int) -> bool:
    try:
        return b"train" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def prepare(client: Client, document: dict[str, Any], columns: dict[str, Any]) -> None:
    client.apply(document)
    assert client.events.send("clicks", columns)["accepted"] == len(columns["user"])


def numbers(client: Client) -> list[int]:
    """Return the versions of the model that the job `quick` makes."""
    return [version["number"] for version in client.models.get("quick")["versions"]]


def end(serve_process: Any, how: str) -> None:
    """Stop the daemon as an operator or a power cut does."""
    if how == "stop":
        serve_process.stop()
    else:
        serve_process.kill()


def seen(client: Client) -> dict[str, Any]:
    """Return what must be the same after a restart: all that the daemon says of its routes."""
    return {
        "route": client.routes.get("checkout"),
        "history": client.routes.history("checkout"),
        "experiment": rounded(client.experiments.get("colours")),
        "performance": client.performance("quick"),
        "aliases": client.models.history("quick"),
    }


def rounded(value: Any) -> Any:
    """Return a document whose floats have 12 digits: an experiment's means depend, in the last
    bit, on the order of its units, which is that of their keys when they are rebuilt.
    """
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.12g}") if isinstance(value, float) else value


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_routes_and_experiments_survive(
    serve_process: Any, trainable: Any, click_columns: Any, how: str
) -> None:
    rows = [{"user": f"u{i}", "amount": 0.1 * i} for i in range(USERS)]
    with Client(serve_process.url, by="alice") as client:
        prepare(client, trainable, click_columns)
        run = client.runs.wait(client.runs.start("quick")["run_id"], timeout_s=DEADLINE_S)
        assert run["state"] == "succeeded", run["error"]
        client.experiments.put("colours", EXPERIMENT)
        arms = [{"name": name, "model": "quick@1"} for name in EXPERIMENT["arms"]]
        client.routes.put("checkout", {"service": "risk", "arms": [{"model": "quick@champion"}]})
        client.routes.put("checkout", {"service": "risk", "arms": arms, "experiment": "colours"})
        first = client.predict("checkout", rows)["predictions"]
        labels = [
            {"prediction_id": p["prediction_id"], "label": i % 2} for i, p in enumerate(first)
        ]
        assert client.feedback(labels)["joined"] == USERS
        before = seen(client)
        assert len(before["history"]["versions"]) == 2
    end(serve_process, how)
    serve_process.start()
    with Client(serve_process.url, by="alice") as client:
        wait_for(lambda: seen(client) == before)  # sums are rebuilt in the background
        again = client.predict("checkout", rows)["predictions"]
        served = [
            [(p["arm"], p["score"], p["version"]) for p in answer] for answer in (first, again)
        ]
        assert served[0] == served[1]
        assert client.routes.roll_back("checkout", 1)["version"] == 3
        assert client.feedback(labels)["stale"] == USERS  # known: nothing counts twice


@pytest.mark.parametrize("moment", ["begun", "published"])
def test_a_run_under_a_killed_daemon_is_taken_up_and_publishes_once(
    serve_process: Any, trainable: Any, click_columns: Any, moment: str
) -> None:
    with Client(serve_process.url) as client:
        prepare(client, trainable, click_columns)
        run_id = client.runs.start("quick")["run_id"]
        child = wait_for(lambda: training_children(serve_process.process))[0]
        if moment == "published":  # anywhere from the first write to the registry to the end
            wait_for(lambda: client.models.list()["models"])
    serve_process.kill()
    wait_for(lambda: not is_training(child))
    serve_process.start()
    with Client(serve_process.url) as client:
        run = client.runs.wait(run_id, timeout_s=DEADLINE_S)
        assert run["state"] == "succeeded", run["error"]
        assert run["attempt"] == 2 or moment == "published"
        assert (run["result"]["version"], run["result"]["deployed"]) == (1, "champion")
        assert numbers(client) == [1]
        assert len(client.models.history("quick", alias="champion")["events"]) == 1
        assert not training_children(serve_process.process)


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_cancelled_runs_stay_cancelled(
    serve_process: Any, trainable: Any, click_columns: Any, how: str
) -> None:
    with Client(serve_process.url) as client:
        prepare(client, trainable, click_columns)
        running = client.runs.start("endless")["run_id"]
        queued = client.runs.start("quick")["run_id"]
        child = wait_for(lambda: training_children(serve_process.process))[0]
        assert client.runs.get(running)["state"] == "running"
        assert client.runs.cancel(queued)["state"] == "cancelled"
        assert client.runs.cancel(running)["state"] == "cancelled"
        assert not is_training(child)  # gone when answered
        for run_id in (queued, running):
            with pytest.raises(ConflictError):
                client.runs.cancel(run_id)
    end(serve_process, how)
    serve_process.start()
    with Client(serve_process.url) as client:
        assert {run["state"] for run in client.runs.list()["runs"]} == {"cancelled"}
        # A worker is free, and takes what comes next.
        run = client.runs.wait(client.runs.start("quick")["run_id"], timeout_s=DEADLINE_S)
        assert run["state"] == "succeeded", run["error"]
        assert numbers(client) == [1]


def test_a_failed_run_is_retried_after_a_restart(
    serve_process: Any, trainable: Any, click_columns: Any
) -> None:
    with Client(serve_process.url) as client:
        client.apply(trainable)
        run_id = client.runs.start("quick")["run_id"]
        failed = client.runs.wait(run_id, timeout_s=DEADLINE_S)
        assert (failed["state"], failed["error"]["code"]) == ("failed", "no_rows")
    serve_process.kill()
    serve_process.start()
    with Client(serve_process.url) as client:
        assert client.runs.get(run_id) == failed  # not taken up by itself
        prepare(client, trainable, click_columns)
        again = client.runs.wait(client.runs.retry(run_id)["run_id"], timeout_s=DEADLINE_S)
        assert again["state"] == "succeeded", again["error"]
        assert (again["deploy"], again["attempt"]) == (failed["deploy"], 1)
        assert client.runs.get(run_id) == failed
        with pytest.raises(ConflictError) as refused:
            client.runs.retry(again["run_id"])
        assert refused.value.code == "run_not_failed"


def test_a_stop_ends_the_child_and_the_run_goes_on_at_the_next_start(
    serve_process: Any, trainable: Any, click_columns: Any
) -> None:
    with Client(serve_process.url) as client:
        prepare(client, trainable, click_columns)
        run_id = client.runs.start("endless")["run_id"]
        child = wait_for(lambda: training_children(serve_process.process))[0]
    serve_process.stop()  # checks that it ended well and that nothing is left
    assert not is_training(child)
    serve_process.start()
    with Client(serve_process.url) as client:
        wait_for(lambda: training_children(serve_process.process))
        run = client.runs.get(run_id)
        assert (run["state"], run["attempt"]) == ("running", 2)
        assert client.runs.cancel(run_id)["state"] == "cancelled"


def test_a_run_lost_too_often_fails(serve_process: Any, trainable: Any, click_columns: Any) -> None:
    with Client(serve_process.url) as client:
        prepare(client, trainable, click_columns)
        run_id = client.runs.start("endless")["run_id"]
    for _ in range(3):
        wait_for(lambda: training_children(serve_process.process))
        serve_process.kill()
        serve_process.start()
    with Client(serve_process.url) as client:
        run = client.runs.get(run_id)
        assert (run["state"], run["attempt"], run["error"]["code"]) == ("failed", 3, "run_lost")
        assert not training_children(serve_process.process)
