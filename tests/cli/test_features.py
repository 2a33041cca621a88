import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import polars as pl
import pytest
from click.testing import Result

Mlpd = Callable[..., Result]


def test_views_services_and_their_features_are_listed(mlpd: Mlpd) -> None:
    text = mlpd("features", "list").stdout
    assert "spend" in text
    assert "age, count" in text
    answer = json.loads(mlpd("features", "list", "--json").stdout)
    assert [view["name"] for view in answer["views"]] == ["profile", "spend"]
    assert answer["services"] == [
        {"name": "risk", "features": 6, "request": {"age": "float64", "count": "int64"}}
    ]
    vector = json.loads(mlpd("features", "list", "--service", "risk", "--json").stdout)["vector"]
    assert vector[0] == {"feature": "user", "type": "string"}
    assert vector[-1] == {"feature": "count", "type": "int64"}
    view = mlpd("features", "list", "--view", "spend").stdout
    assert "amount_mean_1h  float64" in view


def test_a_read_shows_values_and_why_they_are_or_are_not_there(mlpd: Mlpd) -> None:
    done = mlpd("features", "read", "risk", "user=a", "age=2.5", "count=")
    assert done.exit_code == 0
    lines = {line.split()[0]: line.split()[1:3] for line in done.stdout.splitlines() if line}
    assert lines["profile.amount"] == ["-", "stale"]
    assert lines["spend.amount_mean_1h"] == ["-", "null"]
    assert lines["age"] == ["2.5", "present"]
    assert lines["count"] == ["-", "null"]


def test_a_stale_value_becomes_what_on_stale_says(mlpd: Mlpd) -> None:
    arguments = ("features", "read", "profile.amount", "user=a")
    for choice, shown in (
        ((), False),
        (("--on-stale", "null"), False),
        (("--on-stale", "value"), True),
    ):
        answer = json.loads(mlpd(*arguments, *choice, "--json").stdout)
        assert answer["statuses"] == {"profile.amount": [3]}
        assert (answer["columns"]["profile.amount"][0] is not None) == shown
    refused = mlpd(*arguments, "--on-stale", "error")
    assert (refused.exit_code, "[stale_feature]" in refused.stderr) == (1, True)
    assert mlpd(*arguments, "--on-stale", "maybe").exit_code == 2


def test_single_features_are_read_at_a_given_moment(mlpd: Mlpd) -> None:
    moment = ("--at", "2113-01-01T00:00:00Z")
    done = mlpd("features", "read", "profile.amount,user", "user=a", *moment, "--json")
    answer = json.loads(done.stdout)
    assert answer["columns"] == {"profile.amount": [None], "user": ["a"]}
    assert answer["t_us"] == 4_512_672_000_000_000


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nothing", "user=a"], "unknown_service"),
        (["profil.amount", "user=a"], "unknown_view"),
        (["profile.amuont", "user=a"], "unknown_feature"),
        (["risk", "user=a"], "missing_request_field"),
        (["risk", "usr=a"], "unknown_field"),
        (["risk", "user"], "unknown_field"),
        (["risk", "user=a", "age=old", "count=1"], "wrong_type"),
        (["risk", "user=a", "age=1", "count=1.5"], "wrong_type"),
        (["risk", "user=a", "age=true", "count=1"], "wrong_type"),
        (["risk", "user=a", "age=1", "count=1", "--at", "2013-01-01T00:00:00Z"], "at_in_the_past"),
        (["risk", "user=a", "age=1", "count=1", "--at", "2113-01-01T00:00:00"], "naive_time"),
    ],
)
def test_a_wrong_read_says_what_is_wrong(mlpd: Mlpd, arguments: list[str], code: str) -> None:
    done = mlpd("features", "read", *arguments)
    assert done.exit_code == 1
    assert f"[{code}]" in done.stderr
    assert done.stdout == ""


def test_a_join_of_a_file_becomes_a_file(
    mlpd: Mlpd, command_line: ModuleType, tmp_path: Path
) -> None:
    spine, out = tmp_path / "spine.parquet", tmp_path / "out.parquet"
    rows = command_line.events(100).select("event_time", "user", "age", "count").reverse()
    rows.write_parquet(spine)
    files = ("--spine", spine, "--out", out)
    done = mlpd("features", "history", "risk", *files)
    assert done.exit_code == 0, done.stderr
    assert "100" in done.stdout
    joined = pl.read_parquet(out)
    assert joined.select(rows.columns).equals(rows)
    assert joined["profile.amount"].to_list()[-1] == 0.0
    single = mlpd("features", "history", "profile.amount,user", "--spine", spine, "--out", out)
    assert "[unknown_column]" in single.stderr  # age and count are asked for by risk alone
    rows.select("event_time", "user").write_parquet(spine)
    asked = ("features", "history", "profile.amount", *files, "--closed", "left", "--statuses")
    answer = json.loads(mlpd(*asked, "--json").stdout)
    assert answer["rows"] == 100
    assert answer["path"] == str(out)
    joined = pl.read_parquet(out)
    assert joined.columns == ["event_time", "user", "profile.amount", "profile.amount__status"]
    assert joined["profile.amount__status"].to_list()[-3:] == [2, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nothing"], "unknown_service"),
        (["risk"], "missing_entity_key"),
        (["profile.amount", "--mode", "as_of_sequence"], "missing_sequence"),
        (["profile.amount", "--out", "out.xlsx"], "unknown_format"),
    ],
)
def test_a_wrong_join_says_what_is_wrong(
    mlpd: Mlpd, tmp_path: Path, arguments: list[str], code: str
) -> None:
    spine, out = tmp_path / "spine.parquet", tmp_path / "out.parquet"
    pl.DataFrame({"event_time": [0]}).write_parquet(spine)
    done = mlpd("features", "history", "--spine", spine, "--out", out, *arguments)
    assert done.exit_code == 1
    assert f"[{code}]" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["spine.parquet"]


def test_freshness_shows_ages_as_served(mlpd: Mlpd) -> None:
    answer = json.loads(mlpd("features", "freshness", "--json").stdout)
    assert answer["views"]["profile"]["stale"] == 300
    assert "profile" in mlpd("features", "freshness").stdout
    text = mlpd("features", "freshness").stdout
    assert re.search(r"clicks +2013-01-03 01:59:00Z +\d+d( \d+h)? +0ms", text)
    assert re.search(r"profile +300 +100.0% +0.0%", text)


def test_stats_show_numbers_and_texts(mlpd: Mlpd) -> None:
    shown = mlpd("features", "stats", "risk").stdout
    assert "spend: 3 entities\n" in shown
    assert "From elsewhere: user, age, count" in shown
    assert re.search(r"amount +0.0% +100.0%", shown)
    answer = json.loads(mlpd("features", "stats", "profile", "--json").stdout)
    assert [view["view"] for view in answer["views"]] == ["profile"]
    sampled = mlpd("features", "stats", "profile", "--entities", 2).stdout
    assert "profile: 2 entities of about " in sampled
    unknown = mlpd("features", "stats", "nothing")
    assert (unknown.exit_code, "[unknown_view]" in unknown.stderr) == (1, True)
