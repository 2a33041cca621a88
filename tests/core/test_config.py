"""Settings are checked once, named when wrong, and conf/default.toml shows the defaults."""

from pathlib import Path

import pytest

from mlpd.core.config import Config, build_config, load_config, with_server
from mlpd.core.errors import ConfigurationError

ROOT = Path(__file__).parents[2]


def test_the_shown_defaults_are_the_defaults() -> None:
    assert load_config(ROOT / "conf" / "default.toml") == Config()


def test_every_setting_is_shown() -> None:
    shown = (ROOT / "conf" / "default.toml").read_text()
    for section in ("server", "limits", "storage", "serving", "training", "monitoring"):
        assert f"[{section}]" in shown
        for name in type(getattr(Config(), section)).__slots__:
            assert f"\n{name.removesuffix('_us')} = " in shown


def test_settings_are_taken_and_the_rest_is_default() -> None:
    config = build_config({"server": {"port": 1, "drain_timeout": "1m"}, "training": {"nice": 0}})
    assert config.server.port == 1
    assert config.server.drain_timeout_us == 60_000_000
    assert config.training.nice == 0
    assert config.storage == Config().storage


@pytest.mark.parametrize(
    ("data", "code", "named"),
    [
        ({"servre": {}}, "unknown_setting", "[servre]"),
        ({"server": {"prot": 1}}, "unknown_setting", "'prot'"),
        ({"server": {"drain_timeout_us": 1}}, "unknown_setting", "'drain_timeout_us'"),
        ({"server": 5}, "configuration", "[server]"),
        ({"server": {"port": "8700"}}, "configuration", "'port'"),
        ({"server": {"port": True}}, "configuration", "'port'"),
        ({"server": {"port": -1}}, "configuration", "'port'"),
        ({"server": {"port": 65536}}, "configuration", "65536"),
        ({"server": {"host": "0.0.0.0"}}, "unsafe_bind", "'0.0.0.0'"),
        ({"server": {"allowed_hosts": "a"}}, "configuration", "'allowed_hosts'"),
        ({"server": {"drain_timeout": "0s"}}, "configuration", "'drain_timeout'"),
        ({"storage": {"compact_rows": 0}}, "configuration", "'compact_rows'"),
    ],
)
def test_a_wrong_setting_is_named(data: dict[str, object], code: str, named: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        build_config(data, "mlpd.toml")
    assert refused.value.code == code
    assert named in refused.value.message


@pytest.mark.parametrize("body", [b"[server", b"\xff\xfe", b"port = 1\nport = 2"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "mlpd.toml"
    path.write_bytes(body)
    with pytest.raises(ConfigurationError, match="mlpd.toml"):
        load_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load_config(tmp_path / "none.toml")
    assert refused.value.code == "configuration_unreadable"
    with pytest.raises(ConfigurationError):
        load_config(tmp_path)


def test_the_command_line_wins_and_is_checked() -> None:
    assert with_server(Config(), host="localhost").server.host == "localhost"
    assert with_server(Config(), port=0).server.port == 0
    with pytest.raises(ConfigurationError):
        with_server(Config(), host="192.0.2.1")
    with pytest.raises(ConfigurationError):
        with_server(Config(), port=-1)
