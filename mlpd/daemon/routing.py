"""Routing as it is here: which entities the events, services and routes that run concern."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column
from mlpd.core.errors import MlpdError
from mlpd.core.routing import NO_SLOT, Entities, Routing, distinct, home_slot, key_slots
from mlpd.core.specs import Closure, EntitySpec
from mlpd.features.catalog import Catalog

if TYPE_CHECKING:  # a child that asks what events concern imports nothing that serves: 0.2 s
    from mlpd.daemon.routes import Routes


def concerned_by(catalog: Catalog, source: str) -> Entities:
    """Return the entities that events of a source concern: those of the views that run over it."""
    return distinct(plan.entity for plan in catalog.views_by_source.get(source, ()))


def concerned_slots(
    source: str, entities: Entities, columns: Mapping[str, Column], rows: int
) -> NDArray[np.int64]:
    """Return the slots that events concern, int64 [entities + 1, rows]; NO_SLOT where none.

    The last one is that of the source's name, where an event concerns no entity.  1 us per row and
    entity.
    """
    plain = {
        name: columns[name].to_list()
        for name in dict.fromkeys(column for e in entities for column in e.columns)
        if name in columns
    }
    concerned = [key_slots(entity, plain, rows) for entity in entities]
    nowhere = np.all([slots == NO_SLOT for slots in concerned], axis=0) if concerned else True
    concerned.append(np.where(nowhere, home_slot(source), np.full(rows, NO_SLOT)))
    return np.array(concerned)


def source_routing(catalog: Catalog) -> Routing:
    """Return how events are split; nothing else is in it."""
    sources = {name: concerned_by(catalog, name) for name in sorted(catalog.definitions.sources)}
    return Routing(sources, {}, {}, {})


def build_routing(catalog: Catalog, routes: "Routes") -> Routing:
    """Return how all requests are split; some 10 us per name."""
    definitions = catalog.definitions
    features: dict[str, Entities] = {name: (plan.entity,) for name, plan in catalog.views.items()}
    features |= {name: distinct(_read_by(catalog, name)) for name in definitions.transforms}
    return Routing(
        source_routing(catalog).sources,
        {name: _entities_of(catalog, [c]) for name, c in sorted(catalog.closures.items())},
        dict(_routes(catalog, routes)),
        dict(sorted(features.items())),
    )


def _routes(catalog: Catalog, routes: "Routes") -> Iterable[tuple[str, Entities]]:
    for name in sorted(route["name"] for route in routes.all()):
        try:
            served = routes.served(name)
        except MlpdError:
            continue  # it serves nothing now
        yield name, _entities_of(catalog, served.versions.values())


def _entities_of(catalog: Catalog, closures: Iterable[Closure]) -> Entities:
    """Return the entities whose views closures read, in the versions that these belong to."""
    return distinct(
        catalog.pinned.get(closure.hash, catalog).views[view].entity
        for closure in closures
        for view in closure.view_features
    )


def _read_by(catalog: Catalog, transform: str) -> Iterable[EntitySpec]:
    for _, reference in catalog.definitions.transforms[transform].inputs:
        owner = reference.partition(".")[0]
        if owner in catalog.views:
            yield catalog.views[owner].entity
        elif reference in catalog.definitions.transforms:
            yield from _read_by(catalog, reference)
