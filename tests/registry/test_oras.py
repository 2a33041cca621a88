"""`oras` (from PyPI) pulls a version out of the registry's directory, behind a plain OCI server."""

import asyncio
import hashlib
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import oras.client
import pytest

from mlpd.registry.models import Registry
from mlpd.registry.records import Cause, ModelVersion
from mlpd.registry.referrers import SIGNATURE_TYPE
from mlpd.registry.signing import create_key, sign, verify


class Distribution(BaseHTTPRequestHandler):
    """The read half of the OCI distribution protocol over a layout: what any registry does."""

    root: Path

    def do_GET(self) -> None:
        kind, _, reference = self.path.removeprefix("/v2/clf/").partition("/")
        if kind == "manifests":
            entries = json.loads((self.root / "index.json").read_bytes())["manifests"]
            known = {e["annotations"].get("org.opencontainers.image.ref.name"): e for e in entries}
            known |= {entry["digest"]: entry for entry in entries}
            self.send(known[reference]["mediaType"], known[reference]["digest"])
        else:
            assert kind == "blobs"
            self.send("application/octet-stream", reference)

    def send(self, media_type: str, digest: str) -> None:
        content = (self.root / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(root: Path) -> Iterator[str]:
    handler = type("Served", (Distribution,), {"root": root})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
async def version(
    registry: Registry, files: dict[str, bytes | Path], lineage: dict[str, Any]
) -> ModelVersion:
    return await registry.register("clf", files, lineage, Cause("tester"))


def test_pull_restores_every_file_by_its_name(
    served: str, version: ModelVersion, files: dict[str, bytes], root: Path, tmp_path: Path
) -> None:
    client = oras.client.OrasClient(insecure=True)
    try:
        pulled = client.pull(target=f"{served}/clf:{version.tag}", outdir=str(tmp_path / "out"))
        manifest = client.get_manifest(f"{served}/clf:{version.tag}")
    finally:
        client.session.close()
    restored = {Path(path).name: Path(path).read_bytes() for path in pulled}
    lineage = restored.pop("lineage.json")
    assert restored == files
    digests = {entry["digest"] for entry in manifest["layers"]}
    assert f"sha256:{hashlib.sha256(lineage).hexdigest()}" in digests
    assert json.loads((root / "blobs/sha256" / version.digest[7:]).read_bytes()) == manifest


async def test_signatures_are_discovered_and_pulled(
    served: str, version: ModelVersion, registry: Registry, tmp_path: Path
) -> None:
    key = create_key(tmp_path / "k.pem")
    signed = sign(tmp_path / "k.pem", version.digest)
    await registry.sign(version.name, version.number, *signed, Cause("tester"))
    client = oras.client.OrasClient(insecure=True)
    try:
        # What `oras discover` does with a registry that has no referrers API.
        tag = version.digest.replace(":", "-")
        listing = await asyncio.to_thread(
            client.do_request, f"http://{served}/v2/clf/manifests/{tag}"
        )
        (entry,) = listing.json()["manifests"]
        assert entry["artifactType"] == SIGNATURE_TYPE
        pulled = await asyncio.to_thread(
            partial(
                client.pull,
                target=f"{served}/clf@{entry['digest']}",
                outdir=str(tmp_path / "out"),
            )
        )
    finally:
        client.session.close()
    (path,) = map(Path, pulled)
    content = json.loads(path.read_bytes())
    assert (content["key"], content["signature"]) == signed == (key, content["signature"])
    assert verify(content["key"], content["signature"], version.digest)
