"""The trainer `command`: what a program may do, what ends it, and what is said of wrong files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlpd.core.errors import MlpdError
from mlpd.core.trainers import FittedModel
from mlpd.daemon.plugins import Plugins, load_trainer
from tests.plugins.test_contract import KINDS, build_order

RIDGE = Path(__file__).parent / "ridge_script.py"
PRELUDE = "import json, os, sys, time\norder = json.load(open(sys.argv[1]))\n"


def run(tmp_path: Path, plugins: Plugins, program: str, **params: Any) -> FittedModel:
    """Fit with a program of this text; it runs in tmp_path/work."""
    script = tmp_path / "script.py"
    script.write_text(PRELUDE + program)
    commands = {"script": (sys.executable, str(script))}
    own = Plugins(plugins.trainers, commands)
    order = build_order(KINDS["command"], own, tmp_path / "work")
    order.params.clear()  # type: ignore[attr-defined]  # a dict
    order.params.update({"command": "script", **params})  # type: ignore[attr-defined]
    return load_trainer(own, "command").fit(order, lambda **_: None)


def ridge_but(change: str) -> str:
    """The program that works, with something more at its end."""
    return f"exec(compile(open({str(RIDGE)!r}).read(), 'ridge', 'exec'))\n{change}"


def result_with(**entries: Any) -> str:
    return (
        "from pathlib import Path\n"
        f"r = json.loads(Path(order['result']).read_text()) | {entries!r}\n"
        "Path(order['result']).write_text(json.dumps(r))"
    )


def test_the_order_says_what_is_asked(tmp_path: Path, plugins: Plugins) -> None:
    run(tmp_path, plugins, ridge_but(""), depth=4, seed=3)
    order = json.loads((tmp_path / "work" / "order.json").read_text())
    assert order["params"] == {"depth": 4}
    assert (order["objective"], order["seed"], order["threads"]) == ("binary", 3, 1)
    assert order["categorical"] == {"city": 5}


def test_the_program_sees_nothing_of_the_daemons_environment(
    tmp_path: Path, plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("PYTHONPATH", "/x")
    run(tmp_path, plugins, ridge_but("json.dump(dict(os.environ), open('environment', 'w'))"))
    seen = json.loads((tmp_path / "work" / "environment").read_text())
    assert not seen.keys() & {"SECRET", "PYTHONPATH"}
    assert (seen["OMP_NUM_THREADS"], seen["PATH"]) == ("1", os.environ["PATH"])


def test_what_is_printed_is_logged_up_to_a_bound(
    tmp_path: Path, plugins: Plugins, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    load_trainer(plugins, "command")
    monkeypatch.setattr(sys.modules["mlpd_command.process"], "LOG_BYTES_MAX", 10_000)
    noise = "for i in range(2000): print('line', i, flush=True)\nprint('oh', file=sys.stderr)"
    run(tmp_path, plugins, ridge_but(noise))
    logged = capfd.readouterr().err
    assert "line 0\n" in logged
    assert logged.endswith("... more was printed and dropped\n")
    assert len(logged) < 11_000


def test_a_program_that_takes_too_long_is_ended(
    tmp_path: Path, plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids: list[int] = []

    class Noted(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            pids.append(self.pid)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    with pytest.raises(MlpdError) as ended:
        run(tmp_path, plugins, "time.sleep(3600)", timeout="2s")
    assert ended.value.code == "run_timeout"
    (pid,) = pids
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("program", "code", "problem"),
    [
        ("sys.exit(3)", "command_failed", "status 3"),
        ("os.kill(os.getpid(), 9)", "command_failed", "status -9"),
        ("pass", "command_result", "result.json"),
        (ridge_but("os.remove(order['scores'])"), "command_result", "scores.parquet"),
        (ridge_but("os.remove(order['model'])"), "command_result", "model.onnx"),
        (ridge_but("open(order['model'], 'wb').write(b'no')"), "plugin_graph", "no ONNX model"),
        (ridge_but("open(order['scores'], 'wb').write(b'no')"), "command_result", "can't be read"),
        (
            ridge_but("pl.DataFrame({'s': [1.0]}).write_parquet(order['scores'])"),
            "command_result",
            "expected one row for each",
        ),
        (
            ridge_but("os.remove(order['model']); os.symlink('/etc/passwd', order['model'])"),
            "command_result",
            "did not write it",
        ),
        (ridge_but("open(order['result'], 'w').write('{')"), "command_result", "no JSON"),
        (ridge_but(result_with(metric=1)), "command_result", "expected an object"),
        (ridge_but(result_with(metrics={"a": "b"})), "command_result", "finite numbers"),
        (ridge_but(result_with(bound=[1])), "command_result", "'bound'"),
        (ridge_but(result_with(importance={"x": 1})), "command_result", "no features"),
        (ridge_but(result_with(output="z")), "plugin_graph", "expected 'z'"),
    ],
)
def test_what_a_program_does_wrong_is_named(
    tmp_path: Path, plugins: Plugins, program: str, code: str, problem: str
) -> None:
    with pytest.raises(MlpdError, match=problem) as refused:
        run(tmp_path, plugins, program)
    assert refused.value.code == code
    assert refused.value.hint


def test_a_program_that_is_not_there_is_named(
    tmp_path: Path, plugins: Plugins, capfd: pytest.CaptureFixture[str]
) -> None:
    own = Plugins(plugins.trainers, {"ridge": ("/no/such/program",)})
    with pytest.raises(MlpdError) as refused:
        load_trainer(own, "command").fit(
            build_order(KINDS["command"], own, tmp_path / "work"), lambda **_: None
        )
    assert "/no/such/program" in refused.value.message
    assert "/no/such/program can't be started: No such file" in capfd.readouterr().err
