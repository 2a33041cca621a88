"""What adds up over shards: metrics, statistics of models, and the status."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aiohttp import web

from mlpd import __version__
from mlpd.client import requests as r
from mlpd.cluster.router.exposition import merge_expositions
from mlpd.cluster.router.members import Members
from mlpd.cluster.router.upstream import Until
from mlpd.core.errors import MlpdError, NotFoundError
from mlpd.core.media import JSON
from mlpd.core.time import Clock, format_time
from mlpd.http.oip import respond_json
from mlpd.http.operation import STATUS
from mlpd.http.shapes import Field, Shape
from mlpd.http.wire import respond
from mlpd.monitoring.exposition import CONTENT_TYPE, encode
from mlpd.monitoring.metrics import Registry

ASK_S = 5.0
STATUS_OVER = Shape(
    {
        **STATUS.fields,
        "router": Field(
            "object", "Of a router its map, and per shard its state and its newest sequence."
        ),
    }
)
_NAMES = ("sources", "views", "services", "jobs", "models", "routes", "experiments")
_LISTS = ("segments", "predictions", "events")
_SUMS = ("log_tail_rows", "lmdb_bytes", "lmdb_map_bytes")


class SummedHandlers:
    """Asks all shards, and adds up what they say."""

    def __init__(self, members: Members, metrics: Registry, clock: Clock) -> None:
        self._members = members
        self._metrics = metrics
        self._clock = clock
        self._started_us = clock()

    async def metrics(self, request: web.Request) -> web.Response:  # noqa: ARG002 - it has no options
        """Return the metrics of all shards that answer, and the router's own, in 0.0.4.

        Counters and histograms are sums, gauges have the label `shard`.
        """
        asked = r.Request("GET", "/metrics", accept="text/plain")
        found = await self._members.ask_all(asked, Until.after(ASK_S))
        texts = {name: value for name, value in found.items() if not isinstance(value, MlpdError)}
        own = self._metrics
        text = await asyncio.to_thread(lambda: _join(texts, own))
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE["text"]})

    async def status(self, request: web.Request) -> web.Response:
        """Return what runs on all shards, how much there is, and who answers."""
        found = await self._members.ask_all(r.get("v1", "status"), Until.after(ASK_S))
        answered = [value for value in found.values() if not isinstance(value, MlpdError)]
        first = next((v for v in found.values() if isinstance(v, MlpdError)), None)
        if not answered:
            raise first or NotFoundError("no shard is known")
        own = {
            "version": __version__,
            "ready": self._members.ready,
            "started": format_time(self._started_us),
            "uptime_s": (self._clock() - self._started_us) / 1e6,
            "data_directory": None,
            "router": self._describe(found),
        }
        return await respond(request, {**merge_status(answered), **own})

    async def statistics(self, request: web.Request) -> web.Response:
        """Return counters of loaded models, summed over all shards."""
        asked = r.Request("GET", request.raw_path, accept=JSON)
        found = await self._members.ask_all(asked, Until.after(ASK_S))
        answered = [value for value in found.values() if not isinstance(value, MlpdError)]
        if not answered:
            raise next(iter(found.values()))
        return await respond_json({"model_stats": merge_statistics(answered)})

    def _describe(self, found: Mapping[str, Any]) -> dict[str, Any]:
        topology = self._members.guide.topology
        return {
            "cluster": None if topology is None else topology.shard_map.cluster,
            "epoch": self._members.epoch,
            "routing": None if topology is None else topology.routing.version,
            "shards": [
                {
                    "shard": member.name,
                    "url": member.url,
                    "state": "down" if isinstance(found.get(member.name), MlpdError) else "ok",
                    "sequence": _field(found.get(member.name), "sequence"),
                    "why": _why(found.get(member.name)),
                    "calls": dict(member.outcomes),
                }
                for member in self._members.all()
            ],
            "hedged": self._members.hedging.hedged,
        }


def merge_status(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the status of several daemons as one: amounts are sums, events with their copies."""
    first = found[0]
    newest = [value["newest_known"] for value in found if value["newest_known"]]
    return {
        **{name: first[name] for name in ("definitions_version", "shared", "history", "canaries")},
        **{name: sorted(set().union(*(value[name] for value in found))) for name in _NAMES},
        **{name: sum(value[name] for value in found) for name in _SUMS},
        **{name: _sum([value[name] for value in found], _add) for name in _LISTS},
        "sequence": max(value["sequence"] for value in found),
        "newest_known": max(newest, default=None),
    }


def merge_statistics(found: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return `model_stats` of several daemons as one list; the last inference is the latest."""
    models: dict[tuple[str, str], Any] = {}
    for answer in found:
        for model in answer["model_stats"]:
            key = model["name"], model["version"]
            known = models.get(key)
            models[key] = model if known is None else _merge_model(known, model)
    return list(models.values())


def _merge_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    merged = _sum([one, other], _add)
    merged["last_inference"] = max(one["last_inference"], other["last_inference"])
    batches: dict[int, Any] = {}
    for batch in (*one["batch_stats"], *other["batch_stats"]):
        size, known = batch["batch_size"], batches.get(batch["batch_size"])
        batches[size] = batch if known is None else {**_sum([known, batch], _add)}
        batches[size]["batch_size"] = size
    merged["batch_stats"] = [batches[size] for size in sorted(batches)]
    return merged


def _sum(found: Sequence[Mapping[str, Any]], add: Callable[[Any, Any], Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for value in found:
        for name, item in value.items():
            merged[name] = add(merged[name], item) if name in merged else item
    return merged


def _add(one: Any, other: Any) -> Any:
    """Return the sum of numbers, of objects by field, and the first of anything else."""
    if isinstance(one, Mapping):
        return _sum([one, other], _add)
    is_number = isinstance(one, int | float) and not isinstance(one, bool)
    return one + other if is_number else one


def _join(texts: Mapping[str, str], own: Registry) -> bytes:
    return merge_expositions(texts).encode() + encode(own, "text")


def _field(value: Any, name: str) -> Any:
    return None if value is None or isinstance(value, MlpdError) else value[name]


def _why(value: Any) -> str:
    return value.message if isinstance(value, MlpdError) else ""
