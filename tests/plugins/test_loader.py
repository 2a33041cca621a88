"""How trainers are found: by entry point, by path, by name; and what is said where one isn't."""

import sys
from pathlib import Path

import pytest

from mlpd.core.config import PluginsConfig, build_config
from mlpd.core.errors import ConfigurationError, DefinitionError
from mlpd.daemon.plugins import Plugins, check_paths, load_trainer

TRAINER = """
class Guess:
    objectives = ("binary",)

    def fit(self, order, tell):
        raise NotImplementedError


TRAINER = Guess()
"""


def write(path: Path, text: str = TRAINER) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution with one trainer, as pip would have installed it."""
    site = tmp_path / "site"
    write(site / "guess_trainer.py")
    info = site / "guess-1.0.dist-info"
    write(info / "METADATA", "Metadata-Version: 2.1\nName: guess\nVersion: 1.0\n")
    points = "trainer.guess = guess_trainer:TRAINER\nstream.guess = guess_trainer:X\n"
    write(info / "entry_points.txt", f"[mlpd.plugins]\n{points}")
    monkeypatch.syspath_prepend(str(site))
    return site


def test_an_installed_trainer_is_found_by_its_entry_point_without_an_import(
    installed: Path,
) -> None:
    found = Plugins.find(PluginsConfig())
    assert found.trainers["guess"] == "guess_trainer:TRAINER"
    assert "guess_trainer" not in sys.modules
    assert load_trainer(found, "guess").objectives == ("binary",)
    assert Path(str(sys.modules.pop("guess_trainer").__file__)).parent == installed


def test_a_configured_path_goes_before_what_is_installed(installed: Path, tmp_path: Path) -> None:
    mine = write(tmp_path / "mine" / "guess.py", TRAINER.replace("binary", "regression"))
    found = Plugins.find(PluginsConfig((str(mine),)))
    assert installed.exists()
    assert load_trainer(found, "guess").objectives == ("regression",)


def test_a_package_is_named_without_its_prefix_and_may_import_itself(tmp_path: Path) -> None:
    package = tmp_path / "mlpd_thing"
    write(package / "__init__.py", "from mlpd_thing.inner import TRAINER\n")
    write(package / "inner.py")
    found = Plugins.find(PluginsConfig((str(package),)))
    assert load_trainer(found, "thing").objectives == ("binary",)
    del sys.modules["mlpd_thing"], sys.modules["mlpd_thing.inner"]


def test_what_a_child_is_told_is_what_was_found(tmp_path: Path) -> None:
    config = PluginsConfig((str(write(tmp_path / "a.py")),), ("churn = /bin/echo 'a b'",))
    found = Plugins.find(config)
    assert Plugins.from_request(found.to_request()) == found
    assert found.commands == {"churn": ("/bin/echo", "a b")}


def test_an_unknown_trainer_is_named_with_those_that_are_there() -> None:
    with pytest.raises(DefinitionError, match=r"unknown trainer 'nobody'; known: .*lightgbm") as no:
        Plugins.find(PluginsConfig()).place_of("nobody")
    assert no.value.code == "unknown_trainer"


@pytest.mark.parametrize(
    ("text", "code", "problem"),
    [
        ("import not_there_at_all\n", "plugin_dependency", "'not_there_at_all'"),
        ("1 / 0\n", "invalid_plugin", "ZeroDivisionError"),
        ("def f(:\n", "invalid_plugin", "SyntaxError"),
        ("OTHER = 1\n", "invalid_plugin", "TRAINER"),
        ("TRAINER = 1\n", "invalid_plugin", "no method 'fit'"),
        ("class T:\n    fit = print\nTRAINER = T()\n", "invalid_plugin", "no tuple 'objectives'"),
    ],
)
def test_a_trainer_that_breaks_is_named(tmp_path: Path, text: str, code: str, problem: str) -> None:
    found = Plugins.find(PluginsConfig((str(write(tmp_path / "broken.py", text)),)))
    with pytest.raises(DefinitionError, match=problem) as refused:
        load_trainer(found, "broken")
    assert refused.value.code == code
    assert "'broken'" in refused.value.message
    assert refused.value.hint


def test_a_missing_dependency_of_ours_names_the_extra(tmp_path: Path) -> None:
    path = write(tmp_path / "mlpd_sklearn.py", "import not_there_at_all\n")
    with pytest.raises(DefinitionError) as refused:
        load_trainer(Plugins.find(PluginsConfig((str(path),))), "sklearn")
    assert "mlpd[sklearn]" in refused.value.hint


@pytest.mark.parametrize("path", ["nowhere.py", "folder", "text.txt", "Über.py"])
def test_a_path_that_is_no_plugin_ends_the_start(tmp_path: Path, path: str) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path / "text.txt")
    write(tmp_path / "Über.py")
    with pytest.raises(ConfigurationError) as refused:
        check_paths(PluginsConfig((str(tmp_path / path),)))
    assert refused.value.code == "invalid_plugin"
    assert path in refused.value.message


@pytest.mark.parametrize("text", ["churn", "churn =", "= /bin/echo", "Churn! = a", "a = 'b"])
def test_a_command_that_cannot_be_read_ends_the_start(text: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        build_config({"plugins": {"commands": [text]}})
    assert refused.value.code == "invalid_command"
    assert repr(text) in refused.value.message
