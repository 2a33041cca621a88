"""`mlpd serve` refusing to start: one message, one hint, the right exit code, nothing written."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from click.testing import Result

Mlpd = Callable[..., Result]


def serve(directory: Path, *options: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mlpd", "serve", "--data-dir", directory, *options]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=30, check=False
    )


def test_a_data_directory_in_use_names_its_daemon(mlpd: Mlpd, url: str) -> None:
    directory = json.loads(mlpd("status", "--json").stdout)["data_directory"]
    done = serve(Path(directory), "--port", 0)
    assert done.returncode == 1
    assert "[data_directory_in_use]" in done.stderr
    assert url in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_names_a_way_out(url: str, tmp_path: Path) -> None:
    done = serve(tmp_path / "data", "--port", urlsplit(url).port)
    assert done.returncode == 1
    assert "[port_in_use]" in done.stderr
    assert "--port 0" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("[server]\nprot = 1\n", "unknown_setting"),
        ("[sever]\n", "unknown_setting"),
        ("[server]\nport = 'x'\n", "configuration"),
        ("[server\n", "configuration"),
        ('[server]\nhost = "0.0.0.0"\n', "unsafe_bind"),
    ],
)
def test_a_wrong_configuration_is_refused_before_anything_is_made(
    tmp_path: Path, text: str, code: str
) -> None:
    config = tmp_path / "mlpd.toml"
    config.write_text(text)
    done = serve(tmp_path / "data", "--config", config)
    assert done.returncode == 2
    assert f"[{code}]" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()
