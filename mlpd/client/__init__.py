"""The client: `Client` for threads, `AsyncClient` for asyncio; both know core alone."""

from typing import TYPE_CHECKING, Any

from mlpd.client.sync import Client
from mlpd.core.address import DEFAULT_URL

if TYPE_CHECKING:
    from mlpd.client.aio import AsyncClient

__all__ = ["DEFAULT_URL", "AsyncClient", "Client"]


def __getattr__(name: str) -> Any:
    """Import `AsyncClient` when it is asked for: aiohttp costs 0.2 s that `Client` never pays."""
    if name == "AsyncClient":
        from mlpd.client.aio import AsyncClient  # noqa: PLC0415

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
