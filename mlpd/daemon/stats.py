"""Verb stats: summaries of what online serving holds of a view or service, made in a child."""

import asyncio
from typing import Any

from mlpd.core.errors import ValidationError
from mlpd.core.specs import Definitions
from mlpd.core.time import Clock, format_time
from mlpd.daemon.offline import offline_request
from mlpd.daemon.process import Child
from mlpd.daemon.state import CatalogState
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory

ENTITIES = 20_000
"""Entities read of each view unless asked otherwise: a share of them is right to 1 in 100."""
ENTITIES_MAX = 1_000_000

Features = dict[str, list[str]]
"""Features by view."""


class Stats:
    """Summarizes features; one child at a time, others wait."""

    def __init__(
        self, environment: Environment, state: CatalogState, paths: DataDirectory, clock: Clock
    ) -> None:
        self._environment = environment
        self._state = state
        self._paths = paths
        self._clock = clock
        self._lock = asyncio.Lock()

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
        request fields.  Raises NotFoundError(code="unknown_view" or "unknown_service").
        """
        if not 1 <= entities <= ENTITIES_MAX:
            raise ValidationError(
                f"'entities' must be 1 to {ENTITIES_MAX}; got {entities}", code="wrong_limit"
            )
        with self._environment.snapshot() as snapshot:
            through = snapshot.sequence
            catalog = self._state.read_catalog(snapshot)
        definitions = catalog.definitions
        if kind == "service" or (kind is None and name in definitions.services):
            views, others = _features_of(definitions, name)
        else:
            views, others = {name: list(definitions.view(name).features)}, list[str]()
        request = {
            **offline_request(self._paths, catalog, through),
            "views": views,
            "entities": entities,
        }
        async with self._lock, Child("stats", request) as child:
            found = await child.result()
        at = format_time(self._clock())
        return {"name": name, "at": at, "views": found, "not_covered": others}


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
