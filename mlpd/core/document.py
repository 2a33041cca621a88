"""The declarative document of definitions, read and checked into specs; errors name the object.

The document is what `mlpd apply` sends and the daemon stores: plain JSON, by kind and name.
docs/formats/definitions.md describes it.  Unknown kinds and fields are errors.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mlpd.core.closure import build_closure
from mlpd.core.columns import DType
from mlpd.core.errors import DefinitionError, MlpdError
from mlpd.core.fields import Fields
from mlpd.core.job_document import parse_job
from mlpd.core.keys import KEY_TYPES
from mlpd.core.names import check_identifier, check_name
from mlpd.core.specs import (
    EVENT_ID_RETENTION_US,
    MAX_FEATURES,
    Definitions,
    EntitySpec,
    ServiceSpec,
    SourceSpec,
    TransformSpec,
    ViewSpec,
)
from mlpd.core.view_document import parse_view

DOCUMENT_FORMAT = 1
KINDS = ("entities", "sources", "views", "transforms", "services", "jobs")
MAX_SOURCE_CHARS = 20_000
RESERVED_COLUMNS = ("known_at",)
"""Columns that every source has for imports."""

T = TypeVar("T")


def parse_document(document: object) -> Definitions:
    """Return the definitions of a document, every reference checked.

    Raises DefinitionError naming kind, object and field of the first thing wrong.
    """
    _check_encodable(document)
    body = Fields(document, "the definitions document")
    if body.take("format", DOCUMENT_FORMAT) != DOCUMENT_FORMAT:
        raise body.error(f"format must be {DOCUMENT_FORMAT}", hint="Upgrade mlpd on this side.")
    parts = {kind: body.mapping(kind) for kind in KINDS}
    body.done()
    entities = _each(parts["entities"], "entity", _entity)
    sources = _each(parts["sources"], "source", _source)
    views = _each(parts["views"], "view", lambda f, n: parse_view(f, n, entities, sources))
    transforms = _each(parts["transforms"], "transform", _transform)
    services = _each(parts["services"], "feature service", _service)
    _check_shared_names(entities, views, transforms)
    found = Definitions(entities, sources, views, transforms, services)
    request = _request_types(services, entities)
    for service in services.values():
        build_closure(found, service)
    for transform in transforms:  # those that no service reads are compiled too
        alone = ServiceSpec("transforms", (transform,), request)
        build_closure(found, alone, what=f"transform {transform!r}")
    jobs = _each(parts["jobs"], "job", lambda f, n: parse_job(f, n, found))
    return Definitions(entities, sources, views, transforms, services, jobs)


def _check_encodable(document: object) -> None:
    """Refuse lone surrogates, which JSON can carry and nothing behind could store."""
    try:
        json.dumps(document, ensure_ascii=False, default=repr, skipkeys=True).encode()
    except UnicodeEncodeError as error:
        raise DefinitionError(f"the definitions document holds text that isn't: {error}") from None
    except (ValueError, RecursionError) as error:
        raise DefinitionError(f"the definitions document can't be read: {error}") from None


def _each(objects: Mapping[str, Any], what: str, parse: Callable[[Fields, str], T]) -> dict[str, T]:
    found = {}
    for name, value in sorted(objects.items()):
        check = check_name if what == "job" else check_identifier
        fields = Fields(value, f"{what} {name!r}")
        try:
            found[name] = parse(fields, check(name, what))
        except DefinitionError:
            raise
        except MlpdError as error:
            message = error.message if name in error.message else f"{what} {name!r}: {error}"
            raise DefinitionError(message, code=error.code, hint=error.hint) from None
        fields.done()
    return found


def _entity(fields: Fields, name: str) -> EntitySpec:
    keys = fields.schema("keys")
    if not keys or any(dtype not in KEY_TYPES for dtype in keys.values()):
        raise fields.error(
            f"'keys' needs at least one column of {', '.join(KEY_TYPES)}, and no others",
            hint="What is equal must be the same bytes: make a text or an integer of it.",
        )
    return EntitySpec(name, tuple(keys.items()))


def _source(fields: Fields, name: str) -> SourceSpec:
    spec = SourceSpec(
        name=name,
        timestamp=check_identifier(fields.text("timestamp"), "timestamp column"),
        schema=fields.schema("schema"),
        delay_us=fields.duration("delay"),
        event_id=fields.optional_text("event_id"),
        event_id_retention_us=fields.duration("event_id_retention") or EVENT_ID_RETENTION_US,
        retention_us=fields.duration("retention"),
    )
    _check_event_id(fields, spec)
    for column in (spec.timestamp, *spec.schema):
        if column in RESERVED_COLUMNS:
            raise fields.error(f"the column name {column!r} is reserved")
    if spec.timestamp in spec.schema:
        raise fields.error(f"the schema must not repeat the timestamp column {spec.timestamp!r}")
    if not spec.schema:
        raise fields.error("'schema' needs at least one column")
    return spec


def _check_event_id(fields: Fields, source: SourceSpec) -> None:
    if source.event_id is None:
        if source.event_id_retention_us != EVENT_ID_RETENTION_US:
            raise fields.error("'event_id_retention' says nothing without 'event_id'")
    elif source.schema.get(source.event_id) not in KEY_TYPES:
        raise fields.error(
            f"'event_id' must be a column of {', '.join(KEY_TYPES)}; {source.event_id!r} is none"
        )


def _transform(fields: Fields, name: str) -> TransformSpec:
    source = fields.text("source")
    if len(source) > MAX_SOURCE_CHARS:
        raise fields.error(f"the source has over {MAX_SOURCE_CHARS} characters")
    output = DType.parse(fields.text("output"), f"{fields.where}: output")
    if not output.is_numeric:
        raise fields.error(
            f"the output is {output}; transforms return numbers or bool",
            hint="Write one transform for each number.",
        )
    inputs = []
    for pair in fields.items("inputs", 64):
        match pair:
            case [str(argument), str(reference)]:
                inputs.append((argument, reference))
            case _:
                raise fields.error("'inputs' holds pairs [argument, feature reference]")
    if not inputs:
        raise fields.error("'inputs' needs at least one pair [argument, feature reference]")
    return TransformSpec(name, source, tuple(inputs), output)


def _service(fields: Fields, name: str) -> ServiceSpec:
    features = fields.texts("features", MAX_FEATURES)
    service = ServiceSpec(name, tuple(features), fields.schema("request"))
    if len(set(service.vector)) < len(service.vector):
        raise fields.error("a feature or request field stands twice")
    if not service.vector:
        raise fields.error("it has neither features nor request fields")
    return service


def _request_types(
    services: Mapping[str, ServiceSpec], entities: Mapping[str, EntitySpec]
) -> dict[str, DType]:
    """Return every request field's one type: a transform may read it in any service.

    A field may also be a key column, if both have one type: a request brings both by name.
    """
    keys = {column: dtype for entity in entities.values() for column, dtype in entity.keys}
    types: dict[str, DType] = {}
    for service in services.values():
        for field, dtype in service.request.items():
            other = keys.get(field, types.setdefault(field, dtype))
            if other != dtype:
                raise DefinitionError(
                    f"request field {field!r} is {dtype} in service {service.name!r} "
                    f"and {other} {'as a key column' if field in keys else 'in another'}",
                    hint="Give it one type, or another name.",
                )
    return types


def _check_shared_names(
    entities: Mapping[str, EntitySpec],
    views: Mapping[str, ViewSpec],
    transforms: Mapping[str, TransformSpec],
) -> None:
    """Views, transforms and key columns share one namespace: references stay unambiguous."""
    keys: dict[str, DType] = {}
    for entity in entities.values():
        for column, dtype in entity.keys:
            if keys.setdefault(column, dtype) != dtype:
                raise DefinitionError(f"key column {column!r} has two types among the entities")
    names = [*views, *transforms, *keys, "request"]
    for name in names:
        if names.count(name) > 1:
            raise DefinitionError(
                f"the name {name!r} stands for two things among views, transforms and key columns",
                hint="Rename one of them.",
            )
