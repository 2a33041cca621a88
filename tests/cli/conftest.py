"""A real daemon for the command line: a process of `mlpd serve`, filled through commands."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import polars as pl
import pytest
from click.testing import CliRunner, Result

from mlpd.cli import main
from mlpd.client import Client

START_US = 1_356_998_400_000_000  # 2013-01-01T00:00:00Z
ROWS = 3000

DEFINITIONS = """
from mlpd import Aggregate, Entity, FeatureService, FeatureView, Job, Source, Spine, WindowView

user = Entity("user")
clicks = Source(
    "clicks",
    timestamp="event_time",
    schema={
        "user": "string", "amount": "float64", "age": "float64", "count": "int64",
        "bought": "bool", "shown_at": "timestamp",
    },
)
visits = Source("visits", timestamp="event_time", delay="1h", schema={"user": "string"})
spend = WindowView("spend", user, clicks, ["1h", "1d"], [Aggregate.mean("amount")])
profile = FeatureView("profile", user, clicks, ["amount"], ttl="3h")
risk = FeatureService("risk", [user, spend, profile], request={"age": "float64", "count": "int64"})
train = Job(
    "risk", risk, Spine(clicks, time="shown_at"), label="bought", categorical=["user"],
    params={"min_data_in_leaf": 5}, num_boost_round=10, gate={"auc": 0.5}, deploy="champion",
)
"""

Mlpd = Callable[..., Result]


@contextmanager
def serve(directory: Path, *options: str) -> Iterator[str]:
    """Run `mlpd serve` on a free port; gives the URL it tells."""
    command = [sys.executable, "-m", "mlpd", "serve", "--data-dir", str(directory), "--port", "0"]
    command += options
    with (directory.parent / f"{directory.name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "ready at http://" in line, line
        yield line.split(" at ")[1].split()[0]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        process.stdout.close()
    assert process.returncode == 0


def events(rows: int = ROWS) -> pl.DataFrame:
    """Clicks of three users, one a minute, known as they happened."""
    step = pl.int_range(rows, eager=True)
    times = (START_US + step * 60_000_000).cast(pl.Datetime("us", "UTC"))
    amount = (step * 37 % 101) / 10.0
    return pl.DataFrame(
        {
            "event_time": times,
            "known_at": times,
            "user": (step % 3).replace_strict({0: "a", 1: "b", 2: "7"}),
            "amount": amount,
            "age": (step * 17 % 29).cast(pl.Float64),
            "count": step % 5,
            "bought": (amount + (step * 17 % 29)) > 19,
            "shown_at": times,
        }
    )


def commands(url: str) -> Mlpd:
    """Return a function that runs a command in this process, against the daemon at `url`."""
    runner = CliRunner(env={"MLPD_URL": url, "COLUMNS": "200"})

    def run(*arguments: object, **options: object) -> Result:
        return runner.invoke(main, list(map(str, arguments)), **options)

    return run


@pytest.fixture(scope="session")
def command_line() -> ModuleType:
    """This module: `serve`, `commands` and `events` for fixtures elsewhere."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A definitions folder."""
    directory = tmp_path_factory.mktemp("definitions")
    (directory / "clicks.py").write_text(DEFINITIONS)
    return directory


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[str]:
    """A daemon with events, a trained champion, a route and labelled predictions."""
    directory = tmp_path_factory.mktemp("cli")
    clicks = directory / "clicks.parquet"
    events().write_parquet(clicks)
    with serve(directory / "data") as address:
        mlpd = commands(address)
        for arguments in (
            ("apply", folder, "--yes"),
            ("events", "import", clicks, "--source", "clicks"),
            ("jobs", "run", "risk", "--follow"),
            ("routes", "set", "risk", "--service", "risk", "--arm", "risk@champion"),
        ):
            done = mlpd(*arguments)
            assert done.exit_code == 0, done.output
        with Client(address) as client:
            rows = events(300).select("user", "age", "count").to_dicts()
            answer = client.predict("risk", rows)
            client.feedback(
                [
                    {"prediction_id": p["prediction_id"], "label": i % 2}
                    for i, p in enumerate(answer["predictions"])
                ]
            )
        yield address


@pytest.fixture(scope="session")
def mlpd(url: str) -> Mlpd:
    """Runs a command against the filled daemon."""
    return commands(url)


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Mlpd]:
    """Runs a command against a daemon of its own, without definitions, through its socket."""
    with serve(tmp_path / "data"):
        yield commands(f"unix:{os.path.relpath(tmp_path / 'data' / 'mlpd.sock')}")
