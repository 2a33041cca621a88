"""Peers: the other members of a cluster, as this daemon asks them; who can do it is passed in."""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import IO, Any, Protocol, TypeVar

from mlpd.core.errors import UnavailableError

T = TypeVar("T")


class Peers(Protocol):
    """Asks other daemons; every method belongs to the loop.

    Raises the error that a peer answers, in its class, and UnavailableError: `unreachable`,
    `connection_lost` or `timeout`.
    """

    async def ask(
        self,
        url: str,
        method: str,
        path: str,
        fields: Mapping[str, Any] | None = None,
        *,
        timeout_s: float,
    ) -> Any:
        """Return the value of the answer to a call with a body of `fields`; `path` is encoded."""
        ...

    async def fetch(self, url: str, path: str, file: IO[bytes], *, timeout_s: float) -> None:
        """Write the body of an answer to an open file, as it comes."""
        ...

    async def close(self) -> None:
        """Close all connections; idempotent."""
        ...


class NoPeers:
    """Of a daemon without a network: nobody can be reached."""

    async def ask(
        self,
        url: str,
        method: str,  # noqa: ARG002 - as `Peers`
        path: str,  # noqa: ARG002
        fields: Mapping[str, Any] | None = None,  # noqa: ARG002
        *,
        timeout_s: float,  # noqa: ARG002
    ) -> Any:
        """Raise UnavailableError(code="unreachable")."""
        raise _nobody(url)

    async def fetch(
        self,
        url: str,
        path: str,  # noqa: ARG002 - as `Peers`
        file: IO[bytes],  # noqa: ARG002
        *,
        timeout_s: float,  # noqa: ARG002
    ) -> None:
        """Raise UnavailableError(code="unreachable")."""
        raise _nobody(url)

    async def close(self) -> None:
        """There is nothing to be closed."""


def _nobody(url: str) -> UnavailableError:
    return UnavailableError(f"this daemon can't reach {url}: it has no network", code="unreachable")


async def together(*work: Coroutine[Any, Any, T]) -> list[T]:
    """Return what all give, in order; if one fails the others are cancelled, and have ended."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
