"""Closure of a feature service: what it reads, in which order, and the hash that a model pins."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from mlpd.core.columns import DType
from mlpd.core.errors import DefinitionError
from mlpd.core.hashing import definition_hash
from mlpd.core.specs import Closure, Definitions, EntitySpec, ServiceSpec, TransformSpec


def build_closure(
    definitions: Definitions, service: ServiceSpec, *, what: str | None = None
) -> Closure:
    """Return the closure of `service`; raises DefinitionError for an unknown name or a cycle.

    `what` names the service in messages.
    """
    walk = _Walk(definitions, service, what or f"feature service {service.name!r}")
    for reference in service.features:
        walk.visit(reference, ())
    return walk.closure()


def join_inputs(closures: Sequence[Closure]) -> Closure:
    """Return the first of `closures` with the key columns and request fields of all of them.

    For versions of one service.  Raises DefinitionError(code="unequal_inputs") where they disagree
    about the type of one.
    """
    first = closures[0]
    if all(closure.hash == first.hash for closure in closures):
        return first
    types: dict[str, DType] = {}
    for closure in closures:
        for name, dtype in {**closure.key_columns, **closure.service.request}.items():
            if types.setdefault(name, dtype) is not dtype:
                raise DefinitionError(
                    f"versions of service {first.service.name!r} take {name!r} as {types[name]} "
                    f"and as {dtype}",
                    code="unequal_inputs",
                    hint="Give models of these versions a route each.",
                )
    keys = {name for closure in closures for name in closure.key_columns}
    request = {name: dtype for name, dtype in types.items() if name not in keys}
    entities = dict.fromkeys(entity for closure in closures for entity in closure.entities)
    service = replace(first.service, request=request)
    return replace(first, entities=tuple(entities), service=service)


class _Walk:
    """Depth-first walk over references; transforms come out after what they read."""

    def __init__(self, definitions: Definitions, service: ServiceSpec, what: str) -> None:
        self._definitions, self._service, self._what = definitions, service, what
        self._views: dict[str, list[str]] = {}
        self._transforms: dict[str, TransformSpec] = {}
        self._entities: dict[str, EntitySpec] = {}
        self._dtypes: dict[str, DType] = {}
        self._keys = {c: e for e in definitions.entities.values() for c in e.columns}

    def visit(self, reference: str, path: tuple[str, ...]) -> DType:
        if reference in path:
            raise self._error(f"transforms read each other: {' -> '.join((*path, reference))}")
        if reference not in self._dtypes:
            self._dtypes[reference] = self._resolve(reference, path)
        return self._dtypes[reference]

    def _resolve(self, reference: str, path: tuple[str, ...]) -> DType:
        owner, _, feature = reference.partition(".")
        if owner == "request" and feature in self._service.request:
            return self._service.request[feature]
        if feature and owner in self._definitions.views:
            return self._visit_view(owner, feature)
        if reference in self._definitions.transforms:
            return self._visit_transform(self._definitions.transforms[reference], path)
        if reference in self._keys:
            entity = self._keys[reference]
            self._entities.setdefault(entity.name, entity)
            return dict(entity.keys)[reference]
        raise self._error(
            f"unknown feature {reference!r}",
            hint="A feature is view.feature, a transform, request.field or an entity's key column.",
        )

    def _visit_view(self, owner: str, feature: str) -> DType:
        view = self._definitions.views[owner]
        if feature not in view.features:
            known = ", ".join(view.features)
            raise self._error(f"view {owner!r} has no feature {feature!r}; it has: {known}")
        seen = self._views.setdefault(owner, [])
        if feature not in seen:
            seen.append(feature)
        entity = self._definitions.entities[view.entity]
        self._entities.setdefault(entity.name, entity)
        return view.features[feature]

    def _visit_transform(self, transform: TransformSpec, path: tuple[str, ...]) -> DType:
        for _, reference in transform.inputs:
            dtype = self.visit(reference, (*path, transform.name))
            if not dtype.is_numeric:
                raise self._error(
                    f"transform {transform.name!r} reads {reference!r}, which is {dtype}",
                    hint="Transforms take numbers, timestamps and bool.",
                )
        self._transforms[transform.name] = transform
        return transform.output

    def closure(self) -> Closure:
        service = self._service
        dtypes = {name: self._dtypes[name] for name in service.features} | dict(service.request)
        views = {name: tuple(features) for name, features in self._views.items()}
        transforms = tuple(self._transforms.values())
        meaning = [
            *(list(service.vector), {name: str(t) for name, t in dtypes.items()}),
            {name: self._definitions.views[name].hash for name in views},
            [[t.name, t.source, [list(i) for i in t.inputs], str(t.output)] for t in transforms],
            sorted(self._entity_meaning()),
        ]
        return Closure(
            service=service,
            view_features=views,
            transforms=transforms,
            entities=tuple(self._entities.values()),
            dtypes=dtypes,
            hash=definition_hash(meaning),
        )

    def _entity_meaning(self) -> Iterable[list[str]]:
        for entity in self._entities.values():
            for column, dtype in entity.keys:
                yield [entity.name, column, str(dtype)]

    def _error(self, message: str, hint: str = "") -> DefinitionError:
        return DefinitionError(f"{self._what}: {message}", code="unknown_feature", hint=hint)
