"""One message out, to a real receiver: what is sent, what is refused, what bad peers can do."""

import socket
import threading
from typing import Any

import pytest

from mlpd.core.errors import DeadlineExceededError, ForbiddenError, UnavailableError
from mlpd.core.targets import Target, parse_networks
from mlpd.daemon.outbound import Outbound
from tests.alerts.receiver import Receiver
from tests.conftest import until

LOOPBACK = parse_networks(["127.0.0.0/8", "::1/128"], "test")


def target(receiver: Receiver, path: str = "/a?b=c") -> Target:
    return Target("http", "127.0.0.1", receiver.port, path)


async def test_a_message_arrives_whole(receiver: Receiver) -> None:
    body = b'{"text": "' + b"x" * 200_000 + b'"}'
    await Outbound(LOOPBACK).post(target(receiver), body, "application/json", {"x-more": "1"})
    (request,) = receiver.received
    assert (request.path, request.body) == ("/a?b=c", body)
    assert request.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["x-more"] == "1"


async def test_interim_answers_are_passed_over(receiver: Receiver) -> None:
    receiver.answer = b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n"
    await Outbound(LOOPBACK).post(target(receiver), b"{}", "application/json")


async def test_a_private_address_is_refused_before_anything_is_connected(
    receiver: Receiver,
) -> None:
    for private in ([], parse_networks(["10.0.0.0/8"], "test")):
        with pytest.raises(ForbiddenError) as refused:
            await Outbound(private).post(target(receiver), b"{}", "application/json")
        assert refused.value.code == "address_not_allowed"
    assert receiver.connections == 0


async def test_a_name_is_judged_by_the_addresses_that_it_resolves_to(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a hostile name server would do: the first answer is public, the second is not.
    answers = iter([["93.184.216.34", "127.0.0.1"], ["127.0.0.1"]])

    def resolve(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        assert host == "rebind.example.org"
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kind, (address, port)) for address in next(answers)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    rebinding = Target("http", "rebind.example.org", receiver.port, "/")
    for _ in range(2):
        with pytest.raises(ForbiddenError):
            await Outbound([]).post(rebinding, b"{}", "application/json")
    assert receiver.connections == 0


async def test_a_redirect_is_an_error_and_not_followed(receiver: Receiver) -> None:
    there = f"http://127.0.0.1:{receiver.port}/elsewhere"
    receiver.answer = f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {there}\r\n\r\n".encode()
    with pytest.raises(UnavailableError, match="answered 307") as refused:
        await Outbound(LOOPBACK).post(target(receiver), b"{}", "application/json")
    assert "not followed" in refused.value.hint
    assert [request.path for request in receiver.received] == ["/a?b=c"]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1",
        b"HTTP/1.1 2000 OK\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\xff\xfe\x00\n",
        b"A" * 100_000,
        b"HTTP/1.1 100 Continue\r\n" + b"A" * 100_000,
        b"HTTP/1.1 500 Oops\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\n\r\n",
        b"HTTP/1.1 429 Too Many Requests\r\n\r\n",
    ],
)
async def test_any_other_answer_is_an_error(receiver: Receiver, answer: bytes) -> None:
    receiver.answer = answer
    with pytest.raises(UnavailableError, match=f"http://127.0.0.1:{receiver.port}"):
        await Outbound(LOOPBACK).post(target(receiver), b"{}", "application/json")


async def test_a_peer_that_says_nothing_is_left_after_the_deadline(receiver: Receiver) -> None:
    receiver.answer = None
    with pytest.raises(DeadlineExceededError, match=r"within 0\.2 s"):
        await Outbound(LOOPBACK, send_s=0.2).post(target(receiver), b"{}", "application/json")


async def test_nobody_there_and_no_such_name(receiver: Receiver) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = Target("http", "127.0.0.1", unused.getsockname()[1], "/")
        with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:\d+: Connection refused"):
            await Outbound(LOOPBACK).post(nobody, b"{}", "application/json")
    nowhere = Target("http", "no-such-host.invalid", receiver.port, "/")
    with pytest.raises(UnavailableError, match=r"no-such-host\.invalid"):
        await Outbound(LOOPBACK).post(nowhere, b"{}", "application/json")


async def test_a_name_server_that_hangs_holds_one_thread_and_no_attempt(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, real, asked = threading.Event(), socket.getaddrinfo, []

    def resolve(host: str, *rest: Any, **named: Any) -> Any:
        asked.append(host)
        answer.wait(40)
        return real("127.0.0.1", *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    outbound = Outbound(LOOPBACK, send_s=0.05)
    named = Target("http", "slow.example.org", receiver.port, "/")
    for _ in range(5):
        with pytest.raises(DeadlineExceededError):
            await outbound.post(named, b"{}", "application/json")
    assert asked == ["slow.example.org"]
    answer.set()
    await until(lambda: not outbound._resolving)
    await Outbound(LOOPBACK).post(named, b"{}", "application/json")
    assert len(receiver.received) == 1
    monkeypatch.undo()


async def test_tls_is_checked(receiver: Receiver) -> None:
    """A peer that speaks no TLS gets no message."""
    with pytest.raises((UnavailableError, DeadlineExceededError)):
        await Outbound(LOOPBACK, send_s=5).post(
            Target("https", "127.0.0.1", receiver.port, "/"), b"{}", "application/json"
        )
    assert receiver.received == []
