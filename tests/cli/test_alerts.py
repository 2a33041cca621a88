"""`mlpd alerts` and `mlpd quality` against daemons of their own."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from click.testing import Result

Mlpd = Callable[..., Result]


def test_silences_are_made_listed_and_ended(empty: Mlpd) -> None:
    listed = empty("alerts", "list")
    assert listed.exit_code == 0, listed.output
    assert "Nothing is wrong." in listed.stdout
    made = empty(
        "alerts", "silence", "model=risk", "feature=a*", "--for", "2h", "--why", "moved", "--json"
    )
    assert made.exit_code == 0, made.output
    silence = json.loads(made.stdout)
    shown = empty("alerts", "list").stdout
    assert silence["id"] in shown
    assert "model=risk feature=a*" in shown
    assert "moved" in shown
    assert empty("alerts", "unsilence", silence["id"]).exit_code == 0
    gone = empty("alerts", "unsilence", silence["id"])
    assert (gone.exit_code, "[unknown_silence]" in gone.stderr) == (1, True)


def test_wrong_matchers_and_durations_are_refused(empty: Mlpd) -> None:
    for arguments, code in (
        (["model", "--for", "1h"], "[invalid_matcher]"),
        (["model=a", "--for", "soon"], "[invalid_duration]"),
        (["model=a", "--for", "1000d"], "[silence_too_long]"),
    ):
        refused = empty("alerts", "silence", *arguments)
        assert refused.exit_code == 1
        assert code in refused.stderr
    assert empty("alerts", "silence", "--for", "1h").exit_code == 2


def test_a_sink_that_takes_nothing_gives_exit_code_1(
    tmp_path: Path, command_line: ModuleType
) -> None:
    config = tmp_path / "mlpd.toml"
    config.write_text(
        "[alerts]\n"
        'targets = ["127.0.0.1"]\n'
        'webhook_url = "http://127.0.0.1:9/"\n'  # private_networks is empty
    )
    with command_line.serve(tmp_path / "data", "--config", str(config)):
        mlpd = command_line.commands(f"unix:{os.path.relpath(tmp_path / 'data' / 'mlpd.sock')}")
        assert mlpd("alerts", "test", "--sink", "log").exit_code == 0
        tried = mlpd("alerts", "test")
        assert tried.exit_code == 1
        assert "127.0.0.1 has the address 127.0.0.1, which is not public" in tried.stdout
        assert "failed" in tried.stdout


def test_the_quality_of_sources_is_shown_and_refused_rows_are_masked(
    tmp_path: Path, command_line: ModuleType, folder: Path
) -> None:
    with command_line.serve(tmp_path / "data"):
        mlpd = command_line.commands(f"unix:{os.path.relpath(tmp_path / 'data' / 'mlpd.sock')}")
        assert "none is defined" in mlpd("quality").stdout
        assert mlpd("apply", folder, "--yes").exit_code == 0
        bad = '{"event_time": "2013-01-01 10:00", "user": "Jane"}'
        mlpd("events", "send", "clicks", bad)
        shown = mlpd("quality", "--samples").stdout
        assert "naive_time: 1" in shown
        assert "user: Aaaa" in shown
        assert "Jane" not in shown
        assert json.loads(mlpd("quality", "--json").stdout)["sources"][0]["rejected"] == 1
