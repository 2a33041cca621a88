import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Mlpd = Callable[..., Result]


def test_apply_makes_what_plan_shows(empty: Mlpd, folder: Path) -> None:
    planned = empty("plan", folder)
    assert planned.exit_code == 0
    assert "+ entity user\n" in planned.stdout
    assert "+ feature service risk\n" in planned.stdout
    applied = empty("apply", folder, "--yes")
    assert (applied.exit_code, applied.stderr) == (0, "")
    assert applied.stdout == planned.stdout + "Version 1 runs: 7 added.\n"
    again = empty("apply", folder)
    assert again.stdout == "Nothing to change: version 1 is what the folder says.\n"
    status = json.loads(empty("status", "--json").stdout)
    assert status["definitions_version"] == 1
    assert status["sources"] == ["clicks", "visits"]


def test_plan_as_json_brings_the_document(mlpd: Mlpd, folder: Path) -> None:
    answer = json.loads(mlpd("plan", folder, "--json").stdout)
    assert answer["changes"] == {}
    assert answer["document"]["entities"] == {"user": {"keys": {"user": "string"}}}


def test_removed_and_changed_definitions_are_shown(
    mlpd: Mlpd, folder: Path, tmp_path: Path
) -> None:
    text = (folder / "clicks.py").read_text()
    text = text.replace('"1d"]', '"1d", "7d"]').replace("visits = ", "Source and ")
    (tmp_path / "clicks.py").write_text(text)
    planned = mlpd("plan", tmp_path).stdout
    assert "~ view spend\n" in planned
    assert "- source visits\n" in planned
    assert re.search(r"spend +3,000 +3 +\d.* +\d.*B", planned)
    assert re.search(r"risk +\w{8} +spend +risk@champion, route risk", planned)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_apply_asks_before_it_changes_anything(
    mlpd: Mlpd, tmp_path: Path, folder: Path, options: list[str]
) -> None:
    text = (folder / "clicks.py").read_text()
    (tmp_path / "clicks.py").write_text(text.replace("visits = ", "Source and "))
    done = mlpd("apply", tmp_path, *options)
    assert done.exit_code == 2
    assert "--yes" in done.stderr
    assert "Nothing to change" in mlpd("plan", folder).stdout


def test_an_error_in_the_folder_names_file_and_line(mlpd: Mlpd, tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("from mlpd import Entity\n\nuser = Entity()\n")
    done = mlpd("plan", tmp_path)
    assert done.exit_code == 1
    assert f"{tmp_path / 'wrong.py'}:3" in done.stderr


def test_a_definition_that_contradicts_another_is_refused(
    mlpd: Mlpd, tmp_path: Path, folder: Path
) -> None:
    text = (folder / "clicks.py").read_text().replace('["amount"], ttl', '["amonut"], ttl')
    (tmp_path / "clicks.py").write_text(text)
    done = mlpd("apply", tmp_path, "--yes")
    assert done.exit_code == 1
    assert "amonut" in done.stderr
    assert done.stdout == ""
