"""Peers over HTTP: what this daemon asks the other members of its cluster."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import IO, Any

import aiohttp
import msgpack
import yarl

from mlpd.core.address import Address, parse_address
from mlpd.core.errors import UnavailableError
from mlpd.core.media import MSGPACK
from mlpd.core.remote import error_of
from mlpd.http.uploads import CHUNK_BYTES
from mlpd.http.wire import BY, encode

CONNECT_S = 1.0
"""What connecting may take."""
LARGE_BYTES = 64 * 1024
"""An answer of this size takes about 0.5 ms to decode."""
ERROR_BYTES_MAX = 1 << 20


class HttpPeers:
    """Asks daemons by URL, each over connections that stay open; on the loop, `close` it."""

    def __init__(self) -> None:
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    async def ask(
        self,
        url: str,
        method: str,
        path: str,
        fields: Mapping[str, Any] | None = None,
        *,
        timeout_s: float,
    ) -> Any:
        """Return the value of the answer; raises as `Peers`."""
        headers = {"Accept": MSGPACK, BY: "peer"}
        body = None
        if fields is not None:
            headers["Content-Type"] = MSGPACK
            body = encode(fields, MSGPACK)
        async with self.open(url, method, path, headers, body, timeout_s=timeout_s) as answer:
            await _check(answer)
            data = await answer.read()
        if len(data) > LARGE_BYTES:
            return await asyncio.to_thread(msgpack.unpackb, data, strict_map_key=False)
        return msgpack.unpackb(data, strict_map_key=False)

    async def fetch(self, url: str, path: str, file: IO[bytes], *, timeout_s: float) -> None:
        """Write the body of an answer to a file; raises as `Peers`, and OSError of the disk."""
        headers = {"Accept": "*/*", BY: "peer"}
        async with self.open(url, "GET", path, headers, None, timeout_s=timeout_s) as answer:
            await _check(answer)
            async for part in answer.content.iter_chunked(CHUNK_BYTES):
                await asyncio.to_thread(file.write, part)

    @asynccontextmanager
    async def open(
        self,
        url: str,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: Any,
        *,
        timeout_s: float,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Yield an answer, whatever its status, whose body is still to be read.

        `body`: bytes, or an async iterator of them.  Raises UnavailableError, also in the block.
        """
        address = parse_address(url)
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(CONNECT_S, timeout_s))
        try:
            async with self._session(url, address).request(
                *(method, yarl.URL(f"http://{address.host_header}{path}", encoded=True)),
                data=body,
                headers={"Accept-Encoding": "identity", **headers},
                timeout=timeout,
                allow_redirects=False,
                skip_auto_headers=("Content-Type", "User-Agent"),
            ) as answer:
                yield answer
        except (TimeoutError, aiohttp.ClientError) as error:
            raise _no_answer(url, error) from None

    async def close(self) -> None:
        """Close all connections; idempotent."""
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            await session.close()

    def _session(self, url: str, address: Address) -> aiohttp.ClientSession:
        """Return a peer's session; a map has at most 1,000 members, and few leave it."""
        if url not in self._sessions:
            self._sessions[url] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector()
                if address.socket_path is None
                else aiohttp.UnixConnector(address.socket_path),
                auto_decompress=False,
            )
        return self._sessions[url]


async def _check(answer: aiohttp.ClientResponse) -> None:
    if not answer.ok:
        body = await answer.content.read(ERROR_BYTES_MAX)
        raise error_of(answer.status, body, answer.headers.get("Retry-After", ""))


def _no_answer(url: str, error: Exception) -> UnavailableError:
    code = "connection_lost"
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ServerTimeoutError):
        code = "unreachable"
    elif isinstance(error, TimeoutError):
        code = "timeout"
    return UnavailableError(
        f"the daemon at {url} gave no answer: {str(error) or type(error).__name__}",
        code=code,
        hint="mlpd shard status shows who answers.",
    )
