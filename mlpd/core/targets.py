"""Where the daemon may send messages: URLs from an allow-list, to addresses that are allowed.

A name is resolved once, every address that it has is checked, and the connection goes to one of
those, so that a name can't show another address to the connection than to the check.
"""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from mlpd.core.errors import ConfigurationError, ForbiddenError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class Target:
    """A checked URL, in parts; `path` has its query."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """The Host header: the port only where it is not the scheme's."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        """Return scheme, host and port alone: a path may be a secret."""
        return f"{self.scheme}://{self.authority}"


def parse_target(url: str, allowed: Iterable[str], what: str) -> Target:
    """Return the target of `url`, whose host (or `host:port`) is one of `allowed`.

    Raises ConfigurationError naming `what`: no http or https URL, with a user, or not allowed.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise ConfigurationError(f"{what} is no URL: {error}", code="invalid_url") from None
    plain = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in _PORTS or not host or "@" in parts.netloc or not plain:
        raise ConfigurationError(
            f"{what} must be an http or https URL of printable ASCII, without user and password",
            code="invalid_url",
        )
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    target = Target(parts.scheme, host, port or _PORTS[parts.scheme], path)
    if not {host, f"{host}:{target.port}"} & {name.lower() for name in allowed}:
        raise ConfigurationError(
            f"{what} names {host}:{target.port}, which is not an allowed target",
            code="target_not_allowed",
            hint=f'Add it to [alerts] targets = ["{host}:{target.port}"] if that is meant.',
        )
    return target


def parse_networks(texts: Iterable[str], what: str) -> tuple[Network, ...]:
    """Return networks such as 10.0.0.0/8; raises ConfigurationError naming `what`."""
    try:
        return tuple(ipaddress.ip_network(text) for text in texts)
    except ValueError as error:
        raise ConfigurationError(f"{what}: {error}", code="invalid_network") from None


def check_addresses(found: Iterable[str], private: Iterable[Network], host: str) -> list[str]:
    """Return the addresses that `host` resolved to, if each of them may be reached.

    That is a public one, or one in the networks `private`.  Raises
    ForbiddenError(code="address_not_allowed") for the first that isn't: a name that has both kinds
    is a trick.
    """
    networks = list(private)
    addresses = list(dict.fromkeys(found))
    for text in addresses:
        address = _embedded(ipaddress.ip_address(text.partition("%")[0]))
        public = address.is_global and not address.is_multicast
        if not public and not any(address in network for network in networks):
            raise ForbiddenError(
                f"{host} has the address {text}, which is not public",
                code="address_not_allowed",
                hint="Add its network to [alerts] private_networks if that is meant.",
            )
    return addresses


def _embedded(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 one stands for, where it does."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return (
        address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1] or address
    )
