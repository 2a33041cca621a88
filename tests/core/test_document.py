"""The definitions document: read into specs, or refused with kind, object and field named."""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpd import (
    Aggregate,
    Entity,
    FeatureService,
    FeatureView,
    Job,
    Source,
    Spine,
    WindowView,
    transform,
)
from mlpd.core.columns import DType
from mlpd.core.definitions import build_document
from mlpd.core.document import parse_document
from mlpd.core.errors import DefinitionError
from mlpd.core.specs import CrossValidationSpec, SearchRange
from mlpd.core.time import DAY_US, HOUR_US, MINUTE_US

user = Entity("user")
pair = Entity("pair", key={"user": "string", "item": "int64"})
clicks = Source(
    "clicks",
    timestamp="at",
    schema={
        "user": "string",
        "item": "int64",
        "x": "float64",
        "flag": "bool",
        "seen": "timestamp",
        "raw": "bytes",
    },
    delay="1h",
)
last = FeatureView("last", user, clicks, ["x", "seen"], ttl="3h", defaults={"x": 1.5})
load = WindowView(
    "load",
    pair,
    clicks,
    windows=["1h", "1d", "14d"],
    aggregates=[
        Aggregate.count(),
        Aggregate.mean("x"),
        Aggregate.max("item"),
        Aggregate.sum("flag", name="flags", filter="x > 0"),
        Aggregate.count("raw"),
    ],
)


@transform
def doubled(x: "last.x", amount: "request.amount") -> "float64":  # noqa: F821
    return x * amount


service = FeatureService("s", [last, load, doubled, pair], request={"amount": "float64"})
train = Job(
    "nightly",
    service,
    Spine(clicks, time="seen", filter="x > 0", start="2013-01-01T00:00:00Z"),
    label="flag",
    categorical=["user"],
    schedule="0 3 * * *",
    gate={"auc": 0.7},
)


def example() -> dict[str, Any]:
    document = build_document([user, pair, clicks, last, load, doubled])
    document["services"]["s"] = {
        "features": [
            *(f"last.{f}" for f in last.feature_names()),
            *(f"load.{f}" for f in load.feature_names()),
            *("doubled", "user", "item"),
        ],
        "request": {"amount": "float64"},
    }
    return document


def test_what_users_write_is_what_the_engines_read() -> None:
    document = build_document([user, pair, clicks, last, load, doubled, service, "passed over"])
    assert document == example()
    found = parse_document(document)
    view = found.view("last")
    assert (view.ttl_us, view.defaults) == (3 * HOUR_US, {"x": 1.5})
    assert view.features == {"x": DType.FLOAT64, "seen": DType.TIMESTAMP}
    window = found.view("load")
    assert window.windows_us == (HOUR_US, DAY_US, 14 * DAY_US)
    assert window.hops_us == (5 * MINUTE_US, HOUR_US, DAY_US)
    assert window.hash == "be6ac4bc65b176b02cea7422c210dcd7"  # another hash builds the view anew
    defaults = {"x_mean_1h": -1.0, "item_max_1d": 3}
    told = replace(load, defaults=defaults)
    document["views"]["load"] = told.to_dict()
    assert parse_document(document).view("load").defaults == defaults
    assert parse_document(document).view("load").hash != window.hash
    assert list(window.features)[:4] == ["count_1h", "count_1d", "count_14d", "x_mean_1h"]
    assert window.features["item_max_1d"] is DType.INT64
    assert window.features["flags_1d"] is DType.INT64
    assert window.features["raw_count_1h"] is DType.INT64
    assert found.source("clicks").delay_us == HOUR_US
    assert found.entities["pair"].types == (DType.STRING, DType.INT64)
    assert found.transforms["doubled"].source == "def doubled(x, amount):\n    return x * amount"


def test_weighted_and_distinct_aggregates_are_declared_as_the_others() -> None:
    more = [
        Aggregate.ewma("x", half_life="6h"),
        Aggregate.ewma("item", half_life="90m", name="items", filter="flag"),
        *(Aggregate.approx_distinct(column) for column in clicks.schema),
        Aggregate.last_n("seen", n=16),
        Aggregate.topk("x", k=3, name="often", filter="flag"),
    ]
    told = replace(load, aggregates=more)
    document = build_document([user, pair, clicks, told])
    view = parse_document(document).view("load")
    names = ("x_ewma", "items", "raw_approx_distinct", "seen_last_n", "often")
    types = [str(view.features[f"{name}_1h"]) for name in names]
    assert types == ["float64", "float64", "int64", "list[int64]", "list[float64]"]
    parameters = [aggregate.parameter for aggregate in view.aggregates]
    assert parameters == [6 * HOUR_US, 90 * MINUTE_US, *[None] * len(clicks.schema), 16, 3]
    slower = replace(told, aggregates=[Aggregate.ewma("x", half_life="7h"), *more[1:]])
    document = build_document([user, pair, clicks, slower])
    assert parse_document(document).view("load").hash != view.hash


def test_a_job_needs_its_keys_and_request_fields_in_the_spine() -> None:
    amounts = Source("clicks", "at", {**clicks.schema, "amount": "float64"}, delay="1h")
    fields = {"spine": Spine(amounts, time="seen"), "categorical": ["user"]}
    job = Job("nightly", service, label="flag", **fields)  # type: ignore[arg-type]
    document = build_document([user, pair, amounts, last, load, doubled, service, job])
    found = parse_document(document).job("nightly")
    assert (found.model, found.spine_closed) == ("nightly", "right")
    assert "closed" not in document["jobs"]["nightly"]["spine"]
    document["jobs"]["nightly"]["spine"]["closed"] = "left"
    assert parse_document(document).job("nightly").spine_closed == "left"
    document["jobs"]["nightly"]["spine"]["closed"] = "open"
    with pytest.raises(DefinitionError, match="closed"):
        parse_document(document)
    missing = build_document([user, pair, clicks, last, load, doubled, service, train])
    with pytest.raises(DefinitionError, match="no float64 column 'amount'"):
        parse_document(missing)


def with_job(**changes: Any) -> dict[str, Any]:
    amounts = Source("clicks", "at", {**clicks.schema, "amount": "float64"}, delay="1h")
    job = Job("nightly", service, Spine(amounts, time="seen"), label="flag", categorical=["user"])
    document = build_document([user, pair, amounts, last, load, doubled, service, job])
    document["jobs"]["nightly"].update(changes)
    return document


def test_objective_group_gap_and_folds_of_a_job() -> None:
    found = parse_document(with_job()).job("nightly")
    assert (found.objective, found.group, found.gap_us) == ("binary", None, 0)
    assert (found.cross_validation, found.calibration) == (None, None)
    assert parse_document(with_job(deploy="canary 2.5%")).job("nightly").deploy == "canary 2.5%"
    assert parse_document(with_job(calibration="sigmoid")).job("nightly").calibration == "sigmoid"
    folds = {"folds": 4, "window": "rolling"}
    found = parse_document(
        with_job(objective="ranking", group="user", gap="1d", cross_validation=folds)
    ).job("nightly")
    assert (found.objective, found.group, found.gap_us) == ("ranking", "user", DAY_US)
    assert found.cross_validation == CrossValidationSpec(4, "rolling")
    allowed = with_job(objective="multiclass", params={"objective": "ova"})
    assert parse_document(allowed).job("nightly").params == {"objective": "ova"}


def test_the_space_of_a_search() -> None:
    space = {
        "num_leaves": {"low": 4, "high": 64, "log": True},
        "lambda_l2": {"low": 0, "high": 1.5},
        "boosting": {"choices": ["gbdt", "dart"]},
    }
    search = {"trials": 30, "timeout": "20m", "prune": False, "space": space}
    found = parse_document(with_job(search=search)).job("nightly").search
    assert found is not None
    assert (found.trials, found.timeout_us, found.prune) == (30, 20 * MINUTE_US, False)
    leaves, l2 = found.space["num_leaves"], found.space["lambda_l2"]
    assert leaves == SearchRange(4, 64, log=True)
    assert isinstance(leaves, SearchRange)
    assert isinstance(l2, SearchRange)
    assert (leaves.whole, l2.whole) == (True, False)
    assert found.space["boosting"] == ("gbdt", "dart")


def searched(**changes: Any) -> dict[str, Any]:
    return {"search": {"trials": 3, "space": {"eta": {"low": 0.1, "high": 0.2}}, **changes}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (searched(trials=0), "from 1 to 1000"),
        (searched(trials="many"), "'trials' must be int"),
        (searched(space={}), "at least one parameter"),
        (searched(space={"eta": {"low": 0.2, "high": 0.2}}), "is no range"),
        (searched(space={"eta": {"low": 0.0, "high": 0.2, "log": True}}), "above 0"),
        (searched(space={"eta": {"low": 0.1}}), "'high' is missing"),
        (searched(space={"eta": {"low": True, "high": 3}}), "must be a number"),
        (searched(space={"eta": {"choices": [[1]]}}), "texts, numbers"),
        (searched(space={"eta": {"choices": ["a"], "low": 1}}), "unknown field 'low'"),
        (searched(pruned=True), "unknown field 'pruned'"),
        ({"objective": "ranking"}, "needs a 'group'"),
        ({"group": "user"}, "says nothing"),
        ({"objective": "ranking", "group": "x"}, "must be a column of"),
        ({"objective": "ranking", "group": "nobody"}, "must be a column of"),
        ({"objective": "order"}, "one of binary, regression, multiclass, ranking"),
        ({"params": {"objective": "lambdarank"}}, "is none for a job of objective 'binary'"),
        ({"params": {"app": "mse"}}, "is none for a job of objective 'binary'"),
        ({"cross_validation": {"folds": 1}}, "from 2 to 20"),
        ({"cross_validation": {}}, "'folds' is missing"),
        ({"cross_validation": {"folds": 3, "window": "sliding"}}, "one of expanding, rolling"),
        ({"cross_validation": {"folds": 3, "shuffle": True}}, "unknown field 'shuffle'"),
        ({"gap": "soon"}, "gap"),
        ({"gate": {"shadow_disagreement": 0.1}}, "needs 'shadow_rows'"),
        ({"gate": {"shadow_rows": 0}}, "needs 'shadow_rows'"),
        ({"gate": {"auc": 10**30}}, "bound of 'auc' must be a number, got 1000"),
        ({"gate": {"auc": True}}, "bound of 'auc' must be a number, got True"),
        ({"deploy": "canary"}, "'canary' is no deploy step"),
        ({"deploy": "canary 0%"}, "no deploy step"),
        ({"deploy": "canary 100%"}, "no deploy step"),
        ({"deploy": ["champion"]}, "no deploy step"),
        ({"calibration": "platt"}, "one of isotonic, sigmoid"),
        ({"calibration": ["isotonic"]}, "one of isotonic, sigmoid"),
        (
            {"calibration": "isotonic", "objective": "regression"},
            "says nothing for the objective 'regression'",
        ),
        (
            {"calibration": "sigmoid", "objective": "multiclass"},
            "says nothing for the objective 'multiclass'",
        ),
        ({"calibration": "sigmoid", "trainer": "sklearn"}, "not those of 'sklearn'"),
    ],
)
def test_half_an_objective_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DefinitionError, match=message):
        parse_document(with_job(**change))


def test_null_fields_are_absent_ones() -> None:
    document = example()
    document["jobs"] = None
    document["views"]["last"] |= {"freshness": None, "defaults": None}
    assert parse_document(document).view("last").defaults == {}


Change = Callable[[dict[str, Any]], object]
WRONG: list[tuple[Change, str]] = [
    (lambda d: d.update(format=2), "format must be 1"),
    (lambda d: d.update(thing={}), "'thing'"),
    (lambda d: d.update(views=[]), "views"),
    (lambda d: d["views"].update({"Bad name": {}}), "'Bad name'"),
    (lambda d: d["views"].update(broken=5), "view 'broken'"),
    (lambda d: d["entities"].update(empty={"keys": {}}), "entity 'empty'"),
    (lambda d: d["entities"].update(real={"keys": {"x": "float64"}}), "entity 'real'"),
    (lambda d: d["entities"].update(twice={"keys": {"user": "bytes"}}), "'user' has two types"),
    (lambda d: d["sources"]["clicks"].pop("timestamp"), "'timestamp' is missing"),
    (lambda d: d["sources"]["clicks"]["schema"].update(at="int64"), "timestamp column 'at'"),
    (lambda d: d["sources"]["clicks"]["schema"].update(known_at="timestamp"), "'known_at'"),
    (lambda d: d["sources"]["clicks"]["schema"].update(z="int32"), "'int32'"),
    (lambda d: d["sources"]["clicks"]["schema"].update({"__z": "int64"}), "'__z'"),
    (lambda d: d["sources"]["clicks"].update(delay="0s"), "source 'clicks'"),
    (lambda d: d["sources"].update(none={"timestamp": "at", "schema": {}}), "source 'none'"),
    (lambda d: d["views"]["last"].update(kind="stream"), "latest, window"),
    (lambda d: d["views"]["last"].update(source="clacks"), "'clacks'"),
    (lambda d: d["views"]["last"].update(entity="usr"), "'usr'"),
    (lambda d: d["views"]["last"].update(features=["z"]), "no column 'z'"),
    (lambda d: d["views"]["last"].update(features=[]), "at least one column"),
    (lambda d: d["views"]["last"].update(features="x"), "must be a list"),
    (lambda d: d["views"]["last"].update(features=[{}]), "must hold texts"),
    (lambda d: d["views"]["last"].update(ttl=0), "ttl"),
    (lambda d: d["views"]["last"].update(ttl="9" * 5000 + "s"), "view 'last'"),
    (lambda d: d["views"]["last"].update(tll="1h"), "unknown field 'tll'"),
    (lambda d: d["views"]["last"].update(defaults={"z": 1}), "'z'"),
    (lambda d: d["views"]["last"].update(defaults={"x": "1"}), "default of 'x'"),
    (lambda d: d["views"]["last"].update(defaults={"x": math.nan}), "default of 'x'"),
    (lambda d: d["views"]["last"].update(features=["raw"], defaults={"raw": b""}), "'raw'"),
    (lambda d: d["views"]["load"].update(windows=["1h", "60m"]), "each once"),
    (lambda d: d["views"]["load"].update(windows=[]), "at least one duration"),
    (lambda d: d["views"]["load"].update(windows=5), "must be a list"),
    (lambda d: d["views"]["load"].update(defaults={"x_mean": 1.0}), "'x_mean'"),
    (lambda d: d["views"]["load"].update(defaults={"x_mean_1h": "1"}), "default of 'x_mean_1h'"),
    (lambda d: d["views"]["load"].update(windows=["1h"] * 17), "the limit is 16"),
    (lambda d: d["views"]["load"].update(hop="2h"), "'hop'"),
    (lambda d: d["views"]["load"].update(closed="both"), "left, right"),
    (lambda d: d["views"]["load"].update(aggregates=[]), "at least one aggregate"),
    (lambda d: d["views"]["load"]["aggregates"].append(5), "aggregate"),
    (
        lambda d: d["views"]["load"]["aggregates"].append({"name": "m", "function": "median"}),
        "one of",
    ),
    (
        lambda d: d["views"]["load"]["aggregates"].append({"name": "m", "function": "mean"}),
        "'input'",
    ),
    (
        lambda d: d["views"]["load"]["aggregates"].append(
            {"name": "m", "function": "mean", "input": "user"}
        ),
        "takes numbers",
    ),
    (
        lambda d: d["views"]["load"]["aggregates"].append(
            {"name": "m", "function": "count", "filter": "x + 1"}
        ),
        "not a condition",
    ),
    (
        lambda d: d["views"]["load"]["aggregates"].append(
            {"name": "m", "function": "ewma", "input": "x"}
        ),
        "ewma needs 'half_life'",
    ),
    (
        lambda d: d["views"]["load"]["aggregates"].append(
            {"name": "m", "function": "ewma", "input": "x", "half_life": "0s"}
        ),
        "half_life",
    ),
    (
        lambda d: d["views"]["load"]["aggregates"].append(
            {"name": "m", "function": "ewma", "input": "user", "half_life": "1h"}
        ),
        "takes numbers",
    ),
    (
        lambda d: d["views"]["load"]["aggregates"].append(
            {"name": "m", "function": "mean", "input": "x", "half_life": "1h"}
        ),
        "mean takes no 'half_life'",
    ),
    (
        lambda d: d["views"]["load"]["aggregates"].append(
            {"name": "m", "function": "approx_distinct"}
        ),
        "'input'",
    ),
    (
        lambda d: d["views"]["load"]["aggregates"].append(
            {"name": "m", "function": "last_n", "input": "x"}
        ),
        "last_n needs 'n'",
    ),
    (
        lambda d: d["views"]["load"]["aggregates"].append(
            {"name": "m", "function": "topk", "input": "x", "k": 17}
        ),
        "'k' must be from 1 to 16, got 17",
    ),
    (
        lambda d: d["views"]["load"]["aggregates"].append(
            {"name": "m", "function": "topk", "input": "x", "k": True}
        ),
        "'k' must be int",
    ),
    (
        lambda d: d["views"]["load"]["aggregates"].append(
            {"name": "m", "function": "last_n", "input": "x", "n": 3, "k": 3}
        ),
        "last_n takes no 'k'",
    ),
    (
        lambda d: d["views"]["load"]["aggregates"].append(
            {"name": "m", "function": "topk", "input": "user", "k": 3}
        ),
        "topk takes numbers, but 'user' is string",
    ),
    (
        lambda d: d["views"]["load"]["aggregates"].append({"name": "count", "function": "count"}),
        "each name once",
    ),
    (lambda d: d["transforms"]["doubled"].update(output="string"), "numbers or bool"),
    (lambda d: d["transforms"]["doubled"].update(inputs=[]), "at least one pair"),
    (lambda d: d["transforms"]["doubled"].update(inputs=[["x"]]), "pairs"),
    (lambda d: d["transforms"]["doubled"].update(source="x" * 20_001), "20000 characters"),
    (lambda d: d["transforms"].update(user=d["transforms"]["doubled"]), "'user' stands for two"),
    (lambda d: d["views"].update(doubled=d["views"]["last"]), "'doubled' stands for two"),
    (lambda d: d["services"]["s"]["features"].append("last.x"), "stands twice"),
    (lambda d: d["services"].update(none={}), "neither features nor request"),
    (lambda d: d["services"].update(b={"request": {"amount": "int64"}}), "'amount'"),
    (lambda d: d["services"].update(b={"request": {"item": "float64"}}), "'item'"),
    (lambda d: d["services"].clear(), "transform 'doubled'"),
    (lambda d: d["jobs"].update(j={"service": "s"}), "job 'j': 'spine' is missing"),
]


@pytest.mark.parametrize(("change", "named"), WRONG)
def test_a_wrong_document_is_refused_by_name(change: Change, named: str) -> None:
    document = example()
    change(document)
    with pytest.raises(DefinitionError) as refused:
        parse_document(document)
    assert named in refused.value.message


@pytest.mark.parametrize("document", [None, [], "x", 5, {5: {}}])
def test_a_document_is_an_object(document: object) -> None:
    with pytest.raises(DefinitionError):
        parse_document(document)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def full() -> dict[str, Any]:
    """A document with a job that has every field."""
    folds = {"folds": 3, "window": "rolling"}
    job = {"objective": "ranking", "group": "user", "gap": "1h", "cross_validation": folds}
    return with_job(**job, **searched(timeout="1h", prune=True))


PLACES = list(places(full()))
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(["", "x", "last", "x > 0", "1h", "request.x", b"", "\ud800", "9" * 5000]),
    st.lists(st.sampled_from(["x", 1, None, [], {}]), max_size=3),
    st.dictionaries(st.sampled_from(["x", "name", "keys"]), st.sampled_from(["string", 1, {}])),
)


@settings(max_examples=300)
@given(st.sampled_from(PLACES), JUNK)
def test_junk_anywhere_is_read_or_refused(path: tuple[Any, ...], junk: Any) -> None:
    document = deepcopy(full())
    place = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = junk
    try:
        parse_document(document)
    except DefinitionError as error:
        assert error.message
