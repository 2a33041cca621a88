"""Specs: definitions as the engines read them, frozen, checked, with every name resolved.

`core.document.parse_document` makes them from the declarative document that `mlpd apply` sends.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from mlpd.core.columns import DType
from mlpd.core.errors import NotFoundError
from mlpd.core.hashing import definition_hash
from mlpd.core.time import DAY_US, HOUR_US, MINUTE_US, format_duration

T = TypeVar("T")

AGGREGATE_FUNCTIONS = (
    *("count", "sum", "mean", "min", "max", "var", "std", "first", "last"),
    *("ewma", "approx_distinct", "last_n", "topk"),
)
"""Window aggregates; `count` alone takes no input (then it counts events)."""

PARAMETERS = {"ewma": "half_life", "last_n": "n", "topk": "k"}
"""What some aggregates must be declared with."""

MAX_FEATURES = 2048
MAX_LENGTH = 16
"""Of the lists of last_n and topk.  A value and its stamp take 32 bytes, in each tile."""

EVENT_ID_RETENTION_US = 7 * DAY_US
"""How long event ids are known where a source says nothing: what Kafka keeps by default."""

CLASSES_MAX = 100
"""Classes of a model at most, numbered from 0."""
Objective = Literal["binary", "regression", "multiclass", "ranking"]
"""What a job trains for."""

Calibration = Literal["isotonic", "sigmoid"]
"""How raw scores become chances, fitted on the validation rows: steps, or Platt's curve."""

LIGHTGBM_OBJECTIVES: Mapping[Objective, tuple[str, ...]] = {
    "binary": ("binary", "cross_entropy", "xentropy"),
    "regression": (
        *("regression", "regression_l2", "l2", "mean_squared_error", "mse", "rmse"),
        *("l2_root", "root_mean_squared_error", "regression_l1", "l1", "mean_absolute_error"),
        *("mae", "huber", "fair", "quantile", "mape", "mean_absolute_percentage_error"),
        *("poisson", "gamma", "tweedie"),
    ),
    "multiclass": ("multiclass", "softmax", "multiclassova", "multiclass_ova", "ova", "ovr"),
    "ranking": ("lambdarank", "rank_xendcg", "xendcg", "xe_ndcg", "xe_ndcg_mart", "xendcg_mart"),
}
"""What a job's `params` may name as LightGBM's `objective`; the first is taken without a word."""

Closed = Literal["left", "right"]
"""Which end of a window `[t - W, t]` is included: left is `floor(t - W, hop) <= event_time < t`."""


@dataclass(frozen=True, slots=True)
class EntitySpec:
    """An entity: its key columns in order, each with its type."""

    name: str
    keys: tuple[tuple[str, DType], ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the key columns, as in sources and requests."""
        return tuple(name for name, _ in self.keys)

    @property
    def types(self) -> tuple[DType, ...]:
        """Types of the key columns."""
        return tuple(dtype for _, dtype in self.keys)


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """A stream of events: `timestamp` names the event time, `schema` the other columns.

    `delay_us`: what an import without known_at adds to event_time, or None when such an import
    is refused.  `event_id`: the column that tells events apart, or None where every event counts;
    a second one with the same id within `event_id_retention_us` of arrival is left out.
    `retention_us`: how old the events that joins can rely on may be, or None: all are kept.
    """

    name: str
    timestamp: str
    schema: Mapping[str, DType]
    delay_us: int | None = None
    event_id: str | None = None
    event_id_retention_us: int = EVENT_ID_RETENTION_US
    retention_us: int | None = None


@dataclass(frozen=True, slots=True)
class AggregateSpec:
    """One aggregate of a window view: `function` over `input` (an expression) where `filter`.

    `parameter`: the half-life of an ewma in microseconds, n of last_n, k of topk.
    """

    name: str
    function: str
    input: str | None = None
    filter: str | None = None
    parameter: int | None = None

    @property
    def meaning(self) -> list[str | int | None]:
        """All that decides its values, for the view's hash."""
        declared = [] if self.parameter is None else [self.parameter]
        return [self.name, self.function, self.input, self.filter, *declared]


@dataclass(frozen=True, slots=True)
class ViewSpec:
    """A feature view: the latest values of columns, or aggregates over windows, per entity.

    `kind` latest: `features` maps names to types, `ttl_us` None is infinite.  `kind` window:
    `windows_us`, `aggregates`, `hops_us` (one per window) and `closed`; `features` maps
    `<aggregate>_<window>` to types, windows within aggregates.
    `freshness_us`: the age that a served value should stay under, or None.
    """

    name: str
    kind: Literal["latest", "window"]
    entity: str
    source: str
    features: Mapping[str, DType]
    ttl_us: int | None = None
    freshness_us: int | None = None
    windows_us: tuple[int, ...] = ()
    hops_us: tuple[int, ...] = ()
    aggregates: tuple[AggregateSpec, ...] = ()
    closed: Closed = "left"
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reach_us(self) -> int:
        """How long before a read the events begin that its windows count; 0 for latest values."""
        return max(map(sum, zip(self.windows_us, self.hops_us, strict=True)), default=0)

    @property
    def hash(self) -> str:
        """Hash of all that decides this view's values: another hash is another version."""
        return definition_hash(
            [
                *(self.kind, self.entity, self.source, self.ttl_us, self.closed),
                *(list(self.windows_us), list(self.hops_us), dict(self.features)),
                [aggregate.meaning for aggregate in self.aggregates],
                dict(self.defaults),
            ]
        )


@dataclass(frozen=True, slots=True)
class TransformSpec:
    """A compiled function of features: `inputs` pairs each argument with a feature reference.

    A reference is `view.feature`, `request.field` or the name of another transform.
    """

    name: str
    source: str
    inputs: tuple[tuple[str, str], ...]
    output: DType


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """The features that a model reads, in the order of its vector.

    `features`: references `view.feature`, `transform`, or the key column of an entity.
    `request`: fields that come with each request; they end the vector, in order.
    """

    name: str
    features: tuple[str, ...]
    request: Mapping[str, DType]

    @property
    def vector(self) -> tuple[str, ...]:
        """Names of the vector's elements: `features`, then the request fields."""
        return (*self.features, *self.request)


@dataclass(frozen=True, slots=True)
class CrossValidationSpec:
    """Models on the past, each judged on what came next: `folds` of them, over all but the test.

    `window` expanding: each trains on all rows before its fold; rolling: on as many as the first.
    """

    folds: int
    window: Literal["expanding", "rolling"] = "expanding"


@dataclass(frozen=True, slots=True)
class SearchRange:
    """Numbers from `low` to `high`, both included; whole ones if both are; `log`: by factors."""

    low: float
    high: float
    log: bool = False

    @property
    def whole(self) -> bool:
        """Whether only integers are tried."""
        return isinstance(self.low, int) and isinstance(self.high, int)


@dataclass(frozen=True, slots=True)
class SearchSpec:
    """A search for parameters: at most `trials` models, judged on the validation rows.

    `space`: by parameter the range or the values to choose from.  `timeout_us`: how long all trials
    may take together; the one under way is finished.  `prune`: give up trials that are behind.
    """

    trials: int
    space: Mapping[str, SearchRange | tuple[str | float | bool, ...]]
    timeout_us: int | None = None
    prune: bool = True


@dataclass(frozen=True, slots=True)
class JobSpec:
    """A training job: which rows, which label, which features, how trained, when, and then what.

    The spine is every event of `spine_source` (where `spine_filter`) at its column `spine_time`; it
    brings the entity keys and request fields by name.  `label` is an expression over that source.
    A row counts once its event is known.  `start_us` (inclusive) and `end_us` (exclusive) bound
    `spine_time`.  `calibration`: how chances are fitted to the validation rows, of `binary` alone.
    `valid_share` and `test_share` are the last parts of the rows in time order; rows
    less than `gap_us` before a part are left out of what is before it.  `group`: the column whose
    equal values are ranked against each other; of rankings alone.  `schedule`, read in `timezone`,
    and `catch_up` are as `training.schedule` reads them, `deploy` as `deploys.check_deploy` does.
    """

    name: str
    model: str
    service: str
    spine_source: str
    spine_time: str
    label: str
    spine_filter: str | None = None
    start_us: int | None = None
    end_us: int | None = None
    spine_closed: Literal["right", "left"] = "right"
    objective: Objective = "binary"
    group: str | None = None
    valid_share: float = 0.15
    test_share: float = 0.15
    gap_us: int = 0
    cross_validation: CrossValidationSpec | None = None
    search: SearchSpec | None = None
    calibration: Calibration | None = None
    categorical: tuple[str, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    num_boost_round: int = 500
    early_stopping_rounds: int = 30
    trainer: str = "lightgbm"
    schedule: str | None = None
    timezone: str = "UTC"
    catch_up: str = "latest"
    gate: Mapping[str, float] = field(default_factory=dict)
    deploy: str = "none"
    mode: Literal["as_known", "as_corrected"] = "as_known"


@dataclass(frozen=True)
class Definitions:
    """Everything that was applied, by kind and name; immutable: an apply makes a new one."""

    entities: Mapping[str, EntitySpec] = field(default_factory=dict)
    sources: Mapping[str, SourceSpec] = field(default_factory=dict)
    views: Mapping[str, ViewSpec] = field(default_factory=dict)
    transforms: Mapping[str, TransformSpec] = field(default_factory=dict)
    services: Mapping[str, ServiceSpec] = field(default_factory=dict)
    jobs: Mapping[str, JobSpec] = field(default_factory=dict)

    def entity(self, name: str) -> EntitySpec:
        """Return the entity `name`, else raise NotFoundError(code="unknown_entity")."""
        return _named(self.entities, name, "entity")

    def source(self, name: str) -> SourceSpec:
        """Return the source `name`, else raise NotFoundError(code="unknown_source")."""
        return _named(self.sources, name, "source")

    def view(self, name: str) -> ViewSpec:
        """Return the view `name`, else raise NotFoundError(code="unknown_view")."""
        return _named(self.views, name, "view")

    def service(self, name: str) -> ServiceSpec:
        """Return the feature service `name`, else raise NotFoundError(code="unknown_service")."""
        return _named(self.services, name, "service")

    def job(self, name: str) -> JobSpec:
        """Return the job `name`, else raise NotFoundError(code="unknown_job")."""
        return _named(self.jobs, name, "job")


@dataclass(frozen=True, slots=True)
class Closure:
    """All that a feature service depends on, found once at apply.

    `view_features`: per view the features read, in first-use order.  `transforms`: each after
    what it reads.  `entities`: whose keys a request must bring.  `dtypes`: of every vector element.
    `hash`: of the meaning of all of it; a model pins it.
    """

    service: ServiceSpec
    view_features: Mapping[str, tuple[str, ...]]
    transforms: tuple[TransformSpec, ...]
    entities: tuple[EntitySpec, ...]
    dtypes: Mapping[str, DType]
    hash: str

    @property
    def key_columns(self) -> Mapping[str, DType]:
        """Key columns that a request or spine row must bring, with their types."""
        return {name: dtype for entity in self.entities for name, dtype in entity.keys}


def default_hop_us(window_us: int) -> int:
    """Return the hop of a window: 1 d from 12 d on, 1 h from 12 h on, else 5 min."""
    if window_us >= 12 * DAY_US:
        return DAY_US
    return HOUR_US if window_us >= 12 * HOUR_US else 5 * MINUTE_US


def window_feature(aggregate: str, window_us: int) -> str:
    """Return a window feature's name, for example `dep_delay_mean_1h`."""
    return f"{aggregate}_{format_duration(window_us)}"


def _named(mapping: Mapping[str, T], name: str, what: str) -> T:
    found = mapping.get(name)
    if found is None:
        known = ", ".join(sorted(mapping)) or "none"
        raise NotFoundError(
            f"unknown {what} {name!r}; known: {known}",
            code=f"unknown_{what}",
            hint="Check the spelling, or add it to your definitions and run mlpd apply.",
        )
    return found
