import configparser
import dataclasses
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path

import click
import pytest

from mlpd.cli import main
from mlpd.core.config import Config, load_config

CONF = Path(__file__).parents[2] / "conf"


def test_default_toml_is_the_defaults() -> None:
    assert load_config(CONF / "default.toml") == Config()


def test_default_toml_shows_every_setting() -> None:
    shown = tomllib.loads((CONF / "default.toml").read_text())
    for section in dataclasses.fields(Config):
        settings = {f.name.removesuffix("_us") for f in dataclasses.fields(section.default_factory)}
        assert shown.pop(section.name).keys() == settings
    assert not shown


def test_default_toml_explains_every_setting() -> None:
    lines = (CONF / "default.toml").read_text().splitlines()
    for before, line in pairwise(lines):
        if "=" in line and not line.startswith("#"):
            assert before.startswith("#"), line


@pytest.fixture
def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment]  # the documented way to keep case
    parser.read(CONF / "mlpd.service")
    return parser


def test_the_unit_starts_a_command_line_that_exists(unit: configparser.ConfigParser) -> None:
    _, name, *arguments = shlex.split(unit["Service"]["ExecStart"])
    command = main.get_command(click.Context(main), name)
    context = command.make_context(name, arguments)
    assert str(context.params["data_dir"]) == "/var/lib/mlpd"


def test_the_unit_allows_native_kernels_and_waits_for_the_drain(
    unit: configparser.ConfigParser,
) -> None:
    assert "MemoryDenyWriteExecute" not in unit["Service"]
    assert int(unit["Service"]["TimeoutStopSec"]) > Config().server.drain_timeout_us / 1e6
