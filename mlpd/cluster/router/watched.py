"""What is watched over shards: freshness and data quality; and the collection of blobs."""

from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web

from mlpd.client import requests as r
from mlpd.cluster.router.everywhere import (
    LIST_S,
    Everywhere,
    as_asked,
    listed,
    missing,
    whole,
    with_missing,
)
from mlpd.cluster.router.members import Members
from mlpd.cluster.router.upstream import Until, Upstream
from mlpd.core.errors import MlpdError
from mlpd.http.monitoring import QUALITY
from mlpd.http.shapes import Field, Shape
from mlpd.http.versions import COLLECT
from mlpd.http.wire import read_deadline, read_fields, respond

QUALITY_OVER = with_missing(
    Shape(
        {
            **QUALITY.fields,
            "sources": Field(
                "rows",
                "Per source the rows of all shards, with copies of an event; refused ones by code, "
                "samples with their shard.",
            ),
            "features": Field(
                "rows",
                "Per shard, version and feature the share of each problem, and what is usual.",
            ),
        }
    )
)
_COLLECTED = ("blobs", "size_bytes", "waiting_blobs", "waiting_bytes")
_COUNTS = ("present", "stale", "missing")


class WatchedHandlers:
    """Adds up what all shards watch."""

    def __init__(self, everywhere: Everywhere, members: Members) -> None:
        self._everywhere = everywhere
        self._members = members

    async def freshness(self, request: web.Request) -> web.Response:
        """Return per view the ages at which it was served, per source how far it has come."""
        asked = r.get("v1", "freshness")
        found = await self._everywhere.all(request, asked, LIST_S, "freshness")
        return await respond(request, merge_freshness([*found.values()]))

    async def quality(self, request: web.Request) -> web.Response:
        """Return what is wrong with data on all shards that answer."""
        found = await self._everywhere.each(request, r.get("v1", "quality"), LIST_S)
        gone = missing(found)
        answered = {n: v for n, v in found.items() if not isinstance(v, MlpdError)}
        windows = [v["window"] for v in answered.values() if v["window"] is not None]
        answer = {
            "sources": merge_sources(answered),
            "window": max(windows, default=None),
            "features": listed(found, "features"),
            "missing": gone,
        }
        return await respond(request, answer)

    async def collect(self, request: web.Request) -> web.Response:
        """Remove files of deleted versions on all shards; the arbiter chooses surplus versions.

        What that deletes comes to the others as any change does.
        """
        fields = await read_fields(request, COLLECT)
        until = Until.after(r.LONG_S, read_deadline(request))
        arbiter, *others = self._members.all()
        first = await self._collect(request, arbiter, fields, until)
        fields["keep"] = None
        rest = [await self._collect(request, member, fields, until) for member in others]
        sums = {name: sum(part[name] for part in (first, *rest)) for name in _COLLECTED}
        return await respond(request, {**first, **sums})

    async def _collect(
        self, request: web.Request, member: Upstream, fields: Mapping[str, Any], until: Until
    ) -> Mapping[str, Any]:
        asked = r.call("POST", "v1", "registry", "collect", fields=fields)
        found = await self._members.ask(member, as_asked(request, asked), until)
        done: Mapping[str, Any] = whole({member.name: found}, "the collection")[member.name]
        return done


def merge_freshness(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the freshness of several daemons as one: rows add up, marks are the latest.

    Shares and means are those of all rows together, to rounding.
    """
    views: dict[str, list[Mapping[str, Any]]] = {}
    sources: dict[str, list[Mapping[str, Any]]] = {}
    for part in found:
        for named, told in ((views, part["views"]), (sources, part["sources"])):
            for name, value in told.items():
                named.setdefault(name, []).append(value)
    return {
        "views": {name: _merge_view(parts) for name, parts in views.items()},
        "sources": {name: _merge_marks(parts) for name, parts in sources.items()},
        "age_bounds_s": found[0]["age_bounds_s"],
    }


def _merge_view(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counts = {name: sum(part[name] for part in parts) for name in _COUNTS}
    rows = sum(counts.values())
    ages_s = [(part["age_mean_s"], part["present"] + part["stale"]) for part in parts]
    within = [(part["slo_share"], sum(part[name] for name in _COUNTS)) for part in parts]
    return {
        **parts[0],
        **_merge_marks(parts),
        **counts,
        "stale_share": counts["stale"] / rows if rows else None,
        "ages": [sum(counted) for counted in zip(*(part["ages"] for part in parts), strict=True)],
        # A share is of whole rows.
        "slo_share": _mean([(round(share * n), n) for share, n in within if share is not None]),
        "age_mean_s": _mean([(mean * n, n) for mean, n in ages_s if mean is not None]),
        "age_max_s": max(
            (part["age_max_s"] for part in parts if part["age_max_s"] is not None), default=None
        ),
    }


def _mean(sums: Sequence[tuple[float, int]]) -> float | None:
    rows = sum(n for _, n in sums)
    return sum(total for total, _ in sums) / rows if rows else None


def _merge_marks(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    known = [part for part in parts if part["watermark"] is not None]
    if not known:
        return {"watermark": None, "behind_s": None, "lag_s": None}
    latest = min(known, key=lambda part: part["behind_s"])
    lag_s = max(part["lag_s"] for part in known)
    return {"watermark": latest["watermark"], "behind_s": latest["behind_s"], "lag_s": lag_s}


def merge_sources(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what shards say of sources at ingest, one row per source; samples by time."""
    merged: dict[str, dict[str, Any]] = {}
    for shard, part in found.items():
        for source in part["sources"]:
            samples = [{"shard": shard, **sample} for sample in source["samples"]]
            told = {**source, "samples": samples}
            known = merged.get(source["source"])
            merged[source["source"]] = told if known is None else _add_source(known, told)
    for source in merged.values():
        source["samples"].sort(key=lambda sample: sample["at"], reverse=True)
    return [merged[name] for name in sorted(merged)]


def _add_source(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    rows, rejected = (one[name] + other[name] for name in ("rows", "rejected"))
    return {
        **one,
        **{name: _add(one[name], other[name]) for name in ("rows_by_code", "requests_by_code")},
        "rows": rows,
        "rejected": rejected,
        "rejected_share": rejected / rows if rows else None,
        "clamped": one["clamped"] + other["clamped"],
        "samples": [*one["samples"], *other["samples"]],
    }


def _add(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}
