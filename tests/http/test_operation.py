"""Health, documentation, metrics, starting and stopping."""

import stat
from pathlib import Path
from typing import Any

import pytest

import mlpd
from mlpd.client import Client
from mlpd.core.config import ServerConfig
from mlpd.core.errors import UnavailableError
from mlpd.http.server import HttpServer
from tests.http import edge as edges

DOCS = Path(mlpd.__file__).parent / "docs"


def test_while_not_ready_only_health_answers(fresh: Any) -> None:
    fresh.daemon.ready = False
    assert fresh.call("GET", "/healthz")[0] == 200
    assert fresh.call("GET", "/v2/health/live")[0] == 200
    for path in ("/readyz", "/v2/health/ready", "/v1/status", "/metrics", "/v1/models"):
        status, value, headers = fresh.call("GET", path)
        assert (status, headers["retry-after"]) == (503, "1")
        assert "starting or stopping" in str(value["error"])
    with Client(fresh.url) as client, pytest.raises(UnavailableError):
        client.wait_ready(timeout_s=0.2)
    fresh.daemon.ready = True
    with Client(fresh.url) as client:
        client.wait_ready(timeout_s=40)


def test_the_unix_socket_is_its_owners_alone_and_goes_with_the_server(tmp_path: Path) -> None:
    with edges.serve(tmp_path) as running:
        path = tmp_path / "mlpd.sock"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with Client(running.socket_url) as client:
            assert client.status()["data_directory"] == str(tmp_path)
    assert not path.exists()


async def test_a_port_in_use_is_refused_by_name(edge: Any, tmp_path: Path) -> None:
    port = int(edge.host.rpartition(":")[2])
    server = HttpServer(ServerConfig(port=port), [], lambda *_: None)
    with pytest.raises(UnavailableError, match=f"port {port}") as caught:
        await server.start(tmp_path / "mlpd.sock")
    await server.stop()
    assert caught.value.code == "port_in_use"


async def test_a_directory_too_deep_for_a_socket_is_served_over_tcp(tmp_path: Path) -> None:
    server = HttpServer(ServerConfig(port=0), [], lambda *_: None)
    await server.start(tmp_path / ("d" * 120) / "mlpd.sock")
    assert server.url.startswith("http://127.0.0.1:")
    await server.stop()


def test_every_page_of_the_documentation_is_served(edge: Any) -> None:
    listed = edge.call("GET", "/docs")[1].decode()
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).as_posix()
        assert f"(/docs/{name})" in listed
        status, body, headers = edge.call("GET", f"/docs/{name}")
        assert (status, body) == (200, page.read_bytes())
        assert headers["content-type"].startswith("text/markdown")


@pytest.mark.parametrize(
    "page", ["../mlpd/http/api.py", "..%2f..%2fpyproject.toml", "formats/../../__init__.py", "x.md"]
)
def test_nothing_else_is_served_as_documentation(edge: Any, page: str) -> None:
    assert edge.call("GET", f"/docs/{page}")[0] == 404


def test_metrics_count_requests_by_route_and_code(edge: Any) -> None:
    edge.call("GET", "/v1/models/nothing")
    status, body, headers = edge.call("GET", "/metrics")
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/plain")
    assert 'mlpd_http_requests_total{route="/v1/models/{name}",code="404"}' in body.decode()
    openmetrics = "application/openmetrics-text; version=1.0.0"
    _, body, headers = edge.call("GET", "/metrics", headers={"Accept": openmetrics})
    assert headers["content-type"].startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_the_audit_finds_no_difference(client: Client) -> None:
    found = client.run_consistency()
    assert found["rows_compared"] > 0
    assert found["mismatches"] == 0
    assert client.consistency()["last"] == found
