import json
from typing import Any

import pytest

from mlpd.core.errors import DefinitionError, MlpdError
from mlpd.experiments.documents import spec_from_dict
from mlpd.experiments.spec import ExperimentSpec, Namespace, Rule, check_disjoint

MINIMAL: dict[str, Any] = {
    "name": "flight-risk",
    "unit": "tailnum",
    "arms": {"v1": 1, "v2": 1},
    "metrics": [{"name": "late"}],
    "planned_units": 4000,
}
FULL: dict[str, Any] = {
    "name": "flight-risk",
    "unit": "tailnum",
    "arms": {"v1": 99.0, "v2": 1.0},
    "metrics": [
        {"name": "late", "kind": "proportion", "better": "lower"},
        {
            "name": "delay",
            "kind": "mean",
            "better": "lower",
            "covariate": "origin_departures.dep_delay_mean_1h",
            "low": -60.0,
            "high": 300.0,
            "prior_sd": 5.0,
        },
        {"name": "cost_per_mile", "kind": "ratio", "better": "lower"},
    ],
    "planned_units": 4000,
    "control": "v2",
    "alpha": 0.01,
    "method": "welch",
    "correction": "bh",
    "holdout": 0.05,
    "namespace": {"name": "routing", "start": 10, "end": 5000},
    "rules": [
        {"field": "origin", "op": "in", "value": ["JFK", "LGA"]},
        {"field": "distance", "op": "gt", "value": 500},
    ],
    "forced": {"N14228": "v2"},
    "guardrails": [
        {"on": "errors", "tolerance": 1.5, "margin": 0.0},
        {"on": "latency", "limit_ms": 50.0, "tolerance": 1.0, "margin": 0.0},
        {"on": "metric", "metric": "delay", "tolerance": 1.0, "margin": 2.5},
    ],
    "cool_down_s": 3600,
    "promotion": {"metric": "late", "margin": 0.01},
    "bandit": None,
    "interleaving": False,
}
LISTS = {"interleaving": True, "metrics": [{"name": "label"}]}


def test_defaults_are_filled_in() -> None:
    spec = spec_from_dict(MINIMAL)
    assert (spec.control, spec.alpha, spec.method, spec.correction) == (
        "v1",
        0.05,
        "sequence",
        "holm",
    )
    assert (spec.holdout, spec.namespace, spec.rules, dict(spec.forced)) == (0.0, None, (), {})


@pytest.mark.parametrize("document", [MINIMAL, FULL])
def test_documents_round_trip_through_json(document: dict[str, Any]) -> None:
    spec = spec_from_dict(document)
    assert spec_from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_full_document_is_written_back_as_it_was() -> None:
    assert json.loads(json.dumps(spec_from_dict(FULL).to_dict())) == FULL


def test_nested_parts_become_their_classes() -> None:
    spec = spec_from_dict(FULL)
    assert spec.namespace == Namespace("routing", 10, 5000)
    assert spec.rules[0] == Rule("origin", "in", ("JFK", "LGA"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Flight Risk"}, "experiment 'Flight Risk' is not a valid name"),
        ({"unit": "tail num"}, "unit 'tail num'"),
        ({"arms": {"v1": 1}}, "has 1 arms, expected 2 to 20"),
        ({"arms": {"v1": 1, "v2": -1}}, "weight of arm 'v2' is -1"),
        ({"arms": {"v1": 1, "v2": float("nan")}}, "weight of arm 'v2' is nan"),
        ({"arms": {"v1": 1, "v2": True}}, "weight of arm 'v2' is True"),
        ({"arms": {"v1": 0, "v2": 0}}, "sum to 0"),
        ({"arms": ["v1", "v2"]}, "expected a mapping of arm to weight"),
        ({"control": "v3"}, "control is 'v3', expected one of v1, v2"),
        ({"metrics": []}, "has 0 metrics"),
        ({"metrics": [{"name": "late"}, {"name": "late"}]}, "expected different names"),
        ({"metrics": [{"name": "late", "kind": "median"}]}, "kind of metric 'late' is 'median'"),
        ({"metrics": [{"name": "late", "better": "up"}]}, "one of higher, lower"),
        ({"metrics": [{"name": "late", "covariate": ""}]}, "covariate of metric 'late' is ''"),
        ({"metrics": [{"name": "late", "covariate": 5}]}, "covariate of metric 'late' is 5"),
        ({"metrics": [{"name": "late", "high": 5}]}, "expected none for a proportion"),
        ({"metrics": [{"name": "d", "kind": "mean", "low": 5, "high": 5}]}, "low < high"),
        ({"metrics": [{"name": "d", "kind": "mean", "low": "5"}]}, "low of metric 'd' is '5'"),
        ({"metrics": [{"name": "late", "prior_sd": 0}]}, "prior_sd of metric 'late' is 0"),
        ({"metrics": [{"kind": "mean"}]}, "metrics: key 'name' is missing"),
        ({"metrics": ["late"]}, "should be a mapping of name, kind, better"),
        ({"metrics": {"late": "mean"}}, "expected a list"),
        ({"planned_units": 0}, "planned_units is 0"),
        ({"planned_units": 1e6}, "planned_units is 1000000.0"),
        ({"alpha": 0.5}, "alpha is 0.5, expected 0 < alpha < 0.5"),
        ({"alpha": "5 %"}, "alpha is '5 %'"),
        ({"method": "peeking"}, "one of sequence, welch"),
        ({"method": ["welch"]}, "one of sequence, welch"),
        ({"correction": "bonferoni"}, "one of holm, bonferroni, bh, none"),
        ({"holdout": 1}, "holdout is 1, expected"),
        ({"namespace": {"name": "n", "start": 5, "end": 5}}, r"buckets \[5, 5\)"),
        ({"namespace": {"name": "n", "start": 0, "end": 10_001}}, "end <= 10000"),
        ({"namespace": {"name": "n", "size": 3}}, "unknown key 'size'"),
        ({"rules": [{"field": "origin", "op": "like", "value": "J"}]}, "'like'"),
        ({"rules": [{"field": "origin", "op": "in", "value": "JFK"}]}, "a list of values"),
        ({"rules": [{"field": "origin", "op": "eq", "value": ["JFK"]}]}, "one value"),
        ({"forced": {"N1": "v9"}}, "forced arm of unit 'N1' is 'v9'"),
        ({"forced": ["N1"]}, "a mapping of unit to arm"),
        ({"guardrails": [{"on": "cost"}]}, "one of errors, latency, nulls, metric"),
        ({"guardrails": [{"on": "latency"}]}, "limit_ms of the guardrail on latency is None"),
        ({"guardrails": [{"on": "errors", "limit_ms": 5}]}, "none for others"),
        ({"guardrails": [{"on": "metric"}]}, "expected one of late"),
        ({"guardrails": [{"on": "errors", "metric": "late"}]}, "none, as it is on requests"),
        ({"guardrails": [{"on": "errors", "tolerance": 0.5}]}, "a number >= 1"),
        ({"guardrails": [{"on": "errors"}, {"on": "errors"}]}, "different things"),
        ({"guardrails": [{"on": "errors"}] * 11}, "at most 10"),
        ({"guardrails": "errors"}, "expected a list"),
        ({"cool_down_s": -1}, "cool_down_s is -1"),
        ({"promotion": {"metric": "cost"}}, "metric of the promotion is 'cost'"),
        ({"promotion": {"margin": -0.1}}, "margin of the promotion is -0.1"),
        ({"bandit": {"metric": "cost"}}, "metric of the bandit is 'cost'"),
        ({"bandit": {"every_s": 59}}, "every_s of the bandit is 59, expected seconds >= 60"),
        ({"bandit": {"delay_s": -1}}, "delay_s of the bandit is -1"),
        ({"bandit": {"floor": 0.5}}, "floor of the bandit is 0.5"),
        ({"bandit": {"floor": "5 %"}}, "floor of the bandit is '5 %'"),
        ({"bandit": {"units_min": True}}, "units_min of the bandit is True"),
        ({"bandit": {"seed": 0.5}}, "seed of the bandit is 0.5"),
        ({"bandit": {}, "promotion": {}}, "both move all traffic"),
        ({"bandit": {"flour": 1}}, "unknown key 'flour'"),
        ({"interleaving": 1}, "interleaving is 1"),
        ({"interleaving": True}, "expected label alone"),
        ({**LISTS, "arms": {"a": 1, "b": 2}}, "two arms of equal weight"),
        ({**LISTS, "arms": {"a": 1, "b": 1, "c": 1}}, "two arms of equal weight"),
        ({**LISTS, "bandit": {}}, "interleaved with a bandit"),
        ({**LISTS, "promotion": {}}, "interleaved with a promotion"),
        ({**LISTS, "guardrails": [{"on": "errors"}]}, "interleaved with guardrails"),
        ({"wieghts": {}}, "unknown key 'wieghts'; known keys: name, unit, arms"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(MlpdError, match=message) as caught:
        spec_from_dict(MINIMAL | changes)
    assert caught.value.status == 400
    assert caught.value.hint


@pytest.mark.parametrize("key", sorted(MINIMAL))
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(DefinitionError, match=f"key '{key}' is missing"):
        spec_from_dict({k: v for k, v in MINIMAL.items() if k != key})


def test_a_bandit_is_written_back_as_it_was() -> None:
    given = {"every_s": 3600, "delay_s": 60, "floor": 0.1, "units_min": 50, "seed": 7}
    found = spec_from_dict(MINIMAL | {"bandit": given})
    assert found.to_dict()["bandit"] == given
    assert spec_from_dict(found.to_dict()) == found


def test_a_document_must_be_a_mapping() -> None:
    with pytest.raises(DefinitionError, match="should be a mapping"):
        spec_from_dict([1, 2])


def in_namespace(name: str, start: int, end: int, space: str = "routing") -> ExperimentSpec:
    namespace = {"name": space, "start": start, "end": end}
    return spec_from_dict(MINIMAL | {"name": name, "namespace": namespace})


def test_disjoint_namespace_ranges_are_accepted() -> None:
    check_disjoint(
        [
            in_namespace("b", 100, 200),
            in_namespace("a", 0, 100),
            in_namespace("c", 0, 10_000, "pricing"),
            spec_from_dict(MINIMAL),
        ]
    )


def test_overlapping_namespace_ranges_are_refused() -> None:
    specs = [in_namespace("a", 0, 101), in_namespace("c", 300, 400), in_namespace("b", 100, 200)]
    with pytest.raises(DefinitionError, match=r"'a' and 'b' overlap in namespace 'routing'.*100"):
        check_disjoint(specs)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"planned_units": 10**30}, "an integer has more than 64 bits"),
        ({"alpha": 10**400}, "alpha is 1000"),
        ({"rules": [{"field": "x", "op": "eq", "value": 10**30}]}, "more than 64 bits"),
        ({"bandit": {"seed": 10**30}}, "more than 64 bits"),
        ({"bandit": {"delay_s": 10**400}}, "delay_s of the bandit is 1000"),
        ({"arms": {"v1": 10**400, "v2": 1}}, "weight of arm 'v1' is 1000"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_numbers_that_nothing_can_hold_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        spec_from_dict({**MINIMAL, **changes})
    assert problem in caught.value.message
    assert "send it again" in (caught.value.hint or "")
