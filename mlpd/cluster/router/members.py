"""Members: the shards that a router knows, and how it comes to know them."""

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from mlpd.client import requests as r
from mlpd.client.topology import Calls, Guide, no_daemon
from mlpd.cluster.router.hedging import Hedging
from mlpd.cluster.router.upstream import Until, Upstream
from mlpd.core.errors import ConfigurationError, MlpdError
from mlpd.core.shards import Shard, decode_map
from mlpd.core.time import parse_duration

T = TypeVar("T")
_HEDGED = ("/v1/features/read", "/v1/cluster/cells")
"""Reads that keep nothing: asking twice costs time alone."""
OFF_LOOP_BYTES = 64 * 1024
"""An answer of this size takes about 0.5 ms to decode."""
LEARN_S = 5.0
"""What asking one member for the map may take."""


class _Step(NamedTuple):
    """Where a generator of calls stands: what it asks for next, or the value that it ended with."""

    asked: Sequence[tuple[str, r.Request]] | None
    value: Any = None


class Members:
    """Asks shards by the newest map; one per router, on the loop."""

    def __init__(
        self,
        urls: Sequence[str],
        hedging: Hedging,
        draw: Callable[[], float] = random.random,
        *,
        max_staleness_s: float | None = None,
    ) -> None:
        self.guide = Guide(urls, max_staleness_s)
        self.hedging = hedging
        self.is_alone = False
        """Whether the one URL is of a daemon that owns everything, and has no map."""
        self.is_stopping = False
        self._draw = draw
        self._upstreams: dict[str, Upstream] = {}

    @property
    def ready(self) -> bool:
        """Whether it is known whom to ask."""
        return not self.is_stopping and (self.is_alone or self.guide.topology is not None)

    @property
    def epoch(self) -> int:
        """Of the map, 0 without one."""
        return 0 if self.guide.topology is None else self.guide.topology.shard_map.epoch

    def shards(self) -> Sequence[Shard]:
        """Return all shards, the arbiter first; a daemon without a map is one without a name."""
        topology = self.guide.topology
        if topology is None:
            return [Shard("", self.guide.urls[0])]
        return topology.shard_map.shards

    def all(self) -> list[Upstream]:
        """Return the upstream of each shard, the arbiter's first."""
        return [self._upstream(shard.url) for shard in self.shards()]

    async def learn(self) -> None:
        """Fetch map and routing anew.

        Raises ConfigurationError(code="no_cluster") if several URLs are given and have no map,
        `other_cluster` if they have maps of several clusters, and what asking raises.
        """
        try:
            await self.run(self.guide.learn(), Until.after(LEARN_S))
        except ConfigurationError as error:
            if error.code != "no_cluster" or len(self.guide.urls) > 1:
                raise
            self.is_alone = True
        else:
            self.is_alone = False

    async def check_given(self) -> None:
        """Raise ConfigurationError(code="other_cluster") if a given URL is of another cluster."""
        topology = self.guide.topology
        if topology is None:
            return
        asked = r.get("v1", "cluster", "map")
        until = Until.after(LEARN_S)
        for url in self.guide.urls:
            found = await self._try(url, asked, until)
            if isinstance(found, MlpdError):
                continue
            if not isinstance(found, Mapping) or "map" not in found:
                raise no_daemon(url)
            cluster = None if found["map"] is None else decode_map(found["map"]).cluster
            if cluster != topology.shard_map.cluster:
                raise ConfigurationError(
                    f"the daemon at {url} is of {'no cluster' if cluster is None else cluster}, "
                    f"the others are of {topology.shard_map.cluster}",
                    code="other_cluster",
                    hint="Give --shards members of one cluster; mlpd shard list shows them.",
                )

    async def freshness_s(self) -> float | None:
        """Return the shortest ttl or freshness of any view, None where none has one."""
        found = await self.ask(self.all()[0], r.get("v1", "definitions"), Until.after(LEARN_S))
        if isinstance(found, MlpdError):
            raise found
        views = found["document"].get("views", {}).values()
        texts = [view.get(name) for view in views for name in ("ttl", "freshness")]
        return min((parse_duration(t, "view") / 1e6 for t in texts if t), default=None)

    async def run(self, calls: Calls[T], until: Until, *, large: bool = False) -> T:
        """Make the calls of a generator, those that it yields together at once.

        `large`: it has so many rows that its steps belong into a thread.
        """
        step = await self._step(calls, None, large=large)
        while step.asked is not None:
            if len(step.asked) == 1:
                outcomes = [await self._try(*step.asked[0], until)]
            else:
                outcomes = await asyncio.gather(*(self._try(*call, until) for call in step.asked))
            step = await self._step(calls, outcomes, large=large)
        found: T = step.value
        return found

    async def close(self) -> None:
        """Close all connections; idempotent."""
        for upstream in self._upstreams.values():
            await upstream.close()

    async def _step(self, calls: Calls[Any], outcomes: Any, *, large: bool) -> _Step:
        return await asyncio.to_thread(_next, calls, outcomes) if large else _next(calls, outcomes)

    async def ask(self, upstream: Upstream, request: r.Request, until: Until) -> Any:
        """Return the value of a shard's answer, or its error."""
        ask = upstream.ask_hedged if request.path in _HEDGED else upstream.ask
        try:
            answer = await ask(request, until)
            if len(answer.body) > OFF_LOOP_BYTES:
                return await asyncio.to_thread(r.read_answer, answer)
            return r.read_answer(answer)
        except MlpdError as error:
            return error

    async def ask_all(self, request: r.Request, until: Until) -> dict[str, Any]:
        """Return the value of each shard's answer, or its error, by name; the arbiter's first."""
        members = self.all()
        found = await asyncio.gather(*(self.ask(m, request, until) for m in members))
        return {member.name: value for member, value in zip(members, found, strict=True)}

    async def fetch_all(self, request: r.Request, until: Until) -> dict[str, r.Answer | MlpdError]:
        """Return each shard's answer as it came, or its error, by name; the arbiter's first."""
        members = self.all()
        found = await asyncio.gather(*(self.fetch(m, request, until) for m in members))
        return {member.name: answer for member, answer in zip(members, found, strict=True)}

    async def fetch(
        self, member: Upstream, request: r.Request, until: Until
    ) -> r.Answer | MlpdError:
        """Return a shard's good answer as it came, or its error."""
        try:
            answer = await member.ask(request, until)
        except MlpdError as error:
            return error
        return answer if answer.status < 400 else r.read_error(answer)  # noqa: PLR2004 - errors

    async def _try(self, url: str, request: r.Request, until: Until) -> Any:
        return await self.ask(self._upstream(url), request, until)

    def _upstream(self, url: str) -> Upstream:
        """Return a shard's upstream; a map has at most 1,000, and few leave it."""
        found = self._upstreams.get(url)
        if found is None:
            found = self._upstreams[url] = Upstream(url, self.hedging, self._draw)
        if found.name == url:  # it was asked for the map before that told its name
            found.name = next((s.name for s in self.shards() if s.url == url and s.name), url)
        return found


def _next(calls: Calls[Any], outcomes: Any) -> _Step:
    try:
        return _Step(calls.send(outcomes))
    except StopIteration as stop:
        return _Step(None, stop.value)
