"""Reproducing over HTTP: one answer, and a training that ends with the client that asked."""

import http.client
import time
from typing import Any

import pytest

from mlpd.client import Client
from mlpd.core.errors import MlpdError
from tests.conftest import children_with


def children() -> set[int]:
    return children_with("reproduce")


def wait_for(condition: Any) -> None:
    stop = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < stop
        time.sleep(0.01)


def test_the_champion_comes_out_again(client: Client) -> None:
    found = client.models.reproduce("risk")
    assert (found["version"], found["verdict"]) == ("risk@1", "reproduced")
    assert all(check["same"] for check in found["checks"])


def test_an_unknown_version_is_named(client: Client) -> None:
    with pytest.raises(MlpdError) as raised:
        client.models.reproduce("risk", 99)
    assert raised.value.code == "unknown_version"


def test_nobody_waits_so_nothing_is_trained(edge: Any) -> None:
    connection = http.client.HTTPConnection(edge.host, timeout=30)
    connection.request("POST", "/v1/models/risk/versions/1/reproduce")
    wait_for(children)
    connection.close()
    wait_for(lambda: not children())
    assert edge.call("GET", "/readyz")[0] == 200
