"""The client: `Client` for threads, `AsyncClient` for asyncio; both know core alone."""

from mlpd.client.address import DEFAULT_URL
from mlpd.client.aio import AsyncClient
from mlpd.client.sync import Client

__all__ = ["DEFAULT_URL", "AsyncClient", "Client"]
