"""Where a daemon is: a TCP address or a unix socket, read from a URL."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from mlpd.core.errors import ConfigurationError

DEFAULT_URL = "http://127.0.0.1:8700"


@dataclass(frozen=True, slots=True)
class Address:
    """`socket_path` of a unix socket, or `host` and `port`; `host_header` is what is sent."""

    host: str
    port: int
    socket_path: str | None = None

    @property
    def host_header(self) -> str:
        """Value of the Host header."""
        if self.socket_path is not None:
            return "localhost"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        if self.socket_path is not None:
            return f"unix:{self.socket_path}"
        return f"http://{self.host_header}"


def parse_address(url: str) -> Address:
    """Return the address in `http://HOST[:PORT]` or `unix:/path/mlpd.sock`.

    Raises ConfigurationError(code="invalid_url").
    """
    if url.startswith("unix:"):
        path = url.removeprefix("unix:").removeprefix("//")
        if path.startswith("/"):
            return Address("localhost", 0, path)
    try:
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname and parts.path in ("", "/"):
            return Address(parts.hostname, parts.port or 80)
    except ValueError:
        pass
    raise ConfigurationError(
        f"{url!r} is not the URL of a daemon",
        code="invalid_url",
        hint=f"Use {DEFAULT_URL} or unix:/path/to/mlpd.sock; mlpd status shows both.",
    )
