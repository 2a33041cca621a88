import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.cli import output
from mlpd.cli.lazy import printable


@pytest.fixture(autouse=True)
def _no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


def test_columns_of_numbers_are_flush_right(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(["name", "rows", "share"], [("a", 5, "1.0%"), ("long", 12345, "10.0%")])
    assert capsys.readouterr().out == (
        "name    rows  share\n"
        "a          5   1.0%\n"
        "long  12,345  10.0%\n"
    )  # fmt: skip


def test_data_is_no_markup_and_no_escape_sequence(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(["x"], [("[bold]:smile:[/bold] \x1b[31m",)])
    assert capsys.readouterr().out == "x\n[bold]:smile:[/bold] \\x1b[31m\n"


def test_without_a_terminal_nothing_is_folded_or_coloured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = "word " * 100
    output.print_pairs({"state": "failed", "text": long})
    assert capsys.readouterr().out == f"state  failed\ntext   {long.rstrip()}\n"


def test_a_table_too_wide_for_the_screen_becomes_pairs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    output.print_table(["first", "second"], [("a" * 20, "b" * 20), ("c", "d")])
    assert capsys.readouterr().out == (
        f"first   {'a' * 20}\nsecond  {'b' * 20}\n\nfirst   c\nsecond  d\n\n"
    )


def test_nothing_to_show_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(["x"], [], empty="No models yet.")
    assert capsys.readouterr().out == "No models yet.\n"


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress("importing", 3, unit="rows") as bar:
        bar.advance(3)
        bar.describe("done")
    assert capsys.readouterr() == ("", "")


def test_json_is_strict(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": b"\x01", 4: ("é",)})
    text = capsys.readouterr().out
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None, "b": [None, 1.5], "c": "0x01", "4": ["é"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"), ([], "-"), ({}, "-"), (True, "yes"), (12345, "12,345"), (0.123456, "0.1235"),
        (123456.7, "123,457"), (["a", 1], "a, 1"), ({"a": None}, "a=-"), (b"\x0f", "0x0f"),
    ],
)  # fmt: skip
def test_values(value: object, shown: str) -> None:
    assert output.show_value(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "-"), (0.0012, "1.2ms"), (1, "1s"), (59.5, "59.5s"), (60, "1m"),
        (119.4, "1m 59s"), (7200, "2h"), (7260, "2h 1m"), (86400 * 3 + 3600, "3d 1h"),
    ],
)  # fmt: skip
def test_durations(seconds: float | None, shown: str) -> None:
    assert output.show_duration(seconds) == shown


@pytest.mark.parametrize(
    ("size", "shown"), [(None, "-"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**42, "4.0 TiB")]
)
def test_sizes(size: float | None, shown: str) -> None:
    assert output.show_bytes(size) == shown


@pytest.mark.parametrize(
    "time", [1_383_300_000_123_456, "2013-11-01T10:00:00.123456Z", "2013-11-01T10:00:00Z"]
)
def test_times_are_utc_to_the_second(time: int | str) -> None:
    assert output.show_time(time) == "2013-11-01 10:00:00Z"


@given(st.text())
def test_what_is_printed_has_no_control_characters(text: str) -> None:
    assert all(c.isprintable() or c == "\n" for c in printable(text))
