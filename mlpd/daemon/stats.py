"""Verb stats: summaries of what online serving holds of a view or service, made in a child."""

import asyncio
from collections.abc import Mapping
from typing import Any

from mlpd.core.errors import ValidationError
from mlpd.core.specs import Definitions
from mlpd.core.time import Clock, format_time
from mlpd.daemon.offline import offline_request
from mlpd.daemon.ownership import Ownership
from mlpd.daemon.parts import Parts
from mlpd.daemon.process import Child
from mlpd.daemon.state import CatalogState
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory

ENTITIES = 20_000
"""Entities read of each view unless asked otherwise: a share of them is right to 1 in 100."""
ENTITIES_MAX = 1_000_000
ENTITIES_OVER_MAX = 100_000
"""Over several shards: each sends so many of every view, 5 MB for ten numbers."""
GIVE_S = 300.0

Features = dict[str, list[str]]
"""Features by view."""


class Stats:
    """Summarizes features; one child at a time, others wait."""

    def __init__(
        self,
        environment: Environment,
        state: CatalogState,
        ownership: Ownership,
        parts: Parts,
        paths: DataDirectory,
        clock: Clock,
    ) -> None:
        self._environment = environment
        self._state = state
        self._ownership = ownership
        self._parts = parts
        self._paths = paths
        self._clock = clock
        self._lock = asyncio.Lock()
        parts.offer("stats", self._give, views=dict, entities=int)

    async def summarize(
        self,
        name: str,
        *,
        kind: str | None = None,
        entities: int = ENTITIES,
    ) -> dict[str, Any]:
        """Return a summary of every feature of a view, or of those that a service reads.

        `kind`: "service" or "view"; without it the service of that name, else the view.
        Over the entities that have rows, as of now; of more than `entities` (at most 1,000,000) a
        sample by lot.  A service's `not_covered`: what no entity has by itself, transforms and
        request fields.  Of several shards the entities of all, which are asked at once.  Raises
        NotFoundError(code="unknown_view" or "unknown_service"),
        UnavailableError(code="part_missing").
        """
        is_alone = self._parts.is_alone
        most = ENTITIES_MAX if is_alone else ENTITIES_OVER_MAX
        if not 1 <= entities <= most:
            where = "" if is_alone else " over several shards"
            raise ValidationError(
                f"'entities' must be 1 to {most}{where}; got {entities}", code="wrong_limit"
            )
        definitions = self._state.catalog.definitions
        if kind == "service" or (kind is None and name in definitions.services):
            views, others = _features_of(definitions, name)
        else:
            views, others = {name: list(definitions.view(name).features)}, list[str]()
        asked = {"views": views, "entities": entities}
        parts = [] if is_alone else await self._parts.others("stats", asked, timeout_s=GIVE_S)
        found = await self._run({**asked, "parts": parts, "packed": False})
        at = format_time(self._clock())
        return {"name": name, "at": at, "views": found, "not_covered": others}

    async def _give(self, asked: Mapping[str, Any]) -> bytes:
        """Return what this shard's entities add, packed by the child that reads it."""
        if not 1 <= asked["entities"] <= ENTITIES_OVER_MAX:
            raise ValidationError("a part has fewer entities", code="wrong_limit")
        definitions = self._state.catalog.definitions
        for name, features in asked["views"].items():
            known = definitions.view(name).features
            if not isinstance(features, list) or not all(one in known for one in features):
                raise ValidationError(f"view {name!r} has other features", code="unknown_feature")
        packed: bytes = await self._run({**asked, "parts": [], "packed": True})
        return packed

    async def _run(self, asked: Mapping[str, Any]) -> Any:
        with self._environment.snapshot() as snapshot:
            through = snapshot.sequence
            catalog = self._state.read_catalog(snapshot)
        part = self._ownership.part
        request = {
            **offline_request(self._paths, catalog, through),
            **asked,
            "part": None if part is None else part.to_request(),
        }
        async with self._lock, Child("stats", request) as child:
            return await child.result()


def _features_of(definitions: Definitions, service: str) -> tuple[Features, list[str]]:
    """Return what a service's vector takes from views, and what from elsewhere."""
    views: Features = {}
    others = []
    for name in definitions.service(service).vector:
        owner, _, feature = name.partition(".")
        if feature and owner in definitions.views:
            views.setdefault(owner, []).append(feature)
        else:
            others.append(name)
    return views, others
