import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest
from click.testing import Result

from mlpd.cli import importing, tables
from mlpd.client import Client
from mlpd.client.requests import Request
from mlpd.client.scatter import Scatter
from mlpd.core.errors import UnavailableError

Mlpd = Callable[..., Result]
Sample = Callable[[int], pl.DataFrame]

ROW = '{"event_time": "2013-02-01T10:00:00Z", "user": "z", "amount": 1.5}'


@pytest.fixture
def sample(command_line: ModuleType) -> Sample:
    """Gives so many clicks as a frame."""
    found: Sample = command_line.events
    return found


@pytest.fixture(scope="module")
def store(
    tmp_path_factory: pytest.TempPathFactory, folder: Path, command_line: ModuleType
) -> Iterator[Mlpd]:
    """Runs a command against a daemon that has the definitions and takes any events."""
    with command_line.serve(tmp_path_factory.mktemp("store") / "data") as url:
        run = command_line.commands(url)
        assert run("apply", folder, "--yes").exit_code == 0
        yield run


def imported(run: Mlpd, *arguments: object) -> Any:
    done = run("events", "import", *arguments, "--json")
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_events_given_and_piped_are_stored(store: Mlpd) -> None:
    done = store("events", "send", "clicks", ROW, ROW)
    assert done.exit_code == 0
    assert done.stdout.startswith("2 stored in clicks (sequence ")
    done = store("events", "send", "clicks", "--json", input=f"{ROW}\n\n{ROW}\n{ROW}\n")
    assert json.loads(done.stdout)["accepted"] == 3


def test_the_same_key_stores_nothing_again(store: Mlpd) -> None:
    store("events", "send", "clicks", ROW, "--key", "a")
    done = store("events", "send", "clicks", ROW, "--key", "a")
    assert "as before: this key was used already" in done.stdout


def test_refused_rows_are_named_and_exit_1(store: Mlpd) -> None:
    naive = ROW.replace("Z", "")
    done = store("events", "send", "clicks", ROW, naive)
    assert done.exit_code == 1
    assert done.stdout.startswith("1 stored in clicks")
    assert "naive_time" in done.stdout
    assert "Refused: 1" in done.stdout


@pytest.mark.parametrize(
    ("event", "code"),
    [("{", "malformed_event"), ("[1]", "malformed_event"), ('{"x": 1}', "unknown_column")],
)
def test_what_is_no_event_is_refused(mlpd: Mlpd, event: str, code: str) -> None:
    done = mlpd("events", "send", "clicks", event)
    assert done.exit_code == 1
    assert f"[{code}]" in done.stderr


def test_nothing_to_send_is_wrong_usage(mlpd: Mlpd) -> None:
    assert mlpd("events", "send", "clicks", input="").exit_code == 2


@pytest.mark.parametrize("form", ["parquet", "csv", "ndjson"])
def test_every_format_brings_the_same_features(
    store: Mlpd, tmp_path: Path, form: str, sample: Sample
) -> None:
    rows = sample(500)
    path = tmp_path / f"clicks.{form}"
    if form == "parquet":
        rows.write_parquet(path, row_group_size=70)
    else:
        times = ("event_time", "known_at", "shown_at")
        text = rows.with_columns(pl.col(*times).dt.strftime("%Y-%m-%dT%H:%M:%S%:z"))
        text.write_csv(path) if form == "csv" else text.write_ndjson(path)
    done = imported(store, path, "--source", "clicks")
    assert (done["rows"], done["accepted"], done["rejected"]) == (500, 500, 0), done["reasons"]
    # "7" is text, also where a file might take it for a number.
    read = store("features", "read", "profile.amount", "user=7", "--json")
    assert json.loads(read.stdout)["columns"] == {"profile.amount": [None]}
    assert json.loads(read.stdout)["statuses"] == {"profile.amount": [3]}


def test_columns_may_have_other_names_and_unknown_ones_are_left_out(
    store: Mlpd, tmp_path: Path, sample: Sample
) -> None:
    names = {"event_time": "at", "known_at": "seen"}
    sample(10).rename(names).with_columns(x=1).write_parquet(tmp_path / "a.parquet")
    arguments = ("--source", "clicks", "--timestamp", "at", "--known-at", "seen")
    done = imported(store, tmp_path / "a.parquet", *arguments)
    assert (done["accepted"], done["ignored"]) == (10, ["x"])
    text = store("events", "import", tmp_path / "a.parquet", *arguments)
    assert "no such columns: x" in text.stderr


def test_a_column_may_tell_a_time_and_be_one_of_the_source(
    store: Mlpd, tmp_path: Path, sample: Sample
) -> None:
    """Rows that were known when they were shown still say when that was."""
    sample(10).drop("known_at").write_parquet(tmp_path / "a.parquet")
    done = imported(store, tmp_path / "a.parquet", "--source", "clicks", "--known-at", "shown_at")
    assert done["accepted"] == 10
    out = tmp_path / "out.parquet"
    assert store("events", "export", "clicks", out).exit_code == 0
    shown = pl.read_parquet(out).sort("__sequence").tail(10)
    assert shown["shown_at"].null_count() == 0
    assert (shown["shown_at"] == shown["known_at"]).all()


def test_an_import_says_how_many_rows_were_clamped(
    store: Mlpd, tmp_path: Path, sample: Sample
) -> None:
    ahead = pl.col("known_at") - pl.duration(minutes=pl.int_range(pl.len()) % 2)
    sample(10).with_columns(known_at=ahead).write_parquet(tmp_path / "a.parquet")
    done = imported(store, tmp_path / "a.parquet", "--source", "clicks")
    assert (done["accepted"], done["clamped"]) == (10, 5)
    text = store("events", "import", tmp_path / "a.parquet", "--source", "clicks").stdout
    assert "of which clamped  5" in text


def test_importing_again_stores_nothing_twice(
    store: Mlpd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: Sample
) -> None:
    monkeypatch.setattr(importing, "BATCH_ROWS", 40)
    monkeypatch.setattr(tables, "PART_BATCHES", 2)
    sample(205).write_parquet(tmp_path / "a.parquet")
    first = imported(store, tmp_path / "a.parquet", "--source", "clicks")
    before = json.loads(store("status", "--json").stdout)["sequence"]
    second = imported(store, tmp_path / "a.parquet", "--source", "clicks")
    assert (first["accepted"], first["replayed"]) == (205, 0)
    assert (second["accepted"], second["replayed"]) == (205, 205)
    assert json.loads(store("status", "--json").stdout)["sequence"] == before


def test_an_import_stopped_half_way_goes_on_where_it_stopped(
    store: Mlpd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: Sample
) -> None:
    monkeypatch.setattr(importing, "BATCH_ROWS", 40)
    sample(200).write_parquet(tmp_path / "a.parquet")
    before = json.loads(store("status", "--json").stdout)["sequence"]
    send = Client.send
    sent: list[str] = []

    def stop_after_two(client: Client, request: Request | Scatter) -> object:
        sent.append(request.path if isinstance(request, Request) else "")
        if sum("events" in path for path in sent) > 2:
            raise UnavailableError("pulled the plug")
        return send(client, request)

    with monkeypatch.context() as patch:
        patch.setattr(Client, "send", stop_after_two)
        assert (
            store("events", "import", tmp_path / "a.parquet", "--source", "clicks").exit_code == 1
        )
    done = imported(store, tmp_path / "a.parquet", "--source", "clicks")
    assert (done["accepted"], done["replayed"]) == (200, 80)
    assert json.loads(store("status", "--json").stdout)["sequence"] == before + 200


def test_refused_rows_are_counted_by_their_place_in_the_file(
    store: Mlpd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: Sample
) -> None:
    monkeypatch.setattr(importing, "BATCH_ROWS", 10)
    later = pl.when(pl.int_range(pl.len()).is_in([7, 23])).then(
        pl.col("event_time") + pl.duration(days=40_000)
    )
    rows = sample(30).with_columns(event_time=later.otherwise(pl.col("event_time")))
    rows.write_parquet(tmp_path / "a.parquet")
    done = store("events", "import", tmp_path / "a.parquet", "--source", "clicks", "--json")
    answer = json.loads(done.stdout)
    assert done.exit_code == 1
    assert (answer["accepted"], answer["rejected"]) == (28, 2)
    assert [reason["index"] for reason in answer["reasons"]] == [7, 23]


def test_a_batch_refused_whole_may_be_sent_again_under_new_definitions(
    empty: Mlpd, tmp_path: Path, folder: Path, sample: Sample
) -> None:
    sample(20).with_columns(known_at=pl.lit(None, pl.Int64)).write_parquet(tmp_path / "a.parquet")
    arguments = ("events", "import", tmp_path / "a.parquet", "--source", "clicks", "--json")
    definitions = tmp_path / "definitions"
    definitions.mkdir()
    text = (folder / "clicks.py").read_text()
    (definitions / "clicks.py").write_text(text)
    assert empty("apply", definitions, "--yes").exit_code == 0
    assert json.loads(empty(*arguments).stdout)["rejected"] == 20
    assert json.loads(empty(*arguments).stdout)["rejected"] == 20
    delayed = text.replace('    "clicks",\n', '    "clicks",\n    delay="1m",\n')
    (definitions / "clicks.py").write_text(delayed)
    assert empty("apply", definitions, "--yes").exit_code == 0
    first, second = (json.loads(empty(*arguments).stdout) for _ in range(2))
    assert (first["accepted"], first["replayed"]) == (20, 0)
    assert (second["accepted"], second["replayed"]) == (20, 20)


@pytest.mark.parametrize(
    ("change", "options", "code"),
    [
        (lambda f: f.drop("known_at"), (), "missing_known_at"),
        (lambda f: f.drop("event_time"), (), "unknown_column"),
        (lambda f: f, ("--known-at", "nothing"), "unknown_column"),
        (
            lambda f: f.with_columns(pl.col("event_time").dt.replace_time_zone(None)),
            (),
            "naive_time",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_whole(
    mlpd: Mlpd,
    tmp_path: Path,
    change: Callable[[pl.DataFrame], pl.DataFrame],
    options: list[str],
    code: str,
    sample: Sample,
) -> None:
    change(sample(10)).write_parquet(tmp_path / "a.parquet")
    done = mlpd("events", "import", tmp_path / "a.parquet", "--source", "clicks", *options)
    assert done.exit_code == 1
    assert f"[{code}]" in done.stderr


def test_an_unknown_source_or_format_is_refused(mlpd: Mlpd, tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    path.write_text("?")
    done = mlpd("events", "import", path, "--source", "clicks")
    assert "[unknown_format]" in done.stderr
    done = mlpd("events", "import", path, "--source", "cliks")
    assert "unknown source 'cliks'; known: clicks, visits [unknown_source]" in done.stderr


def test_a_source_with_a_delay_needs_no_known_at_and_news_needs_none_either(
    store: Mlpd, tmp_path: Path, sample: Sample
) -> None:
    rows = sample(10).drop("known_at")
    rows.select("event_time", "user").write_parquet(tmp_path / "visits.parquet")
    rows.write_parquet(tmp_path / "clicks.parquet")
    done = imported(store, tmp_path / "visits.parquet", "--source", "visits")
    assert done["accepted"] == 10
    arguments = (tmp_path / "clicks.parquet", "--source", "clicks", "--known-now")
    assert imported(store, *arguments)["accepted"] == 10
    both = store("events", "import", *arguments, "--known-at", "shown_at")
    assert both.exit_code == 2
