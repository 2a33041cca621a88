"""A version whose files are gone: its route says so, the others go on, and it can be mended."""

from pathlib import Path
from typing import Any

import pytest

from mlpd.client import Client
from mlpd.core.errors import ConflictError, NotFoundError, UnavailableError
from tests.http import edge as edges

ROW = {"user": "a", "age": 0.5}


def route(version: str) -> dict[str, Any]:
    return {"service": "risk", "arms": [{"name": "a", "model": f"risk@{version}"}]}


def lose(edge: Any, version: int) -> None:
    """Remove the ONNX file of a version, as a broken disk would."""
    record = edge.daemon.registry.get("risk", version)
    store = edge.daemon.registry._store
    files = {file.digest for file in store.load_manifest(record).blobs}
    other = edge.daemon.registry.get("risk", 3 - version)
    shared = {file.digest for file in store.load_manifest(other).blobs}
    for digest in files - shared:
        store._blobs.path(digest).unlink()


def test_a_route_whose_version_vanished_is_broken_alone_and_can_be_mended(tmp_path: Path) -> None:
    with edges.serve(tmp_path / "data") as edge:
        edges.fill(edge)
        edges.train_another(edge)
        with Client(edge.url) as client:
            client.routes.put("first", route("1"))
            client.routes.put("second", route("2"))
            with pytest.raises(NotFoundError):
                client.routes.put("third", route("7"))
            with pytest.raises(ConflictError) as refused:
                client.models.set_state("risk", 2, "deleted", why="gone")
            assert refused.value.code == "version_in_use"
        lose(edge, 1)
        with Client(edge.url) as client:  # what is in memory serves on
            assert client.predict("first", [ROW])["predictions"][0]["version"] == 1
    with edges.serve(tmp_path / "data") as edge, Client(edge.url) as client:
        with pytest.raises(UnavailableError) as caught:
            client.predict("first", [ROW])
        assert caught.value.code == "route_broken"
        assert "roll it back or point it at another version" in caught.value.hint
        shown = client.routes.get("first")
        assert (shown["serving"], bool(shown["error"])) == (None, True)
        assert client.predict("second", [ROW])["predictions"][0]["version"] == 2
        before = client.routes.get("second")
        with pytest.raises(ConflictError):  # an arm that can't be loaded changes nothing
            client.routes.put("second", {**route("2"), "shadows": ["risk@1"]})
        assert client.routes.get("second") == before
        mended = client.routes.put("first", route("2"))
        assert (mended["serving"], mended["error"]) == ({"a": "risk@2"}, None)
        assert client.predict("first", [ROW])["predictions"][0]["version"] == 2
