"""The job `quick`: the clicks it trains on, runs of it, and a route that serves its model."""

import copy
from typing import Any

from mlpd.daemon.app import Daemon
from mlpd.features.ingest import parse_batch
from mlpd.training.runs import Run, RunState
from tests.conftest import until


async def send_clicks(daemon: Daemon, columns: dict[str, Any]) -> None:
    """Store clicks, all of them."""
    source = daemon.state.catalog.definitions.source("clicks")
    batch = parse_batch(source, columns, now_us=daemon.clock())
    assert (await daemon.ingest.ingest([batch])).accepted == len(columns["user"])


async def prepare(daemon: Daemon, document: dict[str, Any], columns: dict[str, Any]) -> None:
    """Apply definitions and store the clicks that their jobs train on."""
    await daemon.definitions.apply(document)
    await send_clicks(daemon, columns)


async def until_ended(daemon: Daemon, run: Run) -> Run:
    """Wait until a run ended, and its worker is free again; return it."""
    await until(lambda: daemon.runs.get(run.run_id).state.finished and not daemon.runs.busy)
    return daemon.runs.get(run.run_id)


async def run_job(daemon: Daemon, job: str = "quick") -> Run:
    """Run a job; return the run as it ended, well or not."""
    return await until_ended(daemon, await daemon.runs.enqueue(job, trigger="test"))


async def train(daemon: Daemon, job: str = "quick") -> Run:
    """Run a job that must succeed."""
    run = await run_job(daemon, job)
    assert run.state is RunState.SUCCEEDED, run.error
    return run


async def serve_model(daemon: Daemon, document: Any, columns: Any) -> None:
    """Train the champion of `quick` and serve it by the route `risk`."""
    await prepare(daemon, document, columns)
    await train(daemon)
    arms = [{"model": "quick@champion"}]
    await daemon.routes.put("risk", {"service": "risk", "arms": arms}, by="test")


def with_job(document: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return definitions whose job `quick` has other fields; those given are left as they are."""
    changed = copy.deepcopy(document)
    changed["jobs"]["quick"].update(changes)
    return changed
