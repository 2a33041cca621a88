"""One keep-alive HTTP/1.1 connection over a socket, with as little as a daemon's answers need.

http.client spends about 140 us of CPU more per call, most of it in the parser of mail headers.
Answers come with a Content-Length or in chunks; both are bounded.
"""

import contextlib
import select
import socket
import time
from collections.abc import Callable

from mlpd.client.requests import Answer, FileBody, Request, Told, saving
from mlpd.core.address import Address
from mlpd.core.errors import InternalError, TooLargeError, UnavailableError

HEAD_BYTES_MAX = 64 * 1024
BODY_BYTES_MAX = 2 * 1024**3
_RECEIVE_BYTES = 256 * 1024
_SEND_BYTES = 1024 * 1024
"""Of a file in memory."""
_BLANK_LINE = b"\r\n\r\n"


class Connection:
    """Sends one request at a time; not for two threads at once."""

    def __init__(self, address: Address, timeout_s: float) -> None:
        self._address = address
        self._socket = _connect(address, timeout_s)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._rest = b""
        self.reusable = True

    @property
    def is_stale(self) -> bool:
        """Whether the daemon has closed an idle connection (or sent what nobody asked for)."""
        return bool(self._poll.poll(0))

    def close(self) -> None:
        """Close; idempotent."""
        self.reusable = False
        self._socket.close()

    def exchange(self, request: Request, head: bytes, timeout_s: float) -> Answer:
        """Return the answer to a request whose head, up to the blank line, is `head`.

        `timeout_s` is for all of it.  After any error the connection must be closed.
        Raises UnavailableError: `timeout`, `connection_lost`.
        """
        deadline_s = time.monotonic() + timeout_s
        try:
            self._socket.settimeout(timeout_s)
            if isinstance(request.body, FileBody):
                self._send_file(head, request.body, request.told, deadline_s)
            else:
                self._socket.sendall(head + (request.body or b""))
            return self._receive(request, deadline_s)
        except TimeoutError:
            raise _timed_out(self._address, timeout_s) from None
        except OSError as error:
            raise _lost(self._address, str(error)) from None

    def _send_file(self, head: bytes, body: FileBody, told: Told | None, deadline_s: float) -> None:
        """Send a body in parts, until it ends or the daemon has answered: it refuses early."""
        self._socket.sendall(head)
        sent = 0
        with body.path.open("rb") as file:
            while part := file.read(_SEND_BYTES):
                if self._poll.poll(0):
                    self.reusable = False
                    return
                self._socket.settimeout(max(deadline_s - time.monotonic(), 1e-3))
                self._socket.sendall(part)
                sent += len(part)
                if told is not None:
                    told("sent", sent, body.size_bytes)
        if sent != body.size_bytes:
            raise InternalError(f"{body.path} changed while it was sent", code="file_changed")

    def _receive(self, request: Request, deadline_s: float) -> Answer:
        head = self._read_until(_BLANK_LINE, HEAD_BYTES_MAX, deadline_s)
        status, headers = parse_head(head)
        if headers.get("connection", "").lower() == "close":
            self.reusable = False
        if headers.get("transfer-encoding", "").lower() == "chunked":
            return Answer(status, headers, self._read_chunks(deadline_s))
        length = _length(headers)
        if request.to is not None and status < 400:  # noqa: PLR2004 - the statuses of errors
            with saving(request.to) as write:
                self._save(write, length, request.told, deadline_s)
            return Answer(status, headers, b"", saved=request.to)
        if length > BODY_BYTES_MAX:
            raise _too_large(length)
        return Answer(status, headers, self._read_exactly(length, deadline_s))

    def _save(
        self, write: Callable[[bytes], None], length: int, told: Told | None, deadline_s: float
    ) -> None:
        received = 0
        while received < length:
            part = self._read_exactly(min(length - received, _SEND_BYTES), deadline_s)
            write(part)
            received += len(part)
            if told is not None:
                told("received", received, length)

    def _read_chunks(self, deadline_s: float) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            line = self._read_until(b"\r\n", HEAD_BYTES_MAX, deadline_s)
            count = _chunk_size(line)
            size += count
            if size > BODY_BYTES_MAX:
                raise _too_large(size)
            if count == 0:
                while self._read_until(b"\r\n", HEAD_BYTES_MAX, deadline_s):
                    pass  # trailers
                return b"".join(parts)
            parts.append(self._read_exactly(count, deadline_s))
            self._read_exactly(2, deadline_s)

    def _read_until(self, mark: bytes, bytes_max: int, deadline_s: float) -> bytes:
        data = self._rest
        while (at := data.find(mark)) < 0:
            if len(data) > bytes_max:
                raise InternalError("the answer's head is too long", code="invalid_answer")
            data += self._receive_some(deadline_s)
        self._rest = data[at + len(mark) :]
        return data[:at]

    def _read_exactly(self, count: int, deadline_s: float) -> bytes:
        data = self._rest
        if len(data) < count:
            parts, size = [data], len(data)
            while size < count:
                parts.append(self._receive_some(deadline_s))
                size += len(parts[-1])
            data = b"".join(parts)
        self._rest = data[count:]
        return data[:count]

    def _receive_some(self, deadline_s: float) -> bytes:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._socket.settimeout(left_s)
        data = self._socket.recv(_RECEIVE_BYTES)
        if not data:
            raise _lost(self._address, "it was closed in the middle of an answer")
        return data


def parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    """Return status and headers by lower-case name; raises InternalError for what is no HTTP."""
    first, *lines = head.decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    if not version.startswith("HTTP/1.") or not rest[:3].isdecimal():
        raise InternalError(
            f"what answered doesn't speak HTTP: {first[:60]!r}",
            code="invalid_answer",
            hint="Check the URL.",
        )
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return int(rest[:3]), headers


def build_head(address: Address, request: Request, fixed: str) -> bytes:
    """Return a request's head with the blank line; `fixed` are header lines of every request."""
    body = request.body
    first = f"{request.method} {request.path} HTTP/1.1\r\nHost: {address.host_header}\r\n"
    lines = [first, fixed, f"Accept: {request.accept}\r\n"]
    if body is not None:
        lines.append(f"Content-Type: {request.content_type}\r\nContent-Length: {len(body)}\r\n")
    elif request.method not in ("GET", "DELETE"):
        lines.append("Content-Length: 0\r\n")
    lines += [f"{name}: {_checked(value)}\r\n" for name, value in request.headers.items()]
    return ("".join(lines) + "\r\n").encode("latin-1")


def _checked(value: str) -> str:
    if value.isprintable() and value.isascii():
        return value
    raise InternalError(f"the header value {value!r} can't be sent", code="invalid_header")


def _connect(address: Address, timeout_s: float) -> socket.socket:
    try:
        if address.socket_path is None:
            found = socket.create_connection((address.host, address.port), timeout_s)
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return found
        return _connect_unix(address.socket_path, timeout_s)
    except OSError as error:
        raise UnavailableError(
            f"no daemon answers at {address}: {error.strerror or error}",
            code="unreachable",
            hint="Start it: mlpd serve; or name its URL: http://HOST:PORT or unix:/PATH.",
        ) from None


def _connect_unix(path: str, timeout_s: float) -> socket.socket:
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        found.settimeout(timeout_s)
        found.connect(path)
        stack.pop_all()
        return found


def _length(headers: dict[str, str]) -> int:
    text = headers.get("content-length", "")
    if not text.isdecimal():
        raise InternalError("the answer has no length", code="invalid_answer")
    return int(text)


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    if digits.isalnum() and not set(digits) - set(b"0123456789abcdefABCDEF"):
        return int(digits, 16)
    raise InternalError("the answer's chunks are malformed", code="invalid_answer")


def _too_large(size: int) -> TooLargeError:
    return TooLargeError(
        f"the answer has {size} bytes; the limit is {BODY_BYTES_MAX}", code="answer_too_large"
    )


def _timed_out(address: Address, timeout_s: float) -> UnavailableError:
    return UnavailableError(
        f"{address} did not answer within {timeout_s:.3g} s",
        code="timeout",
        hint="Allow more with timeout_s; it is not known whether the call was carried out.",
    )


def _lost(address: Address, why: str) -> UnavailableError:
    return UnavailableError(
        f"the connection to {address} was lost: {why}",
        code="connection_lost",
        hint="It is not known whether the call was carried out.",
    )
