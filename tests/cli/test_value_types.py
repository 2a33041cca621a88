"""Files of every format bring every type and kind of key exactly; single reads show them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest
from click.testing import Result

Mlpd = Callable[..., Result]

START_US = 1_356_998_400_000_000
BIG = 2**53 + 1
DEFINITIONS = """
from mlpd import Entity, FeatureService, FeatureView, Source, transform

place = Entity("place", key={"shop": "string", "shelf": "int64", "tag": "bytes"})
values = {
    "flag": "bool", "number": "int64", "small": "float32", "real": "float64", "text": "string",
    "raw": "bytes", "seen": "timestamp", "ids": "list[int64]", "words": "list[string]",
    "times": "list[timestamp]", "blobs": "list[bytes]", "point": "vector[float32, 2]",
}
seen = Source(
    "seen", timestamp="at", schema={"shop": "string", "shelf": "int64", "tag": "bytes", **values}
)
latest = FeatureView("latest", place, seen, list(values))

@transform
def above(number: "latest.number", add: "request.add") -> "int64":
    return number + add

@transform
def twice(above: "above") -> "int64":
    return above * 2

everything = FeatureService(
    "everything", [place, latest, above, twice],
    request={"add": "int64", "near": "vector[float64, 2]"},
)
"""
VALUES: dict[str, list[Any]] = {
    "at": [START_US, START_US + 1, START_US + 2],
    "known_at": [START_US + 5] * 3,
    "shop": ["007", 'caf\u00e9, "2"', "x"],
    "shelf": [BIG, -1, BIG],
    "tag": [b"\x00\xff", b"", b"plain"],
    "flag": [True, None, False],
    "number": [BIG, None, -BIG],
    "small": [0.5, None, 3.0],
    "real": [0.1, None, 5e-324],
    "text": ["1.0", None, "true"],
    "raw": [b"\x00", None, b"\xff\x00"],
    "seen": [START_US, None, -1],
    "ids": [[BIG, -(2**63)], None, []],
    "words": [["a", "1"], None, []],
    "times": [[START_US, -1], None, []],
    "blobs": [[b"\x00"], None, []],
    "point": [[0.5, -2.0], None, [0.0, 1.0]],
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, command_line: ModuleType) -> Iterator[Mlpd]:
    """Runs a command against a daemon that has the definitions."""
    directory = tmp_path_factory.mktemp("types")
    (directory / "definitions").mkdir()
    (directory / "definitions" / "seen.py").write_text(DEFINITIONS)
    with command_line.serve(directory / "data") as url:
        run = command_line.commands(url)
        done = run("apply", directory / "definitions", "--yes")
        assert done.exit_code == 0, done.output
        yield run


def as_text(value: Any) -> Any:
    """A value as JSON can say it."""
    if isinstance(value, bytes):
        return f"0x{value.hex()}"
    return [as_text(item) for item in value] if isinstance(value, list) else value


def write(form: str, folder: Path, values: dict[str, list[Any]]) -> Path:
    path = folder / f"seen.{form}"
    if form == "parquet":
        point = pl.Array(pl.Float32, 2)
        series = {name: pl.Series(name, v, strict=False) for name, v in values.items()}
        series["point"] = pl.Series("point", values["point"], dtype=point)
        pl.DataFrame(series).write_parquet(path)
        return path
    texts = {name: [as_text(v) for v in column] for name, column in values.items()}
    rows = [dict(zip(texts, row, strict=True)) for row in zip(*texts.values(), strict=True)]
    if form == "ndjson":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return path
    pl.DataFrame(
        {
            name: [
                json.dumps(v) if isinstance(v, list) else None if v is None else str(v) for v in c
            ]
            for name, c in texts.items()
        }
    ).write_csv(path)
    return path


@pytest.mark.parametrize("form", ["parquet", "csv", "ndjson"])
def test_files_bring_every_type_and_key_exactly(store: Mlpd, tmp_path: Path, form: str) -> None:
    values = {**VALUES, "shop": [f"{form} {shop}" for shop in VALUES["shop"]]}
    path = write(form, tmp_path, values)
    done = store("events", "import", path, "--source", "seen", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["accepted"] == 3
    for i in range(3):
        key = [f"{n}={as_text(values[n][i])}" for n in ("shop", "shelf", "tag")]
        read = store("features", "read", "everything", *key, "add=1", "near=[1,2.5]", "--json")
        assert read.exit_code == 0, read.output
        found = {name: column[0] for name, column in json.loads(read.stdout)["columns"].items()}
        number = values["number"][i]
        assert found == {
            **{name: as_text(values[name][i]) for name in ("shop", "shelf", "tag")},
            **{f"latest.{n}": as_text(c[i]) for n, c in values.items() if n in FEATURES},
            "above": None if number is None else number + 1,
            "twice": None if number is None else 2 * (number + 1),
            "add": 1,
            "near": [1.0, 2.5],
        }


FEATURES = [name for name in VALUES if name not in ("at", "known_at", "shop", "shelf", "tag")]


@pytest.mark.parametrize("form", ["csv", "ndjson"])
def test_a_cell_of_another_type_refuses_its_row_alone(
    store: Mlpd, tmp_path: Path, form: str
) -> None:
    values = {name: column * 6 for name, column in VALUES.items()}
    wrong = {
        "number": "x",
        "real": "much",
        "flag": "maybe",
        "raw": "0x0",
        "ids": [1, "2"],
        "seen": "soon",
    }
    values |= {name: list(values[name]) for name in wrong}
    for i, (name, value) in enumerate(wrong.items()):
        values[name][3 * i + 1] = value
    done = store("events", "import", write(form, tmp_path, values), "--source", "seen", "--json")
    answer = json.loads(done.stdout)
    assert (done.exit_code, answer["accepted"], answer["rejected"]) == (1, 12, 6)
    assert [(r["index"], r["code"]) for r in answer["reasons"]] == [
        (3 * i + 1, "invalid_time" if name == "seen" else "wrong_type")
        for i, name in enumerate(wrong)
    ]
    assert all(
        f"'{name}'" in r["message"] for name, r in zip(wrong, answer["reasons"], strict=True)
    )


def test_names_and_types_that_come_late_in_ndjson_count(store: Mlpd, tmp_path: Path) -> None:
    row = {"at": START_US, "known_at": START_US, "shop": "late", "shelf": 1, "tag": "0x"}
    rows = [
        row,
        {**row, "number": None},
        {**row, "number": BIG, "point": [1, 2]},
        {**row, "text": 7},
    ]
    path = tmp_path / "late.ndjson"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    done = store("events", "import", path, "--source", "seen", "--json")
    answer = json.loads(done.stdout)
    assert (answer["rows"], answer["accepted"]) == (4, 3)
    assert [(r["index"], r["code"]) for r in answer["reasons"]] == [(3, "wrong_type")]
    read = store(
        "features", "read", "latest.number,latest.point", "shop=late", "shelf=1", "tag=0x", "--json"
    )
    assert json.loads(read.stdout)["columns"] == {
        "latest.number": [BIG],
        "latest.point": [[1.0, 2.0]],
    }


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "is not JSON"),
        ('{"at": 1} {}', "is not JSON"),
        ("[1]", "is no JSON object"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_broken_line_stores_nothing(store: Mlpd, tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "broken.ndjson"
    path.write_text(f'{{"at": 1, "known_at": 1}}\n{line}\n')
    before = json.loads(store("status", "--json").stdout)["sequence"]
    done = store("events", "import", path, "--source", "seen")
    assert done.exit_code == 1
    assert f"line 2 of broken.ndjson {why}" in done.stderr
    assert "[malformed_event]" in done.stderr
    assert json.loads(store("status", "--json").stdout)["sequence"] == before


@pytest.mark.parametrize(
    ("pair", "code"),
    [
        ("shelf=1.0", "wrong_type"),
        ("shelf=x", "wrong_type"),
        ("tag=0x0", "wrong_type"),
        ("near=1", "wrong_type"),
    ],
)
def test_a_wrong_key_or_field_is_refused(store: Mlpd, pair: str, code: str) -> None:
    given = {
        "shop": "shop=a",
        "shelf": "shelf=1",
        "tag": "tag=0x00",
        "add": "add=1",
        "near": "near=[1,2]",
    }
    given[pair.partition("=")[0]] = pair
    done = store("features", "read", "everything", *given.values())
    assert (done.exit_code, f"[{code}]" in done.stderr) == (1, True), done.output


def test_lists_and_bytes_are_shown_to_people(store: Mlpd) -> None:
    row = {"at": START_US, "known_at": START_US, "shop": "shown", "shelf": 1, "tag": "0x00"}
    row |= {"ids": [1, 2], "words": ["a", "b"], "raw": "0x00ff"}
    assert store("events", "send", "seen", json.dumps(row)).exit_code == 0
    names = "tag,latest.ids,latest.words,latest.raw"
    lines = store(
        "features", "read", names, "shop=shown", "shelf=1", "tag=0x00"
    ).stdout.splitlines()
    shown = [" ".join(line.split()[:3]) for line in lines[1:5]]
    assert shown == [
        "tag 0x00 present",
        "latest.ids 1, 2",
        "latest.words a, b",
        "latest.raw 0x00ff present",
    ]
