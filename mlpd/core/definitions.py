"""What users write: plain objects without side effects, turned into one declarative document."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mlpd.core.errors import DefinitionError


@dataclass(frozen=True)
class Entity:
    """A thing that features describe: `Entity("carrier", key="string")`.

    `key`: the type of a single key column (string, int64 or bytes), or a mapping of columns to
    types for a composite key.  `column`: name of the single key column, by default the entity's.
    """

    name: str
    key: str | Mapping[str, str] = "string"
    column: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the document form."""
        if isinstance(self.key, str):
            return {"keys": {self.column or self.name: self.key}}
        return {"keys": dict(self.key)}

    @property
    def columns(self) -> list[str]:
        """Names of the key columns."""
        return list(self.to_dict()["keys"])


@dataclass(frozen=True)
class Source:
    """A stream of events: `timestamp` names the event-time column, `schema` the others.

    Types: `bool`, `int64`, `float32`, `float64`, `string`, `bytes`, `timestamp`, lists of one of
    these such as `list[string]`, and vectors such as `vector[float32, 128]`.
    `delay`: how long after its event time an imported row counts as known when the import brings
    no known_at.  `event_id`: the column (string, int64 or bytes) that tells events apart: a second
    one with the same id is left out, if it arrives within `event_id_retention` (7d) of the first.
    `retention`: how long its history is kept, at least the longest window; None is for ever.
    """

    name: str
    timestamp: str
    schema: Mapping[str, str]
    delay: str | None = None
    event_id: str | None = None
    event_id_retention: str | None = None
    retention: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the document form."""
        return _present(
            timestamp=self.timestamp,
            schema=dict(self.schema),
            delay=self.delay,
            event_id=self.event_id,
            event_id_retention=self.event_id_retention,
            retention=self.retention,
        )


@dataclass(frozen=True)
class Aggregate:
    """One aggregate of a window view; use the constructors `count`, `mean`, `max` ...

    `input` is a column or an expression such as `dep_delay > 15` (a bool counts as 0 or 1, so its
    mean is a share); `filter` keeps the events for which it is true.  `half_life` is for
    `ewma`, `n` for `last_n`, `k` for `topk`.
    """

    function: str
    input: str | None = None
    name: str | None = None
    filter: str | None = None
    half_life: str | None = None
    n: int | None = None
    k: int | None = None

    @staticmethod
    def count(
        input: str | None = None,  # noqa: A002 - the document's word
        *,
        name: str | None = None,
        filter: str | None = None,  # noqa: A002 - the document's word
    ) -> "Aggregate":
        """Count events, or the non-null values of `input`; 0 over an empty window."""
        return Aggregate("count", input, name, filter)

    @staticmethod
    def sum(input: str, *, name: str | None = None, filter: str | None = None) -> "Aggregate":  # noqa: A002
        """Sum of the values; 0 over an empty window."""
        return Aggregate("sum", input, name, filter)

    @staticmethod
    def mean(input: str, *, name: str | None = None, filter: str | None = None) -> "Aggregate":  # noqa: A002
        """Mean of the values; null over an empty window."""
        return Aggregate("mean", input, name, filter)

    @staticmethod
    def min(input: str, *, name: str | None = None, filter: str | None = None) -> "Aggregate":  # noqa: A002
        """Smallest value; null over an empty window."""
        return Aggregate("min", input, name, filter)

    @staticmethod
    def max(input: str, *, name: str | None = None, filter: str | None = None) -> "Aggregate":  # noqa: A002
        """Largest value; null over an empty window."""
        return Aggregate("max", input, name, filter)

    @staticmethod
    def var(input: str, *, name: str | None = None, filter: str | None = None) -> "Aggregate":  # noqa: A002
        """Variance with ddof 1; null below two values."""
        return Aggregate("var", input, name, filter)

    @staticmethod
    def std(input: str, *, name: str | None = None, filter: str | None = None) -> "Aggregate":  # noqa: A002
        """Standard deviation with ddof 1; null below two values."""
        return Aggregate("std", input, name, filter)

    @staticmethod
    def first(input: str, *, name: str | None = None, filter: str | None = None) -> "Aggregate":  # noqa: A002
        """Value of the earliest event; null over an empty window."""
        return Aggregate("first", input, name, filter)

    @staticmethod
    def last(input: str, *, name: str | None = None, filter: str | None = None) -> "Aggregate":  # noqa: A002
        """Value of the latest event; null over an empty window."""
        return Aggregate("last", input, name, filter)

    @staticmethod
    def ewma(
        input: str,  # noqa: A002 - the document's word
        *,
        half_life: str,
        name: str | None = None,
        filter: str | None = None,  # noqa: A002 - the document's word
    ) -> "Aggregate":
        """Mean in which a value weighs 2^(-age / half_life); null over an empty window."""
        return Aggregate("ewma", input, name, filter, half_life)

    @staticmethod
    def approx_distinct(
        input: str,  # noqa: A002 - the document's word
        *,
        name: str | None = None,
        filter: str | None = None,  # noqa: A002 - the document's word
    ) -> "Aggregate":
        """Number of distinct values, of any type: exact up to 32, beyond that within some 6 %.

        0 over an empty window.
        """
        return Aggregate("approx_distinct", input, name, filter)

    @staticmethod
    def last_n(
        input: str,  # noqa: A002 - the document's word
        *,
        n: int,
        name: str | None = None,
        filter: str | None = None,  # noqa: A002 - the document's word
    ) -> "Aggregate":
        """List of the values of the n latest events, the latest last; null over an empty window.

        n is at most 16.
        """
        return Aggregate("last_n", input, name, filter, n=n)

    @staticmethod
    def topk(
        input: str,  # noqa: A002 - the document's word
        *,
        k: int,
        name: str | None = None,
        filter: str | None = None,  # noqa: A002 - the document's word
    ) -> "Aggregate":
        """List of the k most frequent values, of equally frequent ones the smaller first.

        Exact up to 32 distinct values in the window; of more, those that make up over 1/33 of all
        are found, by estimated counts.  Null over an empty window.  k is at most 16.
        """
        return Aggregate("topk", input, name, filter, k=k)

    def to_dict(self) -> dict[str, Any]:
        """Return the document form."""
        return _present(
            name=self.name or self._default_name(),
            function=self.function,
            input=self.input,
            filter=self.filter,
            half_life=self.half_life,
            n=self.n,
            k=self.k,
        )

    def _default_name(self) -> str:
        if self.filter is not None or not (self.input or "x").isidentifier():
            raise DefinitionError(
                f"aggregate {self.function}({self.input!r}) needs a name",
                hint='An aggregate over an expression or with a filter takes name="...".',
            )
        return self.function if self.input is None else f"{self.input}_{self.function}"


@dataclass(frozen=True)
class FeatureView:
    """The latest values of a source's columns per entity; older than `ttl` they are stale."""

    name: str
    entity: Entity
    source: Source
    features: Sequence[str]
    ttl: str | None = None
    freshness: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the document form."""
        return _present(
            kind="latest",
            entity=self.entity.name,
            source=self.source.name,
            features=list(self.features),
            ttl=self.ttl,
            freshness=self.freshness,
            defaults=dict(self.defaults) or None,
        )

    def feature_names(self) -> list[str]:
        """Names of the features, without the view's."""
        return list(self.features)

    def __getitem__(self, feature: str) -> str:
        return f"{self.name}.{feature}"


@dataclass(frozen=True)
class WindowView:
    """Aggregates of a source over sliding windows per entity: features `<aggregate>_<window>`.

    `defaults`: by feature, what stands in for the null of a window without values.
    """

    name: str
    entity: Entity
    source: Source
    windows: Sequence[str]
    aggregates: Sequence[Aggregate]
    hop: str | None = None
    closed: Literal["left", "right"] = "left"
    freshness: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the document form."""
        return _present(
            kind="window",
            entity=self.entity.name,
            source=self.source.name,
            windows=list(self.windows),
            aggregates=[a.to_dict() for a in self.aggregates],
            hop=self.hop,
            closed=self.closed,
            freshness=self.freshness,
            defaults=dict(self.defaults) or None,
        )

    def feature_names(self) -> list[str]:
        """Names of the features, without the view's."""
        return [f"{a.to_dict()['name']}_{w}" for a in self.aggregates for w in self.windows]

    def __getitem__(self, feature: str) -> str:
        return f"{self.name}.{feature}"


@dataclass(frozen=True)
class Transform:
    """A function of features, made by `@transform`; it travels as source."""

    name: str
    source: str
    inputs: Sequence[tuple[str, str]]
    output: str

    def to_dict(self) -> dict[str, Any]:
        """Return the document form."""
        return {
            "source": self.source,
            "inputs": [list(pair) for pair in self.inputs],
            "output": self.output,
        }


def transform(function: Callable[..., Any]) -> Transform:
    """Turn a function of scalars into a transform; annotations name its inputs and output type.

        @transform
        def delay_trend(a: "load.delay_mean_1h", b: "load.delay_mean_7d") -> "float64":
            return a - b

    Each argument's annotation is a feature reference: `view.feature`, `request.field` or another
    transform's name.  The body may use `math` and `np`; the daemon compiles it nopython.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    if not isinstance(tree, ast.FunctionDef):
        raise DefinitionError(f"transform {function.__name__!r} must be a def")
    annotations = {arg.arg: _annotation(arg.annotation, function) for arg in tree.args.args}
    output = _annotation(tree.returns, function)
    tree.decorator_list, tree.returns = [], None
    for arg in tree.args.args:
        arg.annotation = None
    return Transform(tree.name, ast.unparse(tree), list(annotations.items()), output)


def _annotation(node: ast.expr | None, function: Callable[..., Any]) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise DefinitionError(
        f"transform {function.__name__!r}: every argument and the result need a text annotation",
        hint='Example: def trend(a: "load.mean_1h") -> "float64".',
    )


@dataclass(frozen=True)
class FeatureService:
    """The features of a model in the order of its vector, then its request fields.

    `features` takes views (all their features), single references (`view["x"]` or "view.x"),
    transforms, and entities (their key columns, as categorical features).
    """

    name: str
    features: Sequence[Entity | FeatureView | WindowView | Transform | str]
    request: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the document form."""
        return {"features": list(self._references()), "request": dict(self.request)}

    def _references(self) -> Iterable[str]:
        for item in self.features:
            if isinstance(item, str):
                yield item
            elif isinstance(item, Entity):
                yield from item.columns
            elif isinstance(item, Transform):
                yield item.name
            else:
                yield from (item[name] for name in item.feature_names())


@dataclass(frozen=True)
class Spine:
    """The rows of a training set: the events of `source` at its timestamp column `time`.

    `closed`: "left" hides events of a row's own time from latest-value views, where the spine's own
    events are among what they show.
    """

    source: Source
    time: str
    filter: str | None = None
    start: str | None = None
    end: str | None = None
    closed: Literal["right", "left"] = "right"

    def to_dict(self) -> dict[str, Any]:
        """Return the document form."""
        return _present(
            source=self.source.name,
            time=self.time,
            filter=self.filter,
            start=self.start,
            end=self.end,
            closed=None if self.closed == "right" else self.closed,
        )


@dataclass(frozen=True)
class Job:
    """A training job: spine and label, service, trainer, schedule, gate and deploy step.

    `label`: an expression over the spine's source.  `categorical`: names of vector elements that
    are categories (text features must be among them).  `gate`: least metrics, such
    as {"auc": 0.7, "auc_over_champion": -0.002} (gained over the champion on the same rows), and
    most latency, drift and difference of a shadow (docs/paths/train.md, "Gate").
    `deploy`: what a version that passes becomes: `none`, `shadow` (alias `challenger`), `canary 5%`
    (that, with a share of the champion's routes) or `champion`.
    `objective`: labels are 0 or 1 for `binary`, class numbers from 0 for `multiclass`, grades from
    0 to 30 for `ranking`, which needs a `group`: the column of the spine's source whose equal
    values are ranked against each other.  `gap`: how long before the validation and the test rows
    nothing is trained on.  `cross_validation`: such as {"folds": 5, "window": "rolling"}.
    `calibration`: "isotonic" or "sigmoid" (Platt) fits the chances of a `binary` job to its
    validation rows.  `search`: tries parameters before the model is trained (pip install
    "mlpd[search]"), such as {"trials": 30, "timeout": "20m", "space": {"num_leaves": {"low": 8,
    "high": 256, "log": True}, "boosting": {"choices": ["gbdt", "dart"]}}}.
    `schedule`: a cron expression in `timezone`, "every 6h", "every 10000 rows of departures",
    "every 1d of departures" (of its event time), or "after JOB"; of runs missed, `catch_up` starts
    the "latest", none ("skip"), or the last N ("all:N").
    `trainer`: `lightgbm`, `sklearn`, `command` or a plugin's name; `params` are the trainer's own.
    """

    name: str
    service: FeatureService
    spine: Spine
    label: str
    model: str | None = None
    objective: Literal["binary", "regression", "multiclass", "ranking"] = "binary"
    group: str | None = None
    categorical: Sequence[str] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    num_boost_round: int = 500
    early_stopping_rounds: int = 30
    valid_share: float = 0.15
    test_share: float = 0.15
    gap: str | None = None
    cross_validation: Mapping[str, Any] | None = None
    search: Mapping[str, Any] | None = None
    calibration: Literal["isotonic", "sigmoid"] | None = None
    schedule: str | None = None
    timezone: str = "UTC"
    catch_up: str = "latest"
    gate: Mapping[str, float] = field(default_factory=dict)
    deploy: str = "none"
    mode: Literal["as_known", "as_corrected"] = "as_known"
    trainer: str = "lightgbm"

    def to_dict(self) -> dict[str, Any]:
        """Return the document form."""
        return _present(
            service=self.service.name,
            spine=self.spine.to_dict(),
            label=self.label,
            model=self.model,
            objective=self.objective,
            group=self.group,
            categorical=list(self.categorical),
            params=dict(self.params),
            num_boost_round=self.num_boost_round,
            early_stopping_rounds=self.early_stopping_rounds,
            valid_share=self.valid_share,
            test_share=self.test_share,
            gap=self.gap,
            cross_validation=None if self.cross_validation is None else dict(self.cross_validation),
            search=None if self.search is None else dict(self.search),
            calibration=self.calibration,
            schedule=self.schedule,
            timezone=self.timezone,
            catch_up=self.catch_up,
            gate=dict(self.gate),
            deploy=self.deploy,
            mode=self.mode,
            trainer=self.trainer,
        )


Definition = Entity | Source | FeatureView | WindowView | Transform | FeatureService | Job

_KIND_OF: dict[type, str] = {
    Entity: "entities",
    Source: "sources",
    FeatureView: "views",
    WindowView: "views",
    Transform: "transforms",
    FeatureService: "services",
    Job: "jobs",
}


def build_document(objects: Iterable[object]) -> dict[str, Any]:
    """Return the document of all definitions among `objects` (others are passed over).

    The same name for two different objects of one kind raises DefinitionError.
    """
    document: dict[str, Any] = {"format": 1} | {kind: {} for kind in _KIND_OF.values()}
    for item in objects:
        kind = _KIND_OF.get(type(item))
        if kind is None:
            continue
        assert isinstance(item, Definition)
        body = item.to_dict()
        if document[kind].setdefault(item.name, body) != body:
            raise DefinitionError(f"two different {kind} are named {item.name!r}")
    return document


def _present(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
