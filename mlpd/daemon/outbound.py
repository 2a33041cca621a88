"""Messages out: one POST to a checked target, over a connection to the address that was checked.

Written by hand over asyncio's streams: an HTTP client would resolve the name again behind the
check, follow redirects, and read an answer of any size.
"""

import asyncio
import contextlib
import os
import re
import socket
import ssl
import threading
from collections.abc import Mapping, Sequence
from functools import partial

from mlpd.core.errors import DeadlineExceededError, UnavailableError
from mlpd.core.targets import Network, Target, check_addresses

SEND_S = 10.0
"""What one attempt may take in all, from the name's resolution to the answer's status."""

LINE_BYTES_MAX = 1024

_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: [^\r\n]*)?\r?\n")


class Outbound:
    """Sends to targets; any number at once, on the loop."""

    def __init__(self, private: Sequence[Network], *, send_s: float = SEND_S) -> None:
        self._private = private
        self._send_s = send_s
        self._tls: ssl.SSLContext | None = None
        self._resolving: dict[tuple[str, int], asyncio.Future[list[str]]] = {}

    async def post(
        self,
        target: Target,
        body: bytes,
        content_type: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send `body` and return once it was answered 2xx.

        Raises ForbiddenError for an address that isn't allowed, DeadlineExceededError, and
        UnavailableError: no such name, no connection, or another answer; a redirect is one.
        """
        try:
            async with asyncio.timeout(self._send_s):
                status = await self._exchange(target, _request(target, body, content_type, headers))
        except TimeoutError:
            raise DeadlineExceededError(
                f"{target} did not answer within {self._send_s:g} s", code="target_timeout"
            ) from None
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            raise UnavailableError(f"{target}: {_name(error)}", code="target_unreachable") from None
        if not 200 <= status < 300:  # noqa: PLR2004 - what HTTP calls success
            redirected = 300 <= status < 400  # noqa: PLR2004
            raise UnavailableError(
                f"{target} answered {status}",
                code="target_refused",
                hint="Redirects are not followed: set the final URL." if redirected else "",
                details={"status": status},
            )

    async def _exchange(self, target: Target, request: bytes) -> int:
        found = await self._resolve(target)
        addresses = check_addresses(found, self._private, target.host)
        reader, writer = await self._connect(target, addresses)
        try:
            writer.write(request)
            await writer.drain()
            while (status := _parse_status(await reader.readuntil(b"\n"))) < 200:  # noqa: PLR2004
                while await reader.readuntil(b"\n") not in (b"\r\n", b"\n"):
                    pass  # headers of an interim answer
            return status
        finally:
            # Not closed gracefully: a peer that says nothing would be waited for.
            writer.transport.abort()

    async def _resolve(self, target: Target) -> list[str]:
        """Return the addresses of a target's name.

        A name server that hangs holds one thread for each name, however often it is tried, and none
        of the loop's executor, which others need; the process doesn't wait for it to end.
        """
        key = target.host, target.port
        pending = self._resolving.get(key)
        if pending is None:
            pending = self._resolving[key] = asyncio.get_running_loop().create_future()
            pending.add_done_callback(lambda _: self._resolving.pop(key, None))
            work = partial(_resolve, key, pending)
            threading.Thread(target=work, name="mlpd-resolve", daemon=True).start()
        return await asyncio.shield(pending)

    async def _connect(
        self, target: Target, addresses: Sequence[str]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        tls = await self._context() if target.scheme == "https" else None
        name = target.host if tls else None
        failure: OSError | None = None
        for address in addresses:
            try:
                return await asyncio.open_connection(
                    address, target.port, ssl=tls, server_hostname=name, limit=LINE_BYTES_MAX
                )
            except OSError as error:
                failure = error
        raise failure or OSError("the name has no address")

    async def _context(self) -> ssl.SSLContext:
        if self._tls is None:  # reading the system's certificates takes 20 ms
            self._tls = await asyncio.to_thread(ssl.create_default_context)
        return self._tls


def _resolve(key: tuple[str, int], pending: "asyncio.Future[list[str]]") -> None:
    found: list[str] = []
    failure: OSError | UnicodeError | None = None
    try:
        infos = socket.getaddrinfo(*key, type=socket.SOCK_STREAM)
        found = [str(info[4][0]) for info in infos]
    except (OSError, UnicodeError) as error:
        failure = error
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        pending.get_loop().call_soon_threadsafe(_settle, pending, found, failure)


def _settle(
    pending: "asyncio.Future[list[str]]", found: list[str], failure: Exception | None
) -> None:
    if pending.done():
        return
    if failure is None:
        pending.set_result(found)
    else:
        pending.set_exception(failure)
        pending.exception()  # looked at: the attempt that asked may have timed out


def _request(
    target: Target, body: bytes, content_type: str, headers: Mapping[str, str] | None
) -> bytes:
    fields = {
        "Host": target.authority,
        "User-Agent": "mlpd",
        "Content-Type": content_type,
        "Content-Length": str(len(body)),
        "Connection": "close",
        **(headers or {}),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {target.path} HTTP/1.1\r\n{head}\r\n".encode("ascii") + body


def _name(error: Exception) -> str:
    """Return what went wrong, in a line: the system's words where it is the system's error."""
    if isinstance(error, ConnectionError) and error.errno:
        return os.strerror(error.errno)
    return " ".join(str(error).split())[:200] or type(error).__name__


def _parse_status(line: bytes) -> int:
    found = _STATUS.fullmatch(line)
    if found is None:
        raise ValueError("the answer is not HTTP")
    return int(found[1])
