"""Handlers of the Open Inference Protocol v2: JSON, and tensors as bytes after it.

Answers are application/json whatever the Accept header says, errors included; those with binary
tensors are application/octet-stream.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from mlpd import __version__
from mlpd.core.errors import InvalidRequestError, NotFoundError, UnavailableError, ValidationError
from mlpd.core.media import JSON, OCTETS
from mlpd.core.trace import end_step
from mlpd.daemon.app import Daemon
from mlpd.http.compression import choose_encoding, compress
from mlpd.http.wire import (
    OFF_LOOP_BYTES,
    decode,
    encode,
    read_body,
    read_by,
    read_deadline,
)
from mlpd.registry.records import VersionState
from mlpd.serving.infer import Prepared, prepare, run
from mlpd.serving.oip import build_response
from mlpd.serving.oip_binary import Blobs
from mlpd.serving.oip_metadata import (
    LOG_SETTINGS,
    TRACE_SETTINGS,
    index_entry,
    model_config,
    model_metadata,
    model_statistics,
    server_metadata,
)
from mlpd.serving.package import ModelPackage, Tensors
from mlpd.serving.predictor import ServedModel

HEADER_LENGTH = "Inference-Header-Content-Length"
"""Says how many bytes of a body, before compression, are JSON; tensors follow."""

_DIGITS_MAX = 20


class InferenceHandlers:
    """Serves the models that routes, or explicit loads, keep loaded."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def server(self, _: web.Request) -> web.Response:
        """Return the server's name, version and extensions."""
        return await respond_json(server_metadata(__version__))

    async def live(self, _: web.Request) -> web.Response:
        """Return 200 while the process lives."""
        return await respond_json({"live": True})

    async def ready(self, _: web.Request) -> web.Response:
        """Return 200 when requests are welcome."""
        if not self._daemon.ready:
            raise UnavailableError("the daemon is starting or stopping", code="not_ready")
        return await respond_json({"ready": True})

    async def metadata(self, request: web.Request) -> web.Response:
        """Return a model's inputs, outputs, loaded versions and features."""
        served = await self._get(request)
        return await respond_json(model_metadata(served.package, self._versions(served)))

    async def model_ready(self, request: web.Request) -> web.Response:
        """Return 200 if the model (its champion, or the version named) is served, else 400."""
        try:
            self._check(request)
        except NotFoundError as error:
            raise InvalidRequestError(error.message, code="model_not_ready") from None
        return await respond_json({"name": request.match_info["model"], "ready": True})

    async def config(self, request: web.Request) -> web.Response:
        """Return how a model is served, in the form of Triton's model configuration."""
        served = await self._get(request)
        return await respond_json(model_config(served.package, self._versions(served)))

    async def statistics(self, request: web.Request) -> web.Response:
        """Return counters of all loaded models, of one, or of one version."""
        if "model" not in request.match_info:
            models = [m for found in self._daemon.models.models().values() for m in found.values()]
        elif "version" in request.match_info:
            models = [self._find(request)]
        else:
            self._check(request)
            name = request.match_info["model"]
            models = list(self._daemon.models.models().get(name, {}).values())
        return await respond_json(
            model_statistics((model.package, model.session.statistics) for model in models)
        )

    async def infer(self, request: web.Request) -> web.Response:
        """Return the outputs of a model for the tensors in the body.

        Tensors come and go as JSON or as bytes after it, both compressed or not.  `timeout` and
        `x-deadline-ms` say how long the caller will wait; work that is late by then is dropped
        unexecuted (504).
        """
        deadline_s = read_deadline(request)
        served = await self._get(request)
        body = await read_body(request)
        json_bytes = _read_header_length(request, len(body))
        asked = served.package, body, json_bytes
        if len(body) > OFF_LOOP_BYTES:
            prepared = await asyncio.to_thread(_prepare, *asked)
        else:
            prepared = _prepare(*asked)
        end_step("body")
        outputs = await run(served, prepared, deadline_s=deadline_s)
        end_step("model")
        encoding = choose_encoding(request.headers.get("Accept-Encoding", ""))
        answer = prepared, served.package, outputs, encoding
        if len(body) > OFF_LOOP_BYTES or _output_bytes(outputs) > OFF_LOOP_BYTES:
            return await asyncio.to_thread(_respond, *answer)
        return _respond(*answer)

    async def index(self, request: web.Request) -> web.Response:
        """Return every version in the registry and whether it is loaded; the body may be empty."""
        options = await read_json(request)
        entries = await asyncio.to_thread(self._entries)
        if isinstance(options, Mapping) and options.get("ready") is True:
            entries = [entry for entry in entries if entry["state"] == "READY"]
        return await respond_json(entries)

    async def load(self, request: web.Request) -> web.Response:
        """Load a model's champion and keep it loaded, over restarts, until it is unloaded."""
        options = await read_json(request)
        if isinstance(options, Mapping) and options.get("parameters"):
            raise ValidationError(
                "a model can't be uploaded with a load request",
                code="upload_refused",
                hint="Models come from the registry: register it, then load it by name.",
            )
        await self._daemon.models_verb.load(request.match_info["model"], read_by(request))
        return await respond_json({})

    async def unload(self, request: web.Request) -> web.Response:
        """Let go of an explicitly loaded model; one that a route uses stays (409)."""
        await read_json(request)
        await self._daemon.models_verb.unload(request.match_info["model"])
        return await respond_json({})

    async def trace_settings(self, request: web.Request) -> web.Response:
        """Return the trace settings, of the server or of a model: nothing is traced."""
        if "model" in request.match_info:
            self._check(request)
        return await respond_json(TRACE_SETTINGS)

    async def log_settings(self, _: web.Request) -> web.Response:
        """Return how the server logs."""
        return await respond_json(LOG_SETTINGS)

    async def regions(self, request: web.Request) -> web.Response:
        """Return the registered regions of shared memory: none, ever."""
        if "region" in request.match_info:
            raise NotFoundError(
                f"there is no region {request.match_info['region']!r} of shared memory",
                code="unknown_region",
                hint="This server maps none: send tensors in the body.",
            )
        return await respond_json([])

    async def unregister(self, _: web.Request) -> web.Response:
        """Let go of regions of shared memory, of which there are none."""
        return await respond_json({})

    async def unsupported(self, request: web.Request) -> web.Response:
        """Return an error: shared memory, tracing and log settings are not for clients here."""
        raise InvalidRequestError(
            f"{request.path} can't be changed: this server maps no shared memory, traces nothing "
            "and keeps its log as it was started",
            code="unsupported",
            hint="Send tensors in the body; /metrics and the statistics tell what goes on.",
        )

    def _check(self, request: web.Request) -> None:
        found = request.match_info
        self._daemon.models.check(found["model"], found.get("version"))

    def _find(self, request: web.Request) -> ServedModel:
        found = request.match_info
        return self._daemon.models.find(found["model"], found.get("version"))

    async def _get(self, request: web.Request) -> ServedModel:
        found = request.match_info
        return await self._daemon.models.get(found["model"], found.get("version"))

    def _versions(self, served: ServedModel) -> list[int]:
        return self._daemon.models.versions(served.package.name)

    def _entries(self) -> list[dict[str, str]]:
        registry, models = self._daemon.registry, self._daemon.models
        return [
            index_entry(
                model.name,
                version.number,
                ready=version.number in models.versions(model.name),
                reason="" if version.state is VersionState.READY else str(version.state),
            )
            for model in registry.models()
            for version in registry.versions(model.name)
            if not version.is_deleted
        ]


def _prepare(package: ModelPackage, body: bytes, json_bytes: int) -> Prepared:
    document = decode(body[:json_bytes], JSON) if json_bytes else None
    return prepare(package, document, Blobs(memoryview(body)[json_bytes:]))


def _respond(
    prepared: Prepared, package: ModelPackage, outputs: Tensors, encoding: str | None
) -> web.Response:
    document, blobs = build_response(prepared.request, package, outputs)
    body, headers = encode(document, JSON), {"Content-Type": JSON}
    if any("parameters" in output for output in document["outputs"]):
        headers = {"Content-Type": OCTETS, HEADER_LENGTH: str(len(body))}
        body += blobs
    body, more = compress(body, encoding)
    return web.Response(body=body, headers={**headers, **more})


def _read_header_length(request: web.Request, body_bytes: int) -> int:
    """Return how many bytes of the body are JSON: all, unless the header says fewer."""
    text = request.headers.get(HEADER_LENGTH)
    if text is None:
        return body_bytes
    if text.isascii() and text.isdecimal() and len(text) < _DIGITS_MAX and int(text) <= body_bytes:
        return int(text)
    raise InvalidRequestError(
        f"{HEADER_LENGTH} is {text[:40]!r}, but the body has {body_bytes} bytes",
        code="invalid_header_length",
        hint="It is the length of the JSON at the beginning of the body, before compression.",
    )


def _output_bytes(outputs: Tensors) -> int:
    return sum(values.nbytes for values in outputs.values())


async def read_json(request: web.Request) -> Any:
    """Return a body as JSON, whatever its Content-Type says; None for an empty one."""
    body = await read_body(request)
    if not body:
        return None
    if len(body) > OFF_LOOP_BYTES:
        return await asyncio.to_thread(decode, body, JSON)
    return decode(body, JSON)


async def respond_json(value: Any) -> web.Response:
    """Return a JSON answer."""
    return web.Response(body=encode(value, JSON), headers={"Content-Type": JSON})
