"""Views of the document, read and checked into specs: latest values and window aggregates."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from mlpd.core.columns import DType
from mlpd.core.convert import convert_value
from mlpd.core.dtypes import list_of
from mlpd.core.expressions import parse_expression
from mlpd.core.fields import Fields
from mlpd.core.names import check_identifier
from mlpd.core.specs import (
    AGGREGATE_FUNCTIONS,
    MAX_FEATURES,
    MAX_LENGTH,
    PARAMETERS,
    AggregateSpec,
    EntitySpec,
    SourceSpec,
    ViewSpec,
    default_hop_us,
    window_feature,
)
from mlpd.core.time import format_duration, parse_duration

MAX_WINDOWS = 16
MAX_AGGREGATES = 64
ANY_TYPE = ("count", "approx_distinct")
"""Aggregates over any type, whose result is a number of values."""
PARAMETER_HINT = "ewma takes a half_life such as 6h, last_n an n, topk a k."


def parse_view(
    fields: Fields,
    name: str,
    entities: Mapping[str, EntitySpec],
    sources: Mapping[str, SourceSpec],
) -> ViewSpec:
    """Return a view over one of `sources`; raises DefinitionError naming the view."""
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
    fields: Fields, name: str, entity: str, source: SourceSpec, freshness_us: int | None
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


def _defaults(fields: Fields, features: Mapping[str, DType]) -> dict[str, Any]:
    defaults = fields.mapping("defaults")
    for feature, value in defaults.items():
        if feature not in features:
            raise fields.error(f"default for the unknown feature {feature!r}")
        what = f"default of {feature!r}"
        convert_value(features[feature], value, f"{fields.where}: {what}")
        parts = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(p, bytes) or (isinstance(p, float) and not isfinite(p)) for p in parts):
            raise fields.error(
                f"the {what} can't be written as JSON: {value!r:.60}",
                hint="Bytes can be as text: 0x and two hex digits each; for NaN there is nothing.",
            )
    return defaults


def _window(
    fields: Fields, name: str, entity: str, source: SourceSpec, freshness_us: int | None
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
        _aggregate(Fields(a, f"{where}: aggregate"), source)
        for a in fields.items("aggregates", MAX_AGGREGATES)
    ]
    features = {
        window_feature(a.name, w): _aggregate_type(a, source) for a in aggregates for w in windows
    }
    if not aggregates or len(features) < len(aggregates) * len(windows):
        raise fields.error("'aggregates' needs at least one aggregate, each name once")
    _check_retention(fields, source, windows, hops)
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


def _check_retention(
    fields: Fields, source: SourceSpec, windows: list[int], hops: list[int]
) -> None:
    reach_us = max(map(sum, zip(windows, hops, strict=True)))
    if source.retention_us is not None and source.retention_us < reach_us:
        raise fields.error(
            f"source {source.name!r} keeps its history for {format_duration(source.retention_us)} "
            f"('retention'), and the longest window with its hop takes {format_duration(reach_us)}",
            hint="Keep the source's history longer, or shorten the window.",
        )


def _aggregate(fields: Fields, source: SourceSpec) -> AggregateSpec:
    function = fields.choice("function", AGGREGATE_FUNCTIONS)
    spec = AggregateSpec(
        name=check_identifier(fields.text("name"), fields.where),
        function=function,
        input=fields.optional_text("input"),
        filter=fields.optional_text("filter"),
        parameter=_parameter(fields, function),
    )
    if spec.input is None and function != "count":
        raise fields.error(f"{function} needs an 'input': a column or an expression")
    if spec.input is not None:
        kind = parse_expression(spec.input, source.schema, fields.where).dtype
        if not kind.is_numeric and function not in ANY_TYPE:
            raise fields.error(
                f"{function} takes numbers, but {spec.input!r} is {kind}",
                hint="Send an integer code beside it, or take count or approx_distinct.",
            )
    if spec.filter is not None:
        kind = parse_expression(spec.filter, source.schema, fields.where).dtype
        if kind is not DType.BOOL:
            raise fields.error(f"the filter {spec.filter!r} is {kind}, not a condition")
    fields.done()
    return spec


def _parameter(fields: Fields, function: str) -> int | None:
    """Return what the aggregate was declared with: a half-life in us, or a length."""
    given = {
        "half_life": fields.duration("half_life"),
        "n": fields.take("n"),
        "k": fields.take("k"),
    }
    wanted = PARAMETERS.get(function)
    for field, value in given.items():
        if field != wanted and value is not None:
            raise fields.error(f"{function} takes no {field!r}", hint=PARAMETER_HINT)
    if wanted is None:
        return None
    if given[wanted] is None:
        raise fields.error(f"{function} needs {wanted!r}", hint=PARAMETER_HINT)
    value = fields.typed(wanted, given[wanted], int)
    if wanted != "half_life" and not 1 <= value <= MAX_LENGTH:
        raise fields.error(f"{wanted!r} must be from 1 to {MAX_LENGTH}, got {value!r:.60}")
    return value


def _aggregate_type(aggregate: AggregateSpec, source: SourceSpec) -> DType:
    if aggregate.function in ANY_TYPE:
        return DType.INT64
    if aggregate.function in ("mean", "var", "std", "ewma") or aggregate.input is None:
        return DType.FLOAT64
    kind = parse_expression(aggregate.input, source.schema, aggregate.name).dtype
    number = DType.FLOAT64 if kind in (DType.FLOAT32, DType.FLOAT64) else DType.INT64
    return list_of(number) if aggregate.function in ("last_n", "topk") else number
