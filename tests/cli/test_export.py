import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest
from click.testing import Result

from mlpd import Source
from mlpd.cli import events, exporting
from mlpd.client import Client
from mlpd.core.definitions import build_document

Mlpd = Callable[..., Result]
COLUMNS = ["event_time", "known_at", "__sequence", "user", "amount", "age", "count", "bought"]
COLUMNS += ["shown_at", "__deleted"]
ROWS = 150


@pytest.fixture(scope="module")
def url(
    tmp_path_factory: pytest.TempPathFactory, folder: Path, command_line: ModuleType
) -> Iterator[str]:
    """A daemon with 150 clicks."""
    directory = tmp_path_factory.mktemp("exported")
    with command_line.serve(directory / "data") as url:
        run = command_line.commands(url)
        assert run("apply", folder, "--yes").exit_code == 0
        sample: pl.DataFrame = command_line.events(ROWS)
        sample.write_parquet(directory / "clicks.parquet")
        imported = run("events", "import", directory / "clicks.parquet", "--source", "clicks")
        assert imported.exit_code == 0
        yield url


@pytest.fixture(scope="module")
def other(
    tmp_path_factory: pytest.TempPathFactory, folder: Path, command_line: ModuleType
) -> Iterator[str]:
    """A daemon that takes what was exported."""
    with command_line.serve(tmp_path_factory.mktemp("imported") / "data") as url:
        assert command_line.commands(url)("apply", folder, "--yes").exit_code == 0
        yield url


@pytest.fixture
def run(url: str, command_line: ModuleType) -> Mlpd:
    found: Mlpd = command_line.commands(url)
    return found


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seventy rows a page, so that an export takes several."""
    monkeypatch.setattr(exporting, "PAGE_ROWS", 70)
    monkeypatch.setattr(events, "TAIL_ROWS", 70)


def exported(run: Mlpd, path: Path, *options: str) -> Any:
    done = run("events", "export", "clicks", path, *options, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def read(path: Path) -> pl.DataFrame:
    if path.suffix == ".parquet":
        return pl.read_parquet(path)
    times = pl.col("event_time", "known_at", "shown_at").str.to_datetime(time_zone="UTC")
    if path.suffix == ".csv":
        return pl.read_csv(path).with_columns(times)
    return pl.read_ndjson(path).with_columns(times)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "ndjson"])
def test_every_form_holds_every_event_and_can_be_imported_again(
    run: Mlpd, other: str, command_line: ModuleType, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"clicks.{suffix}"
    done = exported(run, path)
    assert (done["rows"], done["source"], done["file"]) == (ROWS, "clicks", str(path))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    frame = read(path)
    assert frame.columns == COLUMNS
    sample: pl.DataFrame = command_line.events(ROWS)
    for name in sample.columns:
        assert frame[name].cast(sample[name].dtype).equals(sample[name]), name
    assert frame["__sequence"].is_sorted()
    with Client(other) as client:
        before = client.status()["sequence"]
        imported = command_line.commands(other)(
            "events", "import", path, "--source", "clicks", "--json"
        )
        assert json.loads(imported.stdout)["accepted"] == ROWS
        again = client.events.page_frame("clicks", after=before)
    kept = again.drop("__sequence")
    assert kept.equals(frame.select(kept.columns).cast(dict(kept.schema)))


def test_times_bound_an_export_and_stdout_takes_text(run: Mlpd, tmp_path: Path) -> None:
    whole = tmp_path / "whole.parquet"
    exported(run, whole)
    times = read(whole)["event_time"].sort()
    start, end = times[50], times[100]
    span = ("--start", start.isoformat(), "--end", end.isoformat())
    done = run("events", "export", "clicks", "-", "--format", "csv", *span)
    found = pl.read_csv(io.StringIO(done.stdout))["event_time"].str.to_datetime(time_zone="UTC")
    wanted = [time for time in times if start <= time < end]
    assert sorted(found.to_list()) == wanted
    nothing = exported(run, tmp_path / "none.csv", "--start", "2999-01-01T00:00:00Z")
    assert nothing["rows"] == 0
    assert (tmp_path / "none.csv").read_text().strip() == ",".join(COLUMNS)


def test_what_cannot_be_written_is_refused_and_leaves_nothing(run: Mlpd, tmp_path: Path) -> None:
    for arguments, code in (
        (("clicks", tmp_path / "a.txt"), "unknown_format"),
        (("clicks", "-", "--format", "parquet"), "unknown_format"),
        (("nothing", tmp_path / "a.csv"), "unknown_source"),
        (("clicks", tmp_path / "a.csv", "--start", "2013-01-01"), "naive_time"),
    ):
        done = run("events", "export", *arguments)
        assert (done.exit_code, f"[{code}]" in done.stderr) == (1, True), done.output
    assert run("events", "export", "clicks", "-", "--json").exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_broken_export_leaves_no_file(
    run: Mlpd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "_as_cells", fail)
    assert run("events", "export", "clicks", tmp_path / "a.csv").exit_code != 0
    assert list(tmp_path.iterdir()) == []


def test_every_type_goes_through_text_and_back(
    command_line: ModuleType, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    when = 1_356_998_400_000_001
    schema = {"raw": "bytes", "at_once": "timestamp", "k": "int64", "note": "string"}
    schema |= {"xs": "list[float64]", "v": "vector[float32, 2]", "tags": "list[bytes]"}
    rows: list[dict[str, Any]] = [
        {"raw": b"\xff\x00", "at_once": when, "k": 2**53 + 1, "note": 'é,"\n', "xs": [0.1, -0.0]},
        {"raw": b"", "xs": [], "v": [1.5, 2.5], "tags": [b"\x00", b""]},
        {"note": "0x", "k": -1, "__deleted": True},
    ]
    sent = [{"at": when + i, "known_at": when + i, **row} for i, row in enumerate(rows)]
    document = build_document([Source("things", timestamp="at", schema=schema)])
    with command_line.serve(tmp_path / "data") as url, Client(url) as client:
        client.apply(document)
        client.events.send("things", sent)
        wanted = client.events.page_frame("things").drop("__sequence")
        run = command_line.commands(url)
        for suffix in ("parquet", "csv", "ndjson"):
            path = tmp_path / f"things.{suffix}"
            assert run("events", "export", "things", path).exit_code == 0
        lines = run("events", "tail", "things", "--after", "0", "-n", "3").stdout.splitlines()
        assert [json.loads(line)["raw"] for line in lines] == ["0xff00", "0x", None]
        assert json.loads(lines[0])["at_once"] == "2013-01-01T00:00:00.000001Z"
    assert wanted["k"].to_list() == [2**53 + 1, None, -1]
    directory = tmp_path_factory.mktemp("again")
    with command_line.serve(directory / "data") as url, Client(url) as client:
        client.apply(document)
        run = command_line.commands(url)
        after = 0
        for suffix in ("parquet", "csv", "ndjson"):
            path = tmp_path / f"things.{suffix}"
            done = run("events", "import", path, "--source", "things", "--json")
            assert json.loads(done.stdout)["accepted"] == 3, done.output
            found = client.events.page_frame("things", after=after)
            after = found["__sequence"][-1]
            assert found.drop("__sequence").to_dicts() == wanted.to_dicts(), suffix


def test_tail_prints_what_is_there_after_a_sequence(run: Mlpd) -> None:
    done = run("events", "tail", "clicks", "--after", "0", "-n", "75")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 75
    assert list(lines[0]) == COLUMNS
    assert lines[0]["event_time"].endswith("Z")
    sequences = [line["__sequence"] for line in lines]
    assert sequences == sorted(set(sequences))


def test_tail_follows_what_comes(command_line: ModuleType, tmp_path: Path, folder: Path) -> None:
    with command_line.serve(tmp_path / "data") as url:
        assert command_line.commands(url)("apply", folder, "--yes").exit_code == 0
        follow(url)


def follow(url: str) -> None:
    """Send events until `mlpd events tail` has shown three of them."""
    command = [sys.executable, "-m", "mlpd", "events", "tail", "clicks", "-n", "3", "--url", url]
    with Client(url) as client, subprocess.Popen(command, stdout=subprocess.PIPE) as tail:
        assert tail.stdout is not None
        read = iter(tail.stdout.readline, b"")
        try:
            lines: list[bytes] = []
            while len(lines) < 3:
                # Until it follows, what is sent is no news for it.
                client.events.send("clicks", [{"event_time": 1_356_998_400_000_000, "user": "z"}])
                try:
                    tail.wait(0.2)
                except subprocess.TimeoutExpired:
                    continue
                lines = [*read]
            assert tail.returncode == 0
        finally:
            tail.kill()
    assert [json.loads(line)["user"] for line in lines] == ["z"] * 3
