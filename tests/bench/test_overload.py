"""The open loop sends what is due, whatever comes back, and counts every fate once."""

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from bench import overload as scenario
from bench.load import Target
from bench.overload import offer, saturate


@pytest.fixture
async def target() -> AsyncIterator[Target]:
    """A server that answers 200, 503 and 504 in turn."""
    statuses = itertools.cycle((200, 503, 504))

    async def answer(request: web.Request) -> web.Response:
        assert request.headers["x-deadline-ms"] == "250"
        assert await request.read() in (b"a", b"b")
        return web.Response(status=next(statuses))

    app = web.Application()
    app.router.add_post("/", answer)
    async with TestServer(app) as server:
        yield Target(str(server.make_url("/")), [b"a", b"b"])


async def test_every_request_has_one_fate(target: Target) -> None:
    tally = await offer(target, per_s=300, seconds=0.3, deadline_s=0.25)
    assert tally.fates["503"] == tally.fates["504"] == 30
    assert len(tally.good_s) + tally.fates["late"] == 30
    assert 0.0 < tally.last_bad_s < 0.3


async def test_beyond_the_connections_nothing_is_sent(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenario, "CONNECTIONS_MAX", 0)
    tally = await offer(target, per_s=100, seconds=0.1, deadline_s=0.25)
    assert (tally.fates, tally.good_s) == ({"unsent": 10}, [])


async def test_patient_clients_ask_again_when_they_are_refused() -> None:
    answers = itertools.count()

    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=503 if next(answers) % 2 else 200)

    app = web.Application()
    app.router.add_post("/", answer)
    async with TestServer(app) as server:
        figures = await asyncio.wait_for(
            saturate(Target(str(server.make_url("/")), [b""]), 1.0), 30
        )
    assert figures["requests_per_s"] > 0.0
    assert next(answers) > 16  # the refused ones as well
