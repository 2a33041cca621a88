import sys
from pathlib import Path

import pytest

from mlpd.cli.definitions import conf_folder, load_folder
from mlpd.core.document import parse_document
from mlpd.core.errors import DefinitionError, NotFoundError

ENTITY = 'from mlpd import Entity\ncarrier = Entity("carrier", key="string")\n'


def test_flights_folder_is_a_valid_document() -> None:
    definitions = parse_document(load_folder(conf_folder()))
    assert len(definitions.services["flight_risk"].features) >= 25
    assert set(definitions.jobs) == {"flight-risk", "schedule-only"}
    assert len(definitions.transforms) >= 3


def test_files_may_import_one_another_and_leave_no_modules(tmp_path: Path) -> None:
    (tmp_path / "entities.py").write_text(ENTITY)
    (tmp_path / "sources.py").write_text(
        "from mlpd import Source\n"
        "from entities import carrier\n"
        's = Source("s", timestamp="t", schema={carrier.name: "string"})\n'
    )
    document = load_folder(tmp_path)
    assert list(document["entities"]) == ["carrier"]
    assert document["sources"]["s"]["schema"] == {"carrier": "string"}
    assert "entities" not in sys.modules
    assert str(tmp_path) not in sys.path


def test_single_file_is_enough(tmp_path: Path) -> None:
    file = tmp_path / "one.py"
    file.write_text(ENTITY)
    assert list(load_folder(file)["entities"]) == ["carrier"]


def test_private_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(ENTITY)
    (tmp_path / "_b.py").write_text("raise RuntimeError")
    assert list(load_folder(tmp_path)["entities"]) == ["carrier"]


def test_failing_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(ENTITY + "\n\nunknown_name\n")
    with pytest.raises(DefinitionError) as caught:
        load_folder(tmp_path)
    assert f"{file}:5" in caught.value.message
    assert "unknown_name" in caught.value.message


def test_wrong_definition_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text('from mlpd import Aggregate\nx = 1\nAggregate.mean("a > 15").to_dict()\n')
    with pytest.raises(DefinitionError) as caught:
        load_folder(tmp_path)
    assert f"{file}:3" in caught.value.message


def test_syntax_error_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("x = 1\ny = = 2\n")
    with pytest.raises(DefinitionError) as caught:
        load_folder(tmp_path)
    assert f"{file}:2" in caught.value.message
    assert caught.value.code == "definition_syntax"


@pytest.mark.parametrize("make", [True, False])
def test_empty_or_missing_folder_says_so(tmp_path: Path, *, make: bool) -> None:
    folder = tmp_path / "defs"
    if make:
        folder.mkdir()
    with pytest.raises(NotFoundError) as caught:
        load_folder(folder)
    assert str(folder) in caught.value.message


def test_folder_without_definitions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(DefinitionError) as caught:
        load_folder(tmp_path)
    assert caught.value.code == "no_definitions"


def test_two_different_definitions_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(ENTITY)
    (tmp_path / "b.py").write_text(ENTITY.replace('"string"', '"int64"'))
    with pytest.raises(DefinitionError) as caught:
        load_folder(tmp_path)
    assert "carrier" in caught.value.message


def test_unknown_conf_folder_is_refused() -> None:
    with pytest.raises(NotFoundError):
        conf_folder("no_such_folder")
