"""The steps of the main job, each what a user would do with the client."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from mlpd.cli.definitions import conf_folder, load_folder
from mlpd.cli.demo.flights import EventTables
from mlpd.cli.demo.timeline import backfill_batches
from mlpd.cli.output import Bar, progress
from mlpd.client import Client
from mlpd.core.errors import InternalError, MlpdError

MODEL: Final = "flight-risk"
ROUTE: Final = "flight-risk"
SERVICE: Final = "flight_risk"
EXPERIMENT: Final = "flight-risk-retrained"
CHAMPION: Final = "champion"
CHALLENGER: Final = "challenger"
JOB: Final = "flight-risk"
ABLATION_JOB: Final = "schedule-only"
"""Trains on the request fields alone: what one would have without a feature store."""

BATCH_ROWS: Final = 20_000
"""Rows per request of the backfill: 20,000 take 2 MB and 0.1 s."""
PLANNED_UNITS: Final = 3_300
"""Aircraft that fly in a month."""


@dataclass(frozen=True, slots=True)
class Backfill:
    """Events imported, and the seconds that it took until they were durable."""

    events: int
    duration_s: float


def apply_definitions(client: Client) -> None:
    """Make conf/flights what the daemon runs."""
    client.apply(load_folder(conf_folder()))


def backfill(client: Client, events: EventTables, start_us: int, end_us: int) -> Backfill:
    """Import the events known in [start, end) source by source, each with its known_at."""
    total = sum(frame.height for frame in events.by_source().values())
    sent, duration_s = 0, 0.0
    with progress("importing January to September", total * 3 / 4, unit="events") as bar:
        for source, columns in backfill_batches(events, start_us, end_us, BATCH_ROWS):
            started = time.perf_counter()
            answer = client.events.send(source, columns)
            duration_s += time.perf_counter() - started
            if answer["rejected"]:
                raise InternalError(f"events of {source} were refused: {answer['rejected'][:3]}")
            sent += answer["accepted"]
            bar.advance(answer["accepted"])
    return Backfill(sent, duration_s)


def start_run(client: Client, job: str) -> str:
    """Queue a run of a job that deploys nothing; returns its id."""
    run_id: str = client.runs.start(job, deploy="none")["run_id"]
    return run_id


def train(client: Client, job: str, text: str) -> dict[str, Any]:
    """Run a job to its end and return its result."""
    return finish_run(client, start_run(client, job), text)


def finish_run(client: Client, run_id: str, text: str) -> dict[str, Any]:
    """Wait for a run and return its result; raises what it failed with."""
    with progress(text, None, unit="rounds") as bar:
        run: dict[str, Any] = client.runs.wait(
            run_id, on_progress=lambda run: _describe(bar, text, run)
        )
    if run["state"] == "succeeded":
        result: dict[str, Any] = run["result"]
        return result
    error = run["error"] or {"message": f"it was {run['state']}", "code": "run_failed"}
    raise MlpdError(
        f"run {run_id} of job {run['job']}: {error['message']}",
        code=error["code"],
        hint=f"mlpd runs log {run_id} tells more.",
    )


def start_serving(client: Client, version: int) -> None:
    """Make a version the champion and open the route that serves it."""
    client.models.move_alias(MODEL, CHAMPION, version, why="first model of the demo")
    client.routes.put(ROUTE, {"service": SERVICE, "arms": [_arm(CHAMPION)]})


def start_shadow(client: Client, version: int) -> None:
    """Let a version score what the champion serves, unseen."""
    client.models.move_alias(MODEL, CHALLENGER, version, why="retrained on newer data")
    shadows = [f"{MODEL}@{CHALLENGER}"]
    client.routes.put(ROUTE, {"service": SERVICE, "arms": [_arm(CHAMPION)], "shadows": shadows})


def start_experiment(client: Client) -> None:
    """Give half of the aircraft to the challenger, each aircraft to one arm for good."""
    client.experiments.put(
        EXPERIMENT,
        {
            "unit": "tailnum",
            "arms": {CHAMPION: 1.0, CHALLENGER: 1.0},
            "control": CHAMPION,
            "metrics": [
                {"name": "correct", "kind": "proportion", "better": "higher"},
                {"name": "squared_error", "kind": "mean", "better": "lower"},
            ],
            "planned_units": PLANNED_UNITS,
        },
    )
    client.routes.put(
        ROUTE,
        {
            "service": SERVICE,
            "arms": [_arm(CHAMPION), _arm(CHALLENGER)],
            "experiment": EXPERIMENT,
        },
    )


def measure_latency(client: Client, rows: list[dict[str, Any]], at_us: int) -> list[float]:
    """Return the milliseconds of single-row requests, one after the other, ascending.

    They ask for the champion, so that they take no part in the experiment.
    """
    found_ms = []
    for row in rows:
        started = time.perf_counter()
        answer = client.predict(ROUTE, [row], at=at_us, arm=CHAMPION)
        found_ms.append((time.perf_counter() - started) * 1e3)
        if len(answer["predictions"]) != 1:
            raise InternalError(f"one row asked for, got {answer}")
    return sorted(found_ms)


def _arm(alias: str) -> dict[str, Any]:
    return {"name": alias, "model": f"{MODEL}@{alias}"}


def _describe(bar: Bar, text: str, run: Mapping[str, Any]) -> None:
    now = run["progress"]
    step = now.get("step", run["state"])
    rounds = f" {now['round']}/{now['rounds']}" if "round" in now else ""
    bar.describe(f"{text}: {step}{rounds}")
