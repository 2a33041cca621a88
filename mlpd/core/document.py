"""The declarative document of definitions, read and checked into specs; errors name the object.

The document is what `mlpd apply` sends and the daemon stores: plain JSON, by kind and name.
docs/formats/definitions.md describes it.  Unknown kinds and fields are errors.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from math import isfinite
from typing import Any, TypeVar

from mlpd.core.closure import build_closure
from mlpd.core.columns import DType
from mlpd.core.convert import convert_value
from mlpd.core.errors import DefinitionError, MlpdError
from mlpd.core.expressions import parse_expression
from mlpd.core.keys import KEY_TYPES
from mlpd.core.names import check_identifier, check_name
from mlpd.core.specs import (
    AGGREGATE_FUNCTIONS,
    AggregateSpec,
    Closure,
    Definitions,
    EntitySpec,
    JobSpec,
    ServiceSpec,
    SourceSpec,
    TransformSpec,
    ViewSpec,
    default_hop_us,
    window_feature,
)
from mlpd.core.time import parse_duration, parse_time

DOCUMENT_FORMAT = 1
KINDS = ("entities", "sources", "views", "transforms", "services", "jobs")
MAX_WINDOWS = 16
MAX_AGGREGATES = 64
MAX_FEATURES = 2048
MAX_SOURCE_CHARS = 20_000
RESERVED_COLUMNS = ("known_at",)
"""Columns that every source has for imports."""

T = TypeVar("T")


def parse_document(document: object) -> Definitions:
    """Return the definitions of a document, every reference checked.

    Raises DefinitionError naming kind, object and field of the first thing wrong.
    """
    _check_encodable(document)
    body = _Fields(document, "the definitions document")
    if body.take("format", DOCUMENT_FORMAT) != DOCUMENT_FORMAT:
        raise body.error(f"format must be {DOCUMENT_FORMAT}", hint="Upgrade mlpd on this side.")
    parts = {kind: body.mapping(kind) for kind in KINDS}
    body.done()
    entities = _each(parts["entities"], "entity", _entity)
    sources = _each(parts["sources"], "source", _source)
    views = _each(parts["views"], "view", lambda f, n: _view(f, n, entities, sources))
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
    jobs = _each(parts["jobs"], "job", lambda f, n: _job(f, n, found))
    return Definitions(entities, sources, views, transforms, services, jobs)


def _check_encodable(document: object) -> None:
    """Refuse lone surrogates, which JSON can carry and nothing behind could store."""
    try:
        json.dumps(document, ensure_ascii=False, default=repr, skipkeys=True).encode()
    except UnicodeEncodeError as error:
        raise DefinitionError(f"the definitions document holds text that isn't: {error}") from None
    except (ValueError, RecursionError) as error:
        raise DefinitionError(f"the definitions document can't be read: {error}") from None


class _Fields:
    """The fields of one object, taken one by one; what is left at the end is unknown."""

    def __init__(self, value: object, where: str) -> None:
        self.where = where
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise self.error("it must be an object with text keys")
        self._left: dict[str, Any] = dict(value)

    def take(self, field: str, default: Any = None) -> Any:
        """Return the field, or `default` when absent or null."""
        value = self._left.pop(field, None)
        return default if value is None else value

    def need(self, field: str) -> Any:
        """Return the field, which must be there."""
        value = self.take(field)
        if value is None:
            raise self.error(f"{field!r} is missing")
        return value

    def text(self, field: str) -> str:
        """Return a field that must be text."""
        return self.typed(field, self.need(field), str)

    def optional_text(self, field: str) -> str | None:
        """Return a field that must be text when it is there."""
        value = self.take(field)
        return None if value is None else self.typed(field, value, str)

    def typed(self, field: str, value: Any, kind: type[T]) -> T:
        """Return `value`, which must be of the type `kind` exactly."""
        if type(value) is not kind:
            raise self.error(f"{field!r} must be {kind.__name__}, got {value!r}")
        return value

    def mapping(self, field: str) -> dict[str, Any]:
        """Return a field that must be an object; absent is empty."""
        return _Fields(self.take(field, {}), f"{self.where}: {field}").rest()

    def rest(self) -> dict[str, Any]:
        """Return all fields that were not taken yet."""
        left, self._left = self._left, {}
        return left

    def items(self, field: str, most: int) -> list[Any]:
        """Return a field that must be a list of at most `most` items; absent is empty."""
        value = self.take(field, [])
        if not isinstance(value, list | tuple):
            raise self.error(f"{field!r} must be a list, got {value!r:.60}")
        if len(value) > most:
            raise self.error(f"{field!r} has {len(value)} items; the limit is {most}")
        return list(value)

    def texts(self, field: str, most: int) -> list[str]:
        """Return a field that must be a list of texts; absent is empty."""
        value = self.items(field, most)
        for item in value:
            if not isinstance(item, str):
                raise self.error(f"{field!r} must hold texts, got {item!r:.60}")
        return value

    def duration(self, field: str) -> int | None:
        """Return a duration in microseconds, or None when absent."""
        value = self.take(field)
        return None if value is None else parse_duration(value, f"{self.where}: {field}")

    def choice(self, field: str, choices: tuple[str, ...], default: str | None = None) -> Any:
        """Return a field that must be one of `choices`."""
        value = self.take(field, default)
        if value not in choices:
            raise self.error(f"{field!r} must be one of {', '.join(choices)}; got {value!r}")
        return value

    def schema(self, field: str) -> dict[str, DType]:
        """Return a field that maps column names to types."""
        found = {}
        for name, dtype in self.mapping(field).items():
            check_identifier(name, f"{self.where}: column")
            found[name] = DType.parse(dtype, f"{self.where}: column {name!r}")
        return found

    def done(self) -> None:
        """Raise when a field is left that nobody asked for."""
        for field in self._left:
            raise self.error(f"unknown field {field!r}", hint="Check the spelling.")

    def error(self, reason: str, hint: str = "") -> DefinitionError:
        return DefinitionError(f"{self.where}: {reason}", hint=hint)


def _each(
    objects: Mapping[str, Any], what: str, parse: Callable[[_Fields, str], T]
) -> dict[str, T]:
    found = {}
    for name, value in sorted(objects.items()):
        check = check_name if what == "job" else check_identifier
        fields = _Fields(value, f"{what} {name!r}")
        try:
            found[name] = parse(fields, check(name, what))
        except DefinitionError:
            raise
        except MlpdError as error:
            message = error.message if name in error.message else f"{what} {name!r}: {error}"
            raise DefinitionError(message, code=error.code, hint=error.hint) from None
        fields.done()
    return found


def _entity(fields: _Fields, name: str) -> EntitySpec:
    keys = fields.schema("keys")
    if not keys or any(dtype not in KEY_TYPES for dtype in keys.values()):
        raise fields.error(f"'keys' needs at least one column of {', '.join(KEY_TYPES)}")
    return EntitySpec(name, tuple(keys.items()))


def _source(fields: _Fields, name: str) -> SourceSpec:
    spec = SourceSpec(
        name=name,
        timestamp=check_identifier(fields.text("timestamp"), "timestamp column"),
        schema=fields.schema("schema"),
        delay_us=fields.duration("delay"),
    )
    for column in (spec.timestamp, *spec.schema):
        if column in RESERVED_COLUMNS:
            raise fields.error(f"the column name {column!r} is reserved")
    if spec.timestamp in spec.schema:
        raise fields.error(f"the schema must not repeat the timestamp column {spec.timestamp!r}")
    if not spec.schema:
        raise fields.error("'schema' needs at least one column")
    return spec


def _view(
    fields: _Fields,
    name: str,
    entities: Mapping[str, EntitySpec],
    sources: Mapping[str, SourceSpec],
) -> ViewSpec:
    kind = fields.choice("kind", ("latest", "window"))
    entity, source = fields.text("entity"), fields.text("source")
    if entity not in entities:
        raise fields.error(f"unknown entity {entity!r}; known: {', '.join(sorted(entities))}")
    if source not in sources:
        raise fields.error(f"unknown source {source!r}; known: {', '.join(sorted(sources))}")
    for column, dtype in entities[entity].keys:
        if sources[source].schema.get(column) != dtype:
            raise fields.error(
                f"source {source!r} has no {dtype} column {column!r}, the key of entity {entity!r}"
            )
    freshness_us = fields.duration("freshness")
    build = _latest if kind == "latest" else _window
    return build(fields, name, entity, sources[source], freshness_us)


def _latest(
    fields: _Fields, name: str, entity: str, source: SourceSpec, freshness_us: int | None
) -> ViewSpec:
    features: dict[str, DType] = {}
    for column in fields.texts("features", MAX_FEATURES):
        if column not in source.schema:
            raise fields.error(
                f"source {source.name!r} has no column {column!r}; "
                f"it has: {', '.join(source.schema)}"
            )
        features[column] = source.schema[column]
    if not features:
        raise fields.error("'features' needs at least one column of the source")
    return ViewSpec(
        name=name,
        kind="latest",
        entity=entity,
        source=source.name,
        features=features,
        ttl_us=fields.duration("ttl"),
        freshness_us=freshness_us,
        defaults=_defaults(fields, features),
    )


def _defaults(fields: _Fields, features: Mapping[str, DType]) -> dict[str, Any]:
    defaults = fields.mapping("defaults")
    for feature, value in defaults.items():
        if feature not in features:
            raise fields.error(f"default for the unknown feature {feature!r}")
        what = f"default of {feature!r}"
        kept = convert_value(features[feature], value, f"{fields.where}: {what}")
        if isinstance(kept, bytes) or (isinstance(kept, float) and not isfinite(kept)):
            raise fields.error(f"the {what} can't be written as JSON: {kept!r:.60}")
    return defaults


def _window(
    fields: _Fields, name: str, entity: str, source: SourceSpec, freshness_us: int | None
) -> ViewSpec:
    where = fields.where
    windows = [parse_duration(w, f"{where}: window") for w in fields.items("windows", MAX_WINDOWS)]
    hop_us = fields.duration("hop")
    hops = [hop_us or default_hop_us(window) for window in windows]
    if not windows or len(set(windows)) < len(windows):
        raise fields.error("'windows' needs at least one duration, each once")
    if any(hop > window for hop, window in zip(hops, windows, strict=True)):
        raise fields.error("'hop' must not be longer than the shortest window")
    aggregates = [
        _aggregate(_Fields(a, f"{where}: aggregate"), source)
        for a in fields.items("aggregates", MAX_AGGREGATES)
    ]
    features = {
        window_feature(a.name, w): _aggregate_type(a, source) for a in aggregates for w in windows
    }
    if not aggregates or len(features) < len(aggregates) * len(windows):
        raise fields.error("'aggregates' needs at least one aggregate, each name once")
    return ViewSpec(
        name=name,
        kind="window",
        entity=entity,
        source=source.name,
        features=features,
        freshness_us=freshness_us,
        windows_us=tuple(windows),
        hops_us=tuple(hops),
        aggregates=tuple(aggregates),
        closed=fields.choice("closed", ("left", "right"), "left"),
        defaults=_defaults(fields, features),
    )


def _aggregate(fields: _Fields, source: SourceSpec) -> AggregateSpec:
    function = fields.choice("function", AGGREGATE_FUNCTIONS)
    spec = AggregateSpec(
        name=check_identifier(fields.text("name"), fields.where),
        function=function,
        input=fields.optional_text("input"),
        filter=fields.optional_text("filter"),
    )
    if spec.input is None and function != "count":
        raise fields.error(f"{function} needs an 'input': a column or an expression")
    if spec.input is not None:
        kind = parse_expression(spec.input, source.schema, fields.where).dtype
        if not kind.is_numeric and function != "count":
            raise fields.error(f"{function} takes numbers, but {spec.input!r} is {kind}")
    if spec.filter is not None:
        kind = parse_expression(spec.filter, source.schema, fields.where).dtype
        if kind is not DType.BOOL:
            raise fields.error(f"the filter {spec.filter!r} is {kind}, not a condition")
    fields.done()
    return spec


def _aggregate_type(aggregate: AggregateSpec, source: SourceSpec) -> DType:
    if aggregate.function == "count":
        return DType.INT64
    if aggregate.function in ("mean", "var", "std") or aggregate.input is None:
        return DType.FLOAT64
    kind = parse_expression(aggregate.input, source.schema, aggregate.name).dtype
    if kind in (DType.FLOAT32, DType.FLOAT64):
        return DType.FLOAT64
    return DType.INT64


def _transform(fields: _Fields, name: str) -> TransformSpec:
    source = fields.text("source")
    if len(source) > MAX_SOURCE_CHARS:
        raise fields.error(f"the source has over {MAX_SOURCE_CHARS} characters")
    output = DType.parse(fields.text("output"), f"{fields.where}: output")
    if not output.is_numeric:
        raise fields.error(f"the output is {output}; transforms return numbers or bool")
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


def _service(fields: _Fields, name: str) -> ServiceSpec:
    features = fields.texts("features", MAX_FEATURES)
    service = ServiceSpec(name, tuple(features), fields.schema("request"))
    if len(set(service.vector)) < len(service.vector):
        raise fields.error("a feature or request field stands twice")
    if not service.vector:
        raise fields.error("it has neither features nor request fields")
    return service


def _job(fields: _Fields, name: str, definitions: Definitions) -> JobSpec:
    spine = _Fields(fields.need("spine"), f"{fields.where}: spine")
    start, end = spine.take("start"), spine.take("end")
    spec = JobSpec(
        name=name,
        model=check_name(fields.take("model", name), "model"),
        service=fields.text("service"),
        spine_source=spine.text("source"),
        spine_time=spine.text("time"),
        spine_filter=spine.optional_text("filter"),
        start_us=None if start is None else parse_time(start, f"{spine.where}: start"),
        end_us=None if end is None else parse_time(end, f"{spine.where}: end"),
        label=fields.text("label"),
        categorical=tuple(fields.texts("categorical", MAX_FEATURES)),
        params=fields.mapping("params"),
        gate=_gate(fields),
        schedule=fields.optional_text("schedule"),
        **dict(_job_choices(fields)),
    )
    spine.done()
    _check_job(fields, spec, definitions)
    return spec


def _gate(fields: _Fields) -> dict[str, float]:
    bounds = fields.mapping("gate")
    for metric, bound in bounds.items():
        if isinstance(bound, bool) or not isinstance(bound, int | float):
            raise fields.error(f"the gate's bound of {metric!r} must be a number, got {bound!r}")
    return bounds


def _job_choices(fields: _Fields) -> Iterator[tuple[str, Any]]:
    yield "objective", fields.choice("objective", ("binary", "regression"), "binary")
    yield "trainer", fields.choice("trainer", ("lightgbm",), "lightgbm")
    yield "deploy", fields.choice("deploy", ("none", "champion"), "none")
    yield "mode", fields.choice("mode", ("as_known", "as_corrected"), "as_known")
    for field in ("num_boost_round", "early_stopping_rounds"):
        value = fields.take(field)
        if value is not None:
            if fields.typed(field, value, int) < 1:
                raise fields.error(f"{field!r} must be at least 1")
            yield field, value
    for field in ("valid_share", "test_share"):
        value = fields.take(field)
        if value is not None:
            if not 0 < fields.typed(field, value, float) < 1:
                raise fields.error(f"{field!r} must lie between 0 and 1")
            yield field, value


def _check_job(fields: _Fields, job: JobSpec, definitions: Definitions) -> None:
    closure = build_closure(definitions, definitions.service(job.service))
    source = definitions.source(job.spine_source)
    if source.schema.get(job.spine_time) is not DType.TIMESTAMP:
        raise fields.error(f"source {source.name!r} has no timestamp column {job.spine_time!r}")
    needed = dict(closure.key_columns) | dict(closure.service.request)
    for column, dtype in needed.items():
        if source.schema.get(column) != dtype:
            raise fields.error(
                f"source {source.name!r} has no {dtype} column {column!r}, "
                f"which service {job.service!r} needs"
            )
    parse_expression(job.label, source.schema, f"{fields.where}: label")
    if job.spine_filter is not None:
        parse_expression(job.spine_filter, source.schema, f"{fields.where}: filter")
    _check_vector(fields, job, closure)
    if job.valid_share + job.test_share >= 1:
        raise fields.error("'valid_share' and 'test_share' leave nothing to train on")


def _check_vector(fields: _Fields, job: JobSpec, closure: Closure) -> None:
    for feature in job.categorical:
        if feature not in closure.service.vector:
            raise fields.error(f"categorical {feature!r} is no feature of {job.service!r}")
    for feature, dtype in closure.dtypes.items():
        if dtype is DType.BYTES:
            raise fields.error(f"feature {feature!r} is bytes, which no trainer takes")
        if dtype is DType.STRING and feature not in job.categorical:
            raise fields.error(f"text feature {feature!r} must be listed under 'categorical'")


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
