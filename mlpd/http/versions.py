"""Handlers of versions: where they come from, what becomes of them, and of their files."""

import asyncio
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from aiohttp import web

from mlpd.core.errors import NotFoundError
from mlpd.core.names import check_name
from mlpd.core.time import format_time, parse_duration
from mlpd.daemon.app import Daemon
from mlpd.daemon.uploads import ARCHIVE, GOLDEN, MODEL
from mlpd.http.shapes import Field, Shape
from mlpd.http.uploads import CHUNK_BYTES, MULTIPART, TAR, receive_body, receive_parts
from mlpd.http.wire import read_by, read_fields, respond
from mlpd.registry.collect import Garbage
from mlpd.registry.diff import diff_versions
from mlpd.registry.manifest import PICTURE_TYPE, PICTURES
from mlpd.registry.models import Registry
from mlpd.registry.records import CHAMPION, Cause, ModelVersion, VersionState, parse_selector

STATE = Shape(
    {
        "state": Field(
            "text",
            "What the version shall be.",
            required=True,
            choices=("ready", "archived", "quarantined", "deleted"),
        ),
        "why": Field("text", "For the history."),
    }
)
PIN = Shape(
    {
        "pinned": Field("flag", "Whether nothing may delete it.", required=True),
        "why": Field("text", "For the history."),
    }
)
SIGN = Shape(
    {
        "key": Field("text", "The public key, 64 hex digits.", required=True),
        "signature": Field("text", "Ed25519, 128 hex digits.", required=True),
        "why": Field("text", "For the history."),
    }
)
ONE_VERSION = Shape(
    {
        "version": Field("object", "Number, digest, size, state, who and when."),
        "pinned": Field("flag", "Whether nothing deletes it."),
    }
)
COLLECT = Shape(
    {
        "grace": Field("text", "What was needed within this time stays; 7d by default."),
        "keep": Field("integer", "Delete all but so many versions of each model; none by default."),
        "delete": Field("flag", "Do it; without it the answer only says what would go."),
    }
)
COLLECTED = Shape(
    {
        "deleted": Field("flag", "Whether it was done."),
        "versions": Field("rows", "Surplus versions; their blobs go after another grace."),
        "blobs": Field("integer", "Blobs that no version needs."),
        "size_bytes": Field("integer", "Their size."),
        "waiting_blobs": Field("integer", "Blobs that will go after their grace."),
        "waiting_bytes": Field("integer", "Their size."),
    }
)
DIFF = Shape({"to": Field("text", "A version or alias of the model, or model@version.")})
DIFFERENCE = Shape(
    {
        "from": Field("text", "The one version."),
        "to": Field("text", "The other."),
        "same": Field("flag", "Whether they are one manifest."),
        "lineage": Field("rows", "Fields of the lineage that differ: name, from, to."),
        "parameters": Field("rows", "Parameters that differ."),
        "metrics": Field("rows", "All metrics, with their difference."),
        "features": Field("object", "Added, removed, retyped, reordered; gain by feature."),
        "trees": Field("object", "How many, with how many leaves, and how many are equal."),
        "packages": Field("rows", "Packages whose versions differ."),
        "files": Field("rows", "Files whose digests differ."),
    }
)
REPRODUCTION = Shape(
    {
        "version": Field("text", "The version."),
        "verdict": Field("text", "reproduced, or different."),
        "took_s": Field("number", "Seconds of the training and the comparison."),
        "checks": Field("rows", "What was compared, in order: what, same, expected, found."),
        "packages": Field("rows", "Packages that have another version now: name, from, to."),
        "cpu_flags": Field("texts", "Vector extensions that one of the two processors has."),
    }
)
_INERT = {"Content-Security-Policy": "default-src 'none'"}
"""What a browser may do with a picture: show it."""
GRACE = "7d"
UPLOAD = Shape({"why": Field("text", "For the history.")})
GOLDEN_BYTES_MAX = 16 << 20


class VersionHandlers:
    """Takes versions in and out, changes their states, collects what nothing needs."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def set_state(self, request: web.Request) -> web.Response:
        """Make a version ready, archived, quarantined or deleted; deleted is for good.

        Out of quarantine every file is verified first.
        """
        fields = await read_fields(request, STATE)
        version = find_version(self._daemon.registry, request)
        changed = await self._daemon.models_verb.set_state(
            version.name,
            version.number,
            VersionState(fields["state"]),
            Cause(read_by(request), fields["why"] or ""),
        )
        return await respond(request, self._one_version(changed))

    async def pin(self, request: web.Request) -> web.Response:
        """Make a version one that nothing deletes, or no longer so."""
        fields = await read_fields(request, PIN)
        version = find_version(self._daemon.registry, request)
        cause = Cause(read_by(request), fields["why"] or "")
        registry = self._daemon.registry
        await registry.pin(version.name, version.number, fields["pinned"], cause)
        return await respond(request, self._one_version(version))

    async def register(self, request: web.Request) -> web.Response:
        """Store an ONNX file as the model's next version, once a child process has looked at it.

        The body is the file itself, or a form with the parts `model` and, optionally, `golden`:
        `{"inputs": [...], "outputs": [...], "rtol": 1e-6}` with tensors as in /v2, which every
        load must reproduce.
        """
        uploads, options = self._daemon.uploads, UPLOAD.read_query(request.query)
        name = check_name(request.match_info["name"], "model")
        async with uploads.folder() as directory:
            if request.content_type == MULTIPART:
                parts = {"model": (MODEL, uploads.bytes_max), "golden": (GOLDEN, GOLDEN_BYTES_MAX)}
                await receive_parts(request, directory, parts, required="model")
            else:
                await receive_body(request, directory / MODEL, uploads.bytes_max)
            cause = Cause(read_by(request), options["why"] or "")
            version = await uploads.register(name, directory, cause)
        return await respond(request, self._one_version(version))

    async def adopt(self, request: web.Request) -> web.Response:
        """Store the version in an OCI archive under its own name, digest and all."""
        uploads, options = self._daemon.uploads, UPLOAD.read_query(request.query)
        async with uploads.folder() as directory:
            await receive_body(request, directory / ARCHIVE, uploads.bytes_max)
            cause = Cause(read_by(request), options["why"] or "")
            version = await uploads.adopt(directory, cause)
        return await respond(request, self._one_version(version))

    async def archive(self, request: web.Request) -> web.StreamResponse:
        """Return a version as an OCI archive, which `skopeo` and `mlpd models import` read."""
        version = find_version(self._daemon.registry, request)
        with await asyncio.to_thread(self._daemon.uploads.open_temporary) as file:
            await self._daemon.registry.export(version.name, version.number, file)
            response = web.StreamResponse(headers={"Content-Type": TAR})
            response.content_length = file.tell()
            file.seek(0)
            await response.prepare(request)
            while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                await response.write(chunk)
            await response.write_eof()
        return response

    async def sign(self, request: web.Request) -> web.Response:
        """Store a signature over the version's digest, once it has been verified."""
        fields = await read_fields(request, SIGN)
        version = find_version(self._daemon.registry, request)
        cause = Cause(read_by(request), fields["why"] or "")
        await self._daemon.registry.sign(
            *(version.name, version.number, fields["key"], fields["signature"]), cause
        )
        return await respond(request, self._one_version(version))

    async def diff(self, request: web.Request) -> web.Response:
        """Return what changes from this version to another, by default the champion.

        Lineage, parameters, metrics, features with their share of the gain, trees, files.
        """
        registry, old = self._daemon.registry, find_version(self._daemon.registry, request)
        text = DIFF.read_query(request.query)["to"] or CHAMPION
        new = registry.resolve(text if "@" in text else f"{old.name}@{text}")
        loaded = [await registry.load(v.name, v.number) for v in (old, new)]
        return await respond(request, await asyncio.to_thread(diff_versions, *loaded))

    async def reproduce(self, request: web.Request) -> web.Response:
        """Return how the version compares with one trained again from its lineage, just now.

        Answers when the training is done; when the client goes away it ends.  Nothing is kept.
        """
        version = find_version(self._daemon.registry, request)
        return await respond(request, await self._daemon.reproduce.run(version))

    async def picture(self, request: web.Request) -> web.Response:
        """Return a picture of the version as SVG: importance, contributions, learning ..."""
        version = find_version(self._daemon.registry, request)
        return await picture_of(self._daemon.registry, version, request)

    async def collect(self, request: web.Request) -> web.Response:
        """Remove files of deleted versions after a grace period; a dry run unless told otherwise.

        With `keep` surplus versions are deleted too: not those that are pinned, served, under an
        alias or one of the last ten that an alias left, nor younger than the grace.
        """
        fields = await read_fields(request, COLLECT)
        delete = bool(fields["delete"])
        found = await self._daemon.models_verb.collect(
            Cause(read_by(request), "surplus"),
            grace_us=parse_duration(fields["grace"] or GRACE, "grace"),
            keep=fields["keep"],
            dry_run=not delete,
        )
        answer = {
            "deleted": delete,
            "versions": [version_form(version) for version in found.versions],
            "blobs": len(found.blobs),
            "size_bytes": _size_bytes(found.blobs),
            "waiting_blobs": len(found.waiting),
            "waiting_bytes": _size_bytes(found.waiting),
        }
        return await respond(request, answer)

    def _one_version(self, version: ModelVersion) -> dict[str, Any]:
        pinned = version.number in self._daemon.registry.pins(version.name)
        return {"version": version_form(version), "pinned": pinned}


def find_version(registry: Registry, request: web.Request) -> ModelVersion:
    """Return the version that the path names, by number or alias."""
    selector = parse_selector(request.match_info["version"])
    return registry.get(request.match_info["name"], selector)


async def picture_of(
    registry: Registry, version: ModelVersion, request: web.Request
) -> web.Response:
    """Return the picture that the path names; raises NotFoundError(code="unknown_picture")."""
    name = request.match_info["picture"]
    manifest = await registry.load_manifest(version.name, version.number)
    there = [picture for picture in PICTURES if f"{picture}.svg" in manifest.files]
    if name not in there:
        raise NotFoundError(
            f"version {version.reference} has no picture {name!r}",
            code="unknown_picture",
            hint=f"It has: {', '.join(there) or 'none'}.",
        )
    drawn = await registry.load_file(version.name, version.number, f"{name}.svg")
    return web.Response(body=drawn, content_type=PICTURE_TYPE, headers=_INERT)


def version_form(version: ModelVersion) -> dict[str, Any]:
    """Return a version as it is shown."""
    form = asdict(version) | {"created": format_time(version.created_us)}
    del form["created_us"]
    return form


def _size_bytes(blobs: Iterable[Garbage]) -> int:
    return sum(blob.size_bytes for blob in blobs)
