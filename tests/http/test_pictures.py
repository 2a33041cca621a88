"""Pictures of a version over HTTP, by version and by run."""

from typing import Any
from xml.etree import ElementTree as ET

import pytest

from mlpd.client import Client
from mlpd.core.errors import NotFoundError
from mlpd.registry.manifest import PICTURES


@pytest.mark.parametrize("picture", PICTURES)
def test_a_version_and_its_run_show_the_same(edge: Any, client: Client, picture: str) -> None:
    path = f"/v1/models/risk/versions/champion/pictures/{picture}"
    status, body, headers = edge.call("GET", path)
    assert (status, headers["content-type"]) == (200, "image/svg+xml")
    assert headers["content-security-policy"] == "default-src 'none'"
    assert ET.fromstring(body).tag == "{http://www.w3.org/2000/svg}svg"
    assert client.models.picture("risk", "champion", picture) == body.decode()
    assert client.runs.picture(edge.run_id, picture) == body.decode()


def test_what_is_not_there_is_named(edge: Any, client: Client) -> None:
    with pytest.raises(NotFoundError, match="has no picture") as raised:
        client.models.picture("risk", 1, "lineage")
    assert raised.value.code == "unknown_picture"
    assert "importance, contributions" in raised.value.hint
    assert edge.call("GET", "/v1/models/risk/versions/1/pictures/..%2Freport")[0] == 404
    with pytest.raises(NotFoundError):
        client.runs.picture("nobody", "roc")
