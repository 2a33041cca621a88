"""Training jobs of the document, read and checked into specs against service and source."""

from collections.abc import Iterator
from typing import Any, get_args

from mlpd.core.closure import build_closure
from mlpd.core.columns import DType
from mlpd.core.deploys import NONE, check_deploy
from mlpd.core.errors import ValidationError
from mlpd.core.expressions import parse_expression
from mlpd.core.fields import Fields
from mlpd.core.keys import KEY_TYPES
from mlpd.core.names import check_name
from mlpd.core.numbers import is_number
from mlpd.core.specs import (
    LIGHTGBM_OBJECTIVES,
    MAX_FEATURES,
    Calibration,
    Closure,
    CrossValidationSpec,
    Definitions,
    JobSpec,
    SearchRange,
    SearchSpec,
    SourceSpec,
)
from mlpd.core.time import parse_time

FOLDS_MIN, FOLDS_MAX = 2, 20
BOUND_MAX = 1e15
"""Of a gate: a run's record holds integers of 64 bits."""
TRIALS_MAX = 1000
CHOICES_MAX = 100
OBJECTIVE_NAMES = ("objective", "objective_type", "app", "application", "loss")
"""LightGBM's names of one parameter."""


def parse_job(fields: Fields, name: str, definitions: Definitions) -> JobSpec:
    """Return a job, checked against `definitions`; raises DefinitionError, and as `parse_time`."""
    spine = Fields(fields.need("spine"), f"{fields.where}: spine")
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
        spine_closed=spine.choice("closed", ("right", "left"), "right"),
        label=fields.text("label"),
        categorical=tuple(fields.texts("categorical", MAX_FEATURES)),
        params=fields.mapping("params"),
        gate=_gate(fields),
        schedule=fields.optional_text("schedule"),
        group=fields.optional_text("group"),
        gap_us=fields.duration("gap") or 0,
        cross_validation=_cross_validation(fields),
        search=_search(fields),
        calibration=_calibration(fields),
        **dict(_job_choices(fields)),
    )
    spine.done()
    _check_job(fields, spec, definitions)
    return spec


def _gate(fields: Fields) -> dict[str, float]:
    bounds = fields.mapping("gate")
    for metric, bound in bounds.items():
        if not is_number(bound) or abs(bound) > BOUND_MAX:
            raise fields.error(
                f"the gate's bound of {metric!r} must be a number, got {bound!r:.60}",
                hint=f"At most {BOUND_MAX:g} in size.",
            )
    shadow = [metric for metric in bounds if metric.startswith("shadow_")]
    if shadow and not bounds.get("shadow_rows", 0) >= 1:
        raise fields.error(
            f"the gate's bound of {shadow[0]!r} needs 'shadow_rows', after how many rows, 1 or more"
        )
    return bounds


def _cross_validation(fields: Fields) -> CrossValidationSpec | None:
    value = fields.take("cross_validation")
    if value is None:
        return None
    inner = Fields(value, f"{fields.where}: cross_validation")
    folds = inner.typed("folds", inner.need("folds"), int)
    if not FOLDS_MIN <= folds <= FOLDS_MAX:
        raise inner.error(f"'folds' must be from {FOLDS_MIN} to {FOLDS_MAX}, got {folds}")
    window = inner.choice("window", ("expanding", "rolling"), "expanding")
    inner.done()
    return CrossValidationSpec(folds, window)


def _calibration(fields: Fields) -> Any:
    named = fields.take("calibration")
    known = get_args(Calibration)
    if named is not None and named not in known:
        raise fields.error(f"'calibration' must be one of {', '.join(known)}, got {named!r:.60}")
    return named


def _search(fields: Fields) -> SearchSpec | None:
    value = fields.take("search")
    if value is None:
        return None
    inner = Fields(value, f"{fields.where}: search")
    trials = inner.typed("trials", inner.need("trials"), int)
    if not 1 <= trials <= TRIALS_MAX:
        raise inner.error(f"'trials' must be from 1 to {TRIALS_MAX}, got {trials}")
    space = {name: _dimension(inner, name, of) for name, of in inner.mapping("space").items()}
    if not space:
        raise inner.error("'space' needs at least one parameter")
    prune = inner.typed("prune", inner.take("prune", True), bool)
    spec = SearchSpec(trials, space, inner.duration("timeout"), prune)
    inner.done()
    return spec


def _dimension(
    search: Fields, name: str, value: Any
) -> SearchRange | tuple[str | float | bool, ...]:
    inner = Fields(value, f"{search.where}: space: {name}")
    choices = inner.items("choices", CHOICES_MAX)
    if choices:
        if not all(isinstance(choice, str | int | float) for choice in choices):
            raise inner.error("'choices' must hold texts, numbers, true or false")
        inner.done()
        return tuple(choices)
    low, high = (_number(inner, end) for end in ("low", "high"))
    log = inner.typed("log", inner.take("log", False), bool)
    inner.done()
    if not low < high or (log and low <= 0):
        raise inner.error(
            f"{low!r} to {high!r} is no range"
            + (", by factors both must be above 0" if log else ": 'low' must be below 'high'")
        )
    return SearchRange(low, high, log)


def _number(fields: Fields, field: str) -> float:
    value = fields.need(field)
    if not is_number(value):
        raise fields.error(f"{field!r} must be a number, got {value!r:.60}")
    return value


def _deploy(fields: Fields) -> str:
    try:
        return check_deploy(fields.take("deploy", NONE))
    except ValidationError as error:
        raise fields.error(f"'deploy': {error.message}", hint=error.hint) from None


def _job_choices(fields: Fields) -> Iterator[tuple[str, Any]]:
    yield "objective", fields.choice("objective", tuple(LIGHTGBM_OBJECTIVES), "binary")
    for field, usual in (("timezone", "UTC"), ("catch_up", "latest")):
        yield field, fields.typed(field, fields.take(field, usual), str)
    yield "trainer", check_name(fields.take("trainer", "lightgbm"), "trainer")
    yield "deploy", _deploy(fields)
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


def _check_job(fields: Fields, job: JobSpec, definitions: Definitions) -> None:
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
    _check_objective(fields, job, source)
    if job.calibration is not None and job.objective != "binary":
        raise fields.error(
            f"'calibration' says nothing for the objective {job.objective!r}",
            hint="It maps the one score of a binary job to the chance of 1.",
        )
    if job.calibration is not None and job.trainer != "lightgbm":
        raise fields.error(
            f"'calibration' follows the exact scores of LightGBM, not those of {job.trainer!r}",
            hint="Let the trainer calibrate, such as CalibratedClassifierCV of scikit-learn.",
        )
    if job.search is not None and job.trainer != "lightgbm":
        raise fields.error(f"'search' tries LightGBM's parameters, not those of {job.trainer!r}")
    if job.valid_share + job.test_share >= 1:
        raise fields.error("'valid_share' and 'test_share' leave nothing to train on")


def _check_objective(fields: Fields, job: JobSpec, source: SourceSpec) -> None:
    names = OBJECTIVE_NAMES if job.trainer == "lightgbm" else ()
    named = next((job.params[n] for n in names if n in job.params), None)
    known = LIGHTGBM_OBJECTIVES[job.objective]
    if named is not None and named not in known:
        raise fields.error(
            f"the parameter objective {named!r} is none for a job of objective {job.objective!r}",
            hint=f"It takes: {', '.join(known)}.",
        )
    if (job.group is not None) != (job.objective == "ranking"):
        raise fields.error(
            "a ranking needs a 'group', the column whose equal values are ranked together"
            if job.group is None
            else f"'group' says nothing for the objective {job.objective!r}"
        )
    if job.group is not None and source.schema.get(job.group) not in KEY_TYPES:
        raise fields.error(
            f"'group' must be a column of {', '.join(KEY_TYPES)} of source {source.name!r}, "
            f"got {job.group!r}"
        )


def _check_vector(fields: Fields, job: JobSpec, closure: Closure) -> None:
    for feature in job.categorical:
        if feature not in closure.service.vector:
            raise fields.error(f"categorical {feature!r} is no feature of {job.service!r}")
    for feature, dtype in closure.dtypes.items():
        if dtype is DType.BYTES or dtype.element is not None:
            raise fields.error(
                f"feature {feature!r} is {dtype}, which no trainer takes",
                hint="Train on a service without it; others may serve it.",
            )
        if dtype is DType.STRING and feature not in job.categorical:
            raise fields.error(f"text feature {feature!r} must be listed under 'categorical'")
