"""Handlers of the Open Inference Protocol v2, in JSON; answers are application/json always."""

import asyncio
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from mlpd import __version__
from mlpd.core.errors import InvalidRequestError, NotFoundError, UnavailableError, ValidationError
from mlpd.daemon.app import Daemon
from mlpd.http.predict import read_deadline
from mlpd.http.wire import JSON, OFF_LOOP_BYTES, decode, encode, read_body
from mlpd.registry.records import VersionState
from mlpd.serving.infer import infer
from mlpd.serving.oip_metadata import (
    index_entry,
    model_config,
    model_metadata,
    model_statistics,
    server_metadata,
)
from mlpd.serving.predictor import ServedModel
from mlpd.serving.routes import ModelRef
from mlpd.serving.table import CHAMPION

BINARY_HEADER = "Inference-Header-Content-Length"


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
        served = self._find(request)
        return await respond_json(model_metadata(served.package, self._versions(served)))

    async def model_ready(self, request: web.Request) -> web.Response:
        """Return 200 if the model (its champion, or the version named) is loaded, else 400."""
        try:
            served = self._find(request)
        except NotFoundError as error:
            raise InvalidRequestError(error.message, code="model_not_ready") from None
        return await respond_json({"name": served.package.name, "ready": True})

    async def config(self, request: web.Request) -> web.Response:
        """Return how a model is served, in the form of Triton's model configuration."""
        served = self._find(request)
        return await respond_json(model_config(served.package, self._versions(served)))

    async def statistics(self, request: web.Request) -> web.Response:
        """Return counters of all loaded models, of one, or of one version."""
        if "model" not in request.match_info:
            models = [m for found in self._daemon.models.models().values() for m in found.values()]
        elif "version" in request.match_info:
            models = [self._find(request)]
        else:
            name = request.match_info["model"]
            self._find(request)
            models = list(self._daemon.models.models()[name].values())
        return await respond_json(
            model_statistics((model.package, model.session.statistics) for model in models)
        )

    async def infer(self, request: web.Request) -> web.Response:
        """Return the outputs of a model for the tensors in the body."""
        if BINARY_HEADER in request.headers:
            raise ValidationError(
                "tensors come and go as JSON here",
                code="binary_unsupported",
                hint="With tritonclient: set_data_from_numpy(x, binary_data=False) and "
                "InferRequestedOutput(name, binary_data=False).",
            )
        served = self._find(request)
        deadline_s = read_deadline(request)
        document = await read_json(request)
        answer = await infer(served, document, deadline_s=deadline_s)
        large = (request.content_length or 0) > OFF_LOOP_BYTES
        return await respond_json(answer, large=large)

    async def index(self, request: web.Request) -> web.Response:
        """Return every version in the registry and whether it is loaded; the body may be empty."""
        options = await read_json(request)
        entries = await asyncio.to_thread(self._entries)
        if isinstance(options, Mapping) and options.get("ready") is True:
            entries = [entry for entry in entries if entry["state"] == "READY"]
        return await respond_json(entries)

    async def load(self, request: web.Request) -> web.Response:
        """Load a model's champion and keep it loaded until it is unloaded."""
        options = await read_json(request)
        if isinstance(options, Mapping) and options.get("parameters"):
            raise ValidationError(
                "a model can't be uploaded with a load request",
                code="upload_refused",
                hint="Models come from the registry: register it, then load it by name.",
            )
        await self._daemon.models.load(ModelRef(request.match_info["model"], CHAMPION))
        return await respond_json({})

    async def unload(self, request: web.Request) -> web.Response:
        """Let go of an explicitly loaded model; one that a route uses stays (409)."""
        await read_json(request)
        await self._daemon.models.unload(request.match_info["model"])
        return await respond_json({})

    def _find(self, request: web.Request) -> ServedModel:
        found = request.match_info
        return self._daemon.models.find(found["model"], found.get("version"))

    def _versions(self, served: ServedModel) -> list[int]:
        return list(self._daemon.models.models()[served.package.name])

    def _entries(self) -> list[dict[str, str]]:
        registry, loaded = self._daemon.registry, self._daemon.models.models()
        return [
            index_entry(
                model.name,
                version.number,
                ready=version.number in loaded.get(model.name, {}),
                reason="" if version.state is VersionState.READY else str(version.state),
            )
            for model in registry.models()
            for version in registry.versions(model.name)
            if not version.is_deleted
        ]


async def read_json(request: web.Request) -> Any:
    """Return a body as JSON, whatever its Content-Type says; None for an empty one."""
    body = await read_body(request)
    if not body:
        return None
    if len(body) > OFF_LOOP_BYTES:
        return await asyncio.to_thread(decode, body, JSON)
    return decode(body, JSON)


async def respond_json(value: Any, *, large: bool = False) -> web.Response:
    """Return a JSON answer; a `large` one is encoded in a thread."""
    body = await asyncio.to_thread(encode, value, JSON) if large else encode(value, JSON)
    return web.Response(body=body, headers={"Content-Type": JSON})
