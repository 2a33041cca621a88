"""The network between clients and nodes: it delays, loses, repeats and reorders, by chance."""

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgpack

from mlpd.client.aio import AsyncClient, no_answer
from mlpd.client.requests import Answer, Request
from mlpd.client.retries import Retries
from mlpd.client.sync import Client
from tests.cluster.clock import StuckError, Turns
from tests.cluster.histories.nodes import Node, lost

REQUESTS_MAX = 5_000
"""Of a history; 220 are usual."""
LATE_S = 4.0
"""How late a request may arrive that its sender has given up."""


@dataclass
class Weather:
    """How likely it is, per message, that it is slow, lost, or delivered once more, late."""

    slow: float = 0.0
    lost: float = 0.0
    late: float = 0.0
    mute: float = 0.0
    """Of answers alone."""
    twice: float = 0.0


def step_of(request: Request) -> str:
    """Return which step of a move a request is, "leaving pause" or "map"; "" for none."""
    verb = request.path.rpartition("/")[2]
    if verb == "map":
        return verb if request.method == "PUT" else ""
    if verb not in ("leaving", "arriving"):
        return ""
    return f"{verb} {msgpack.unpackb(request.body)['step']}"


class Network:
    """Carries requests; who is cut off from whom stands in `cut`."""

    def __init__(self, nodes: Mapping[str, Node], rng: random.Random) -> None:
        self._nodes = {node.url: node for node in nodes.values()}
        self._rng = rng
        self.weather = Weather()
        self.cut: set[tuple[str, str]] = set()
        """Pairs of a sender's name and a node's."""
        self.on_the_way = 0
        self.asked = 0
        self.told: Callable[..., None] = lambda *_: None
        self.fates: dict[str, tuple[Sequence[str], Callable[[], Any]]] = {}
        """By sender steps, the last of which is late, and what then becomes of the sender."""
        self._awaited: dict[str, list[asyncio.Future[None]]] = {}

    alter: Callable[[Request], Request] = staticmethod(lambda request: request)
    """What becomes of a request on its way: nothing, unless a bug is planted."""

    async def step(self, name: str) -> None:
        """Wait until a step of a move comes to a member."""
        future = asyncio.get_running_loop().create_future()
        self._awaited.setdefault(name, []).append(future)
        await future

    async def exchange(self, sender: str, url: str, request: Request, timeout_s: float) -> Answer:
        """Return a node's answer, as `AsyncClient._exchange` does."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._exchange(sender, self._nodes[url], self.alter(request))
        except TimeoutError:
            raise no_answer(url, "timeout", "it did not answer in time") from None  # type: ignore[arg-type]

    async def _exchange(self, sender: str, node: Node, request: Request) -> Answer:
        self.asked += 1
        if self.asked > REQUESTS_MAX:
            raise StuckError(f"over {REQUESTS_MAX} requests: somebody asks for ever")
        rng, weather = self._rng, self.weather
        await asyncio.sleep(self._delay_s())
        if (sender, node.name) in self.cut or rng.random() < weather.lost:
            self.told("lost", sender, node.name, request.path)
            await self._silence()
            raise lost("the request was lost")
        step = step_of(request)
        if rng.random() < weather.late or self._is_fated(sender, step):
            self.told("late", sender, node.name, request.path)
            self._deliver_late(node, request)
            await self._silence()
            raise lost("the request is late")
        if rng.random() < weather.twice:
            self._deliver_late(node, request)
        if node.daemon is None:
            raise no_answer(node.url, "unreachable", "it is down")  # type: ignore[arg-type]
        for future in self._awaited.pop(step, ()):
            if not future.done():
                future.set_result(None)
        task = node.handle(request)
        await asyncio.wait([task])
        if task.cancelled():
            raise lost("the node crashed")
        answer = task.result()
        self.told(sender, node.name, request.method, request.path, answer.status)
        await asyncio.sleep(self._delay_s())
        if (sender, node.name) in self.cut or rng.random() < weather.lost + weather.mute:
            await self._silence()
            raise lost("the answer was lost")
        return answer

    def _is_fated(self, sender: str, step: str) -> bool:
        """Tell whether this is the step that its sender doesn't survive, and is late."""
        steps, end = self.fates.get(sender, ((), None))
        if end is None or step != steps[0]:
            return False
        self.fates[sender] = steps[1:], end
        if len(steps) > 1:
            return False
        asyncio.get_running_loop().call_soon(self.fates.pop(sender)[1])
        return True

    async def _silence(self) -> None:
        """Let a sender learn that nothing comes: after a while, or just when a move is done."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._rng.uniform(0.0, 1.0)):
                await self.step(self._rng.choice(("map", "arriving finish", "leaving finish")))

    def _deliver_late(self, node: Node, request: Request) -> None:
        self.on_the_way += 1
        delay_s = self._rng.uniform(0.0, LATE_S)
        asyncio.get_running_loop().call_later(delay_s, self._arrive, node, request)

    def _arrive(self, node: Node, request: Request) -> None:
        self.on_the_way -= 1
        if node.daemon is not None:
            self.told("arrives late", node.name, request.path)
            node.handle(request)

    def _delay_s(self) -> float:
        slow = self._rng.random() < self.weather.slow
        return self._rng.expovariate(1.0) * (0.2 if slow else 0.0005)


class SimulatedClient(AsyncClient):
    """The asynchronous client on the simulated network."""

    def __init__(
        self, network: Network, sender: str, url: Any, rng: random.Random, timeout_s: float
    ) -> None:
        super().__init__(url, timeout_s=timeout_s, retries=Retries(rng.random))
        self._network, self._sender, self._rng = network, sender, rng

    def _member(self, url: str) -> AsyncClient:
        if url != self._guide.urls[0] and url not in self._members:
            how = self._network, self._sender, url, self._rng, self._timeout_s
            self._members[url] = SimulatedClient(*how)
        return super()._member(url)

    async def _exchange(self, request: Request, timeout_s: float) -> Answer:
        how = self._sender, self._guide.urls[0], request, timeout_s
        return await self._network.exchange(*how)


class DriversClient(Client):
    """The synchronous client, of code that takes turns with the loop."""

    def __init__(self, network: Network, sender: str, url: str, rng: random.Random) -> None:
        super().__init__(url, timeout_s=10.0, retries=Retries(rng.random))
        self._network, self._sender = network, sender

    def _exchange(self, request: Request, timeout_s: float) -> Answer:
        how = self._sender, self._guide.urls[0], request, timeout_s
        found: Answer = Turns.wait(lambda: self._network.exchange(*how))
        return found
