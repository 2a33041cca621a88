"""Where messages may go: URLs, allow-list, addresses."""

import pytest

from mlpd.core.errors import ConfigurationError, ForbiddenError
from mlpd.core.targets import Target, check_addresses, parse_networks, parse_target

ALLOWED = ["hooks.example.org", "127.0.0.1:9093", "[::1]:9093", "::1"]


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("https://hooks.example.org/a?b=c", Target("https", "hooks.example.org", 443, "/a?b=c")),
        ("http://HOOKS.example.org:81", Target("http", "hooks.example.org", 81, "/")),
        ("http://127.0.0.1:9093/x#y", Target("http", "127.0.0.1", 9093, "/x")),
        ("http://[::1]:9093", Target("http", "::1", 9093, "/")),
    ],
)
def test_an_allowed_url_is_taken_apart(url: str, target: Target) -> None:
    assert parse_target(url, ALLOWED, "url") == target


def test_the_host_header_names_the_port_where_it_is_not_the_schemes() -> None:
    assert parse_target("http://[::1]:9093/a", ALLOWED, "url").authority == "[::1]:9093"
    assert parse_target("https://hooks.example.org", ALLOWED, "u").authority == "hooks.example.org"
    assert str(Target("https", "h", 443, "/secret")) == "https://h"


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("https://example.org/", "target_not_allowed"),
        ("https://hooks.example.org.evil.example/", "target_not_allowed"),
        ("http://127.0.0.1:9094/", "target_not_allowed"),
        ("http://127.0.0.1/", "target_not_allowed"),
        ("https://hooks.example.org@evil.example/", "invalid_url"),
        ("https://user:hunter2@hooks.example.org/", "invalid_url"),
        ("file:///etc/passwd", "invalid_url"),
        ("gopher://hooks.example.org/", "invalid_url"),
        ("//hooks.example.org/", "invalid_url"),
        ("hooks.example.org", "invalid_url"),
        ("https://hooks.example.org:99999/", "invalid_url"),
        ("https://[::1/", "invalid_url"),
        ("https://hooks.example.org/\r\nHost: evil", "invalid_url"),
        ("https://hooks.example.org/a b", "invalid_url"),
        ("https://hooks.example.org/\u00e9", "invalid_url"),
    ],
)
def test_any_other_url_is_refused_by_name(url: str, code: str) -> None:
    with pytest.raises(ConfigurationError, match="hook url") as refused:
        parse_target(url, ALLOWED, "hook url")
    assert refused.value.code == code
    assert "hunter2" not in refused.value.message


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
        *("0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fd00::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "ff02::1"),
    ],
)
def test_an_address_that_is_not_public_is_refused_in_every_spelling(address: str) -> None:
    with pytest.raises(ForbiddenError) as refused:
        check_addresses(["93.184.216.34", address], [], "hooks.example.org")
    assert refused.value.code == "address_not_allowed"


def test_public_addresses_and_listed_networks_pass() -> None:
    public = ["93.184.216.34", "2606:2800:220:1::1", "64:ff9b::5db8:d822"]
    assert check_addresses([*public, public[0]], [], "h") == public
    private = parse_networks(["127.0.0.0/8", "fd00::/8"], "networks")
    assert check_addresses(["127.0.0.1", "fd00::1"], private, "h") == ["127.0.0.1", "fd00::1"]
    assert check_addresses(["::ffff:127.0.0.1"], private, "h") == ["::ffff:127.0.0.1"]
    with pytest.raises(ForbiddenError):
        check_addresses(["127.0.0.1", "10.0.0.1"], private, "h")


def test_a_network_that_is_none_is_named() -> None:
    with pytest.raises(ConfigurationError, match="private_networks"):
        parse_networks(["127.0.0.1/8"], "[alerts] private_networks")
