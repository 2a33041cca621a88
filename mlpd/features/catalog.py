"""Catalog: the definitions that run, resolved once at apply into everything a request needs.

A catalog is immutable; an apply builds the next one beside it and swaps one reference.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlpd.core.closure import build_closure
from mlpd.core.columns import DType
from mlpd.core.document import parse_document
from mlpd.core.errors import ConflictError, DefinitionError
from mlpd.core.specs import Closure, Definitions, ViewSpec
from mlpd.features.assemble import FrameLayout
from mlpd.features.latest import LatestPlan
from mlpd.features.transforms import TransformSet
from mlpd.features.view import ViewPlan
from mlpd.features.windows import WindowPlan

__all__ = ["EMPTY_DOCUMENT", "Catalog", "ViewPlan", "build_catalog", "view_key"]

EMPTY_DOCUMENT: dict[str, Any] = {"format": 1}
MAX_LAYOUTS = 256
"""Frame layouts kept: services, and the latest reads of single features."""


@dataclass(frozen=True)
class Catalog:
    """Everything that runs, at one version.

    `version` counts applies.  `view_ids` gives the on-disk id of every running view by
    `name@hash`; `next_view_id` grows: an id is never reused, so that a view that is changed, or
    comes back after a while, starts on clean rows.
    """

    version: int
    document: Mapping[str, Any]
    definitions: Definitions
    view_ids: Mapping[str, int]
    next_view_id: int
    views: Mapping[str, ViewPlan]
    views_by_source: Mapping[str, tuple[ViewPlan, ...]]
    closures: Mapping[str, Closure]
    transforms: TransformSet
    _layouts: dict[str, FrameLayout] = field(default_factory=dict, repr=False, compare=False)

    def layout(self, closure: Closure) -> FrameLayout:
        """Return where the values of `closure` are in a block; any thread, 0.1 us when known.

        Raises ConflictError(code="definitions_changed") for a closure of other definitions that
        means something else here.
        """
        layout = self._layouts.get(closure.hash)
        if layout is None:
            self._check_meaning(closure)
            if len(self._layouts) >= MAX_LAYOUTS:
                self._layouts.clear()
            layout = FrameLayout(closure, self.views, self.transforms)
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
            "document": dict(self.document),
            "view_ids": dict(self.view_ids),
            "next_view_id": self.next_view_id,
        }


def build_catalog(
    document: Mapping[str, Any],
    *,
    version: int,
    view_ids: Mapping[str, int],
    next_view_id: int,
    kernels: Any,
    cache: Path,
) -> Catalog:
    """Return the catalog of `document`; views not in `view_ids` get the next free ids.

    Blocks: compiling new transforms takes seconds (in a child process).  Raises DefinitionError.
    """
    definitions = parse_document(document)
    ids: dict[str, int] = {}
    views: dict[str, ViewPlan] = {}
    for name, view in sorted(definitions.views.items()):
        key = view_key(view)
        view_id = ids[key] = view_ids.get(key, next_view_id)
        next_view_id += view_id == next_view_id
        entity = definitions.entities[view.entity]
        views[name] = ViewPlan(view, view_id, entity, _plan(definitions, view, kernels))
    closures = {name: build_closure(definitions, s) for name, s in definitions.services.items()}
    return Catalog(
        version=version,
        document=document,
        definitions=definitions,
        view_ids=ids,
        next_view_id=next_view_id,
        views=views,
        views_by_source={
            source: tuple(views[v.name] for v in definitions.views_of(source))
            for source in definitions.sources
        },
        closures=closures,
        transforms=_transforms(definitions, cache),
    )


def view_key(view: ViewSpec) -> str:
    """Return the key of a view's version in `view_ids`."""
    return f"{view.name}@{view.hash}"


def _plan(definitions: Definitions, view: ViewSpec, kernels: Any) -> LatestPlan | WindowPlan:
    if view.kind == "latest":
        return LatestPlan(view)
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
