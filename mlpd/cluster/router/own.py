"""What a router answers by itself: whether it is ready, and the map that it goes by."""

from aiohttp import web

from mlpd.cluster.router.members import Members
from mlpd.core.errors import ConflictError, UnavailableError
from mlpd.http.oip import respond_json
from mlpd.http.operation import PageHandlers
from mlpd.http.wire import respond


class OwnHandlers(PageHandlers):
    """Answers for the router itself; `document` describes its API."""

    def __init__(self, members: Members, document: dict[str, object]) -> None:
        super().__init__(document)
        self._members = members

    async def ready(self, request: web.Request) -> web.Response:
        """Return 200 when it is known which shards there are."""
        check_ready(self._members)
        return await respond(request, {"ready": True})

    async def live_v2(self, _: web.Request) -> web.Response:
        """Return 200 while the process lives."""
        return await respond_json({"live": True})

    async def ready_v2(self, _: web.Request) -> web.Response:
        """Return 200 when requests are welcome."""
        check_ready(self._members)
        return await respond_json({"ready": True})

    async def map(self, request: web.Request) -> web.Response:
        """Return the map that this router goes by; it is no shard of it."""
        topology = self._members.guide.topology
        found = None if topology is None else topology.shard_map
        answer = {
            "shard": None,
            "epoch": 0 if found is None else found.epoch,
            "digest": None if found is None else found.digest,
            "map": None if found is None else found.to_dict(),
        }
        return await respond(request, answer)


def check_ready(members: Members) -> None:
    """Raise UnavailableError(code="not_ready") until the map is known."""
    if members.is_stopping:
        raise UnavailableError("the router is stopping", code="not_ready", hint="Ask another one.")
    if not members.ready:
        raise UnavailableError(
            "the router doesn't know the shards yet: none of those given has answered",
            code="not_ready",
            hint="Start them, or correct --shards; it asks them again every second.",
        )


def refusal(method: str, path: str) -> ConflictError:
    """Return the error for what can't be answered over several shards."""
    return ConflictError(
        f"{method} {path} is about what each shard has of its own, and is not answered over all",
        code="not_routed",
        hint="Ask each shard at its own URL: mlpd shard list shows them.",
    )
