"""What answers at a URL is no daemon: said by name, wherever it is met; and nothing is changed."""

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from click.testing import CliRunner

from mlpd.cli.main import main
from mlpd.client import Client
from mlpd.cluster.members import connections
from mlpd.cluster.moving import spread
from mlpd.cluster.router.app import Router, RouterConfig
from mlpd.core.errors import UnavailableError
from tests.cluster import moving as t

pytestmark = pytest.mark.timeout(300)
ANSWERS = {"object": b"{}", "list": b"[1]", "page": b"<html></html>", "map": b'{"map": null}'}


@pytest.fixture(params=ANSWERS.values(), ids=ANSWERS.keys())
def stranger(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a program that says 200 to everything."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            kind = "text/html" if request.param.startswith(b"<") else "application/json"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(request.param)))
            self.end_headers()
            self.wfile.write(request.param)

        do_GET = do_POST = do_PUT = answer  # noqa: N815 - http.server calls them

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_stranger_is_no_member_and_becomes_none(
    three: Any, cluster_module: Any, stranger: str
) -> None:
    made = cluster_module.give_map(three)
    mlpd = CliRunner(env={"COLUMNS": "200", "MLPD_URL": three[0].url})
    for words in (
        ["shard", "add", f"z={stranger}", "--yes"],
        ["shard", "init", f"z={stranger}"],
        ["shard", "list", "--url", stranger],
    ):
        found = mlpd.invoke(main, words)
        assert found.exit_code == 1, (words, found.output)
        assert "[internal]" not in found.output, found.output
    assert t.map_at(three[0].url) == made
    assert json.loads(mlpd.invoke(main, ["shard", "status", "--json"]).output)["epoch"] == 1


def test_a_stranger_in_the_place_of_a_member_is_named_and_nothing_moves(
    three: Any, cluster_module: Any, stranger: str
) -> None:
    m = cluster_module
    shards = [m.Shard("a", three[0].url), m.Shard("b", three[1].url), m.Shard("c", stranger)]
    made = m.first_map("0f" * 16, shards)
    for shard in shards[:2]:
        with Client(shard.url) as client:
            client.cluster.put_map(made.to_dict(), shard=shard.name, expected=0)
    mlpd = CliRunner(env={"COLUMNS": "200", "MLPD_URL": three[0].url})
    for words in (["move", "0-99", "--to", "b", "--yes"], ["cancel", "--yes"]):
        found = mlpd.invoke(main, ["shard", *words])
        assert found.exit_code == 1, found.output
        assert f"what answers at {stranger} is no mlpd daemon" in found.output.replace("\n", " ")
    status = json.loads(mlpd.invoke(main, ["shard", "status", "--json"]).output)
    assert [one["state"] for one in status["shards"]] == ["ok", "ok", "no answer"]
    assert t.map_at(three[0].url) == made
    with connections("test") as connect:  # what a command tells all of a map passes it over
        assert spread(made.next(made.shards, made.owners), connect) in (["c"], [])
    assert [t.map_at(edge.url).epoch for edge in three[:2]] == [2, 2]


def test_a_client_of_strangers_says_so(stranger: str) -> None:
    with Client([stranger, stranger]) as client, pytest.raises(UnavailableError) as raised:
        client.feedback([])
    assert (raised.value.code, bool(raised.value.hint)) == ("no_daemon", True)


def test_a_router_of_strangers_waits(stranger: str) -> None:
    async def ready() -> bool:
        router = Router(RouterConfig((stranger,)))
        try:
            await router.start()
            return router.members.ready
        finally:
            await router.stop()

    assert not asyncio.run(ready())
