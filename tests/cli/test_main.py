import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mlpd import __version__
from mlpd.cli import main
from mlpd.cli.lazy import RootGroup
from mlpd.core.errors import ConfigurationError, MlpdError, NotFoundError

HEAVY = {"numpy", "polars", "rich", "aiohttp", "asyncio", "msgpack", "mlpd.client", "mlpd.daemon"}


def leaves(
    command: click.Command, path: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], click.Command]]:
    if not isinstance(command, click.Group):
        return [(path, command)]
    context = click.Context(command)
    found = []
    for name in command.list_commands(context):
        leaf = command.get_command(context, name)
        assert leaf is not None
        found += leaves(leaf, (*path, name))
    return found


def failing(error: BaseException) -> click.Command:
    @click.group(cls=RootGroup)
    def root() -> None:
        pass

    @root.command()
    def fail() -> None:
        raise error

    return root


def test_help_names_every_command_and_imports_none_of_them() -> None:
    code = (
        "import sys\n"
        "from mlpd.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert not loaded & HEAVY
    assert not [name for name in loaded if name.startswith("mlpd.cli.") and name[9:] in main.lazy]
    for name in main.lazy:
        assert f"  {name} " in done.stdout


@pytest.mark.parametrize("name", sorted(main.lazy.keys() - {"serve", "demo"}))
def test_the_line_shown_in_help_is_the_commands_own(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert command.name == name
    assert command.get_short_help_str(60) == main.lazy[name].help


def test_every_command_that_talks_to_a_daemon_takes_url_and_json() -> None:
    for path, command in leaves(main):
        if path[0] not in ("router", "demo", "restore") and path[-1] not in ("serve", "keygen"):
            assert {"url", "as_json"} <= {p.name for p in command.params}, path
            assert command.help, path


def test_no_line_of_the_lists_of_commands_is_cut() -> None:
    for name in main.lazy:
        done = CliRunner().invoke(main, [name, "--help"])
        assert done.exit_code == 0
        assert "..." not in done.stdout.partition("\nCommands:\n")[2], name


def test_version() -> None:
    assert CliRunner().invoke(main, ["--version"]).stdout == f"mlpd {__version__}\n"


def test_python_m_mlpd_is_the_command() -> None:
    command = [sys.executable, "-m", "mlpd", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"mlpd {__version__}\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFoundError("no such thing", code="unknown_thing", hint="Look again."), 1),
        (ConfigurationError("odd setting", code="unknown_setting", hint="Look again."), 2),
    ],
)
def test_an_error_raised_on_purpose_is_a_message_a_code_and_a_hint(
    error: MlpdError, code: int
) -> None:
    done = CliRunner().invoke(failing(error), ["fail"])
    assert done.exit_code == code
    assert done.stderr == f"error: {error.message} [{error.code}]\nhint: Look again.\n"
    assert done.stdout == ""


def test_a_bug_shows_no_traceback_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(failing(ZeroDivisionError("oh")), ["fail"])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ZeroDivisionError: oh [internal]\nhint: ")
    monkeypatch.setenv("MLPD_TRACEBACK", "1")
    assert isinstance(
        CliRunner().invoke(failing(ZeroDivisionError()), ["fail"]).exception, ZeroDivisionError
    )


def test_control_characters_of_a_message_are_escaped() -> None:
    done = CliRunner().invoke(failing(NotFoundError("a\x1b[2Jb\x07")), ["fail"])
    assert "error: a\\x1b[2Jb\\x07 [not_found]" in done.stderr


def test_ctrl_c_exits_130() -> None:
    done = CliRunner().invoke(failing(KeyboardInterrupt()), ["fail"])
    assert done.exit_code == 130
    assert done.stderr == "\n"


def test_an_error_of_the_operating_system_names_the_file() -> None:
    done = CliRunner().invoke(failing(PermissionError(13, "Permission denied", "x.csv")), ["fail"])
    assert (done.exit_code, done.stderr) == (
        1,
        "error: x.csv: Permission denied [operating_system]\n",
    )


@pytest.mark.parametrize("arguments", [["nonsense"], ["models", "show"], ["apply", "/nowhere"]])
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(main, arguments).exit_code == 2


def test_without_a_daemon_the_error_says_how_to_start_one(tmp_path: Path) -> None:
    url = f"unix:{tmp_path}/mlpd.sock"
    done = CliRunner().invoke(main, ["status", "--url", url, "--json"])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: no daemon answers at {url}: ")
    assert "mlpd serve" in done.stderr
    assert json.loads(done.stdout)["error"]["code"] == "unreachable"


def test_a_wrong_url_is_a_matter_of_configuration() -> None:
    done = CliRunner().invoke(main, ["status", "--url", "ftp://x"])
    assert done.exit_code == 2
    assert "[invalid_url]" in done.stderr


def test_a_closed_pipe_ends_quietly(url: str) -> None:
    command = f"{sys.executable} -m mlpd features list --json | true"
    done = subprocess.run(
        ["/bin/bash", "-c", command], env=os.environ | {"MLPD_URL": url}, capture_output=True,
        check=False,
    )  # fmt: skip
    assert done.stderr == b""


def test_completion_offers_commands() -> None:
    environment = os.environ | {
        "_MLPD_COMPLETE": "bash_complete", "COMP_WORDS": "mlpd mo", "COMP_CWORD": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", "from mlpd.cli import main; main(prog_name='mlpd')"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "plain,models\n"
