"""Catalog: the definitions that run, resolved once at apply into everything a request needs.

A catalog is immutable; an apply builds the next one beside it and swaps one reference.  Former
versions of feature services that models pin run beside it: each is a small catalog of its own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack

from mlpd.core.closure import build_closure
from mlpd.core.columns import DType
from mlpd.core.document import parse_document
from mlpd.core.errors import ConflictError, DefinitionError
from mlpd.core.extract import extract_service
from mlpd.core.hashing import definition_hash
from mlpd.core.specs import Closure, Definitions, EntitySpec, ViewSpec
from mlpd.features.assemble import FrameLayout
from mlpd.features.kernels import FeatureKernels
from mlpd.features.latest import LatestPlan
from mlpd.features.transforms import TransformSet
from mlpd.features.view import ViewPlan
from mlpd.features.windows import WindowPlan

__all__ = [
    "EMPTY_DOCUMENT",
    "Catalog",
    "ViewPlan",
    "build_catalog",
    "merge_schemas",
    "read_state",
    "view_key",
]

Document = Mapping[str, Any]
Schemas = Mapping[str, Mapping[str, DType]]
"""Columns by source."""

EMPTY_DOCUMENT: dict[str, Any] = {"format": 1}
MAX_LAYOUTS = 256
"""Frame layouts kept: services, and the latest reads of single features."""


@dataclass(frozen=True)
class Catalog:
    """Everything that runs, at one version.

    `version` counts applies; `revision`, from 0 in each version, counts what was let go of since:
    pinned services that no model pins any more.  `view_ids` gives the on-disk id of every running
    view by `view_key`; `next_view_id` grows: an id is never reused, so that a view that is changed,
    or comes back after a while, starts on clean rows.  `views` are those of the document.

    `pinned`: former versions of services by their hash, with the views that they read.  `running`:
    all views, each once; `views_by_source` has them by source.  `schemas`: the columns that these
    read of each source, also of sources and columns that the document doesn't have any more.
    """

    version: int
    revision: int
    document: Document
    definitions: Definitions
    view_ids: Mapping[str, int]
    next_view_id: int
    views: Mapping[str, ViewPlan]
    closures: Mapping[str, Closure]
    transforms: TransformSet
    pinned: Mapping[str, "Catalog"]
    running: tuple[ViewPlan, ...]
    views_by_source: Mapping[str, tuple[ViewPlan, ...]]
    schemas: Schemas
    kernels: FeatureKernels
    _layouts: dict[str, FrameLayout] = field(default_factory=dict, repr=False, compare=False)

    @property
    def key(self) -> tuple[int, int]:
        """Version and revision: a later catalog has a greater one."""
        return self.version, self.revision

    def find_closure(self, service: str, service_hash: str) -> Closure | None:
        """Return the version of `service` with this hash, None unless it runs."""
        closure = self.closures.get(service)
        if closure is not None and closure.hash == service_hash:
            return closure
        former = self.pinned.get(service_hash)
        return None if former is None else former.closures.get(service)

    def extract(self, service_hash: str) -> Document | None:
        """Return the document of a running version of a service alone; None for an unknown one."""
        if service_hash in self.pinned:
            return self.pinned[service_hash].document
        for closure in self.closures.values():
            if closure.hash == service_hash:
                return extract_service(self.document, self.definitions, closure)
        return None

    def layout(self, closure: Closure) -> FrameLayout:
        """Return where the values of `closure` are in a block; any thread, 0.1 us when known.

        Raises ConflictError(code="definitions_changed") for a closure of other definitions that
        means something else here.
        """
        layout = self._layouts.get(closure.hash)
        if layout is None:
            former = self.pinned.get(closure.hash)
            if former is not None:
                return former.layout(closure)
            self._check_meaning(closure)
            if len(self._layouts) >= MAX_LAYOUTS:
                self._layouts.clear()
            layout = FrameLayout(closure, self.views, self.transforms, self.kernels)
            self._layouts[closure.hash] = layout
        return layout

    def _check_meaning(self, closure: Closure) -> None:
        try:
            if build_closure(self.definitions, closure.service).hash == closure.hash:
                return
        except DefinitionError:
            pass  # what it reads is gone
        raise ConflictError(
            f"the definitions behind {closure.service.name!r} changed while they were read",
            code="definitions_changed",
            hint="Send the request again.",
        )

    def to_state(self) -> dict[str, Any]:
        """Return what the store keeps; `build_catalog` takes it back."""
        return {
            "version": self.version,
            "revision": self.revision,
            "document": dict(self.document),
            "view_ids": dict(self.view_ids),
            "next_view_id": self.next_view_id,
            "pinned": {found: dict(former.document) for found, former in self.pinned.items()},
        }


def build_catalog(
    document: Document,
    *,
    version: int,
    view_ids: Mapping[str, int],
    next_view_id: int,
    kernels: FeatureKernels,
    cache: Path,
    revision: int = 0,
    pinned: Mapping[str, Document] | None = None,
) -> Catalog:
    """Return the catalog of `document`; views not in `view_ids` get the next free ids.

    `pinned`: by hash, the documents of former versions of services that go on running.
    Blocks: compiling new transforms takes seconds (in a child process).  Raises DefinitionError.
    """
    definitions = parse_document(document)
    ids: dict[str, int] = {}
    views: dict[str, ViewPlan] = {}
    for name, view in sorted(definitions.views.items()):
        entity = definitions.entities[view.entity]
        key = view_key(view, entity)
        view_id = ids[key] = view_ids.get(key, next_view_id)
        next_view_id += view_id == next_view_id
        views[name] = ViewPlan(view, view_id, entity, _plan(definitions, view, kernels))
    former: dict[str, Catalog] = {}
    for service_hash, body in (pinned or {}).items():
        built = former[service_hash] = build_catalog(
            body,
            version=version,
            view_ids={**view_ids, **ids},
            next_view_id=next_view_id,
            kernels=kernels,
            cache=cache,
        )
        ids, next_view_id = {**built.view_ids, **ids}, built.next_view_id
    everywhere = [*(v for built in former.values() for v in built.running), *views.values()]
    running = tuple({view.view_id: view for view in everywhere}.values())
    schemas = merge_schemas(definitions, [built.definitions for built in former.values()])
    return Catalog(
        version=version,
        revision=revision,
        document=document,
        definitions=definitions,
        view_ids=ids,
        next_view_id=next_view_id,
        views=views,
        closures={n: build_closure(definitions, s) for n, s in definitions.services.items()},
        transforms=_transforms(definitions, cache),
        pinned=former,
        running=running,
        views_by_source={
            source: tuple(view for view in running if view.view.source == source)
            for source in schemas
        },
        schemas=schemas,
        kernels=kernels,
    )


def read_state(stored: bytes) -> dict[str, Any]:
    """Return what `Catalog.to_state` gave, from the store's bytes."""
    state: dict[str, Any] = msgpack.unpackb(stored)
    if "pinned" in state:
        return state
    # It was stored when the key of a view didn't cover the columns of its entity.
    definitions = parse_document(state["document"])
    keys = {
        f"{view.name}@{view.hash}": view_key(view, definitions.entities[view.entity])
        for view in definitions.views.values()
    }
    ids = {keys.get(key, key): view_id for key, view_id in state["view_ids"].items()}
    return {**state, "view_ids": ids, "revision": 0, "pinned": {}}


def view_key(view: ViewSpec, entity: EntitySpec) -> str:
    """Return the key of a view's version in `view_ids`: `name@hash`."""
    columns = [[name, str(dtype)] for name, dtype in entity.keys]
    return f"{view.name}@{definition_hash([view.hash, columns])}"


def merge_schemas(definitions: Definitions, former: Iterable[Definitions]) -> Schemas:
    """Return the columns by source of `definitions` and of `former` ones that run beside them.

    Raises DefinitionError(code="column_type") where they disagree about the type of a column.
    """
    schemas = {name: dict(source.schema) for name, source in definitions.sources.items()}
    for old in former:
        for name, source in old.sources.items():
            merged = schemas.setdefault(name, {})
            for column, dtype in source.schema.items():
                if merged.setdefault(column, dtype) is not dtype:
                    raise DefinitionError(
                        f"source {name!r}: column {column!r} is {dtype} in a version of a feature "
                        f"service that models pin, and can't become {merged[column]}",
                        code="column_type",
                        hint="Give the new column another name, or move the aliases and routes "
                        "of these models first; mlpd plan lists them.",
                    )
    return schemas


def _plan(
    definitions: Definitions, view: ViewSpec, kernels: FeatureKernels
) -> LatestPlan | WindowPlan:
    if view.kind == "latest":
        return LatestPlan(view, kernels)
    return WindowPlan.build(view, definitions.sources[view.source], kernels)


def _transforms(definitions: Definitions, cache: Path) -> TransformSet:
    inputs = {
        name: [_input_type(definitions, reference) for _, reference in spec.inputs]
        for name, spec in definitions.transforms.items()
    }
    return TransformSet(definitions.transforms, inputs, cache)


def _input_type(definitions: Definitions, reference: str) -> DType:
    owner, _, feature = reference.partition(".")
    if owner == "request":
        return _request_type(definitions, feature)
    if feature:
        return definitions.view(owner).features[feature]
    if reference in definitions.transforms:
        return definitions.transforms[reference].output
    return next(
        dtype
        for entity in definitions.entities.values()
        for column, dtype in entity.keys
        if column == reference
    )


def _request_type(definitions: Definitions, field: str) -> DType:
    """All services that bring a request field agree on its type: `parse_document` has checked."""
    return next(s.request[field] for s in definitions.services.values() if field in s.request)
