from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.errors import ValidationError
from mlpd.core.time import SECOND_US
from mlpd.serving.canary import Canary, Step
from mlpd.serving.routes import Arm, ModelRef, RouteSpec, diff_routes

NAMES = st.sampled_from(["a", "risk-2", "b.c", "0x", "champion", "m_1"])
TARGETS = NAMES | NAMES.map("{}~1".format) | st.integers(1, 999_999_999).map(str)
REFS = st.builds(ModelRef, NAMES, TARGETS)
WEIGHTS = st.floats(0, 1e6)


@st.composite
def routes(draw: st.DrawFn) -> RouteSpec:
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    arms = [Arm(name, draw(REFS), draw(WEIGHTS)) for name in names]
    arms[0] = Arm(names[0], arms[0].model, draw(st.floats(0.001, 10)))
    canary = Canary(names[0], (Step(0.1, SECOND_US, 9),)) if len(names) > 1 else None
    experiment = draw(st.none() | NAMES)
    return RouteSpec(
        name=draw(NAMES),
        service="flight_risk",
        arms=tuple(arms),
        shadows=tuple(draw(st.lists(REFS, max_size=3, unique=True))),
        experiment=experiment,
        canary=draw(st.sampled_from([None, canary])) if experiment is None else None,
        fallback=draw(st.none() | st.floats(-1, 1)),
        fallback_models=tuple(draw(st.lists(REFS, max_size=3, unique=True))),
        log_share=draw(st.sampled_from([1.0, 0.25])),
        version=draw(st.integers(1, 99)),
    )


def document(**changes: Any) -> dict[str, Any]:
    return {
        "name": "flight-risk",
        "service": "flight_risk",
        "arms": [
            {"name": "champion", "model": "risk@champion", "weight": 0.5},
            {"name": "challenger", "model": "risk@7", "weight": 0.5},
        ],
        **changes,
    }


@given(routes())
def test_json_gives_the_same_route_back(route: RouteSpec) -> None:
    assert RouteSpec.from_dict(route.to_dict()) == route


@given(routes(), routes())
def test_the_difference_is_empty_exactly_for_routes_that_serve_the_same(
    old: RouteSpec, new: RouteSpec
) -> None:
    assert diff_routes(old, old) == []
    same = RouteSpec.from_dict({**new.to_dict(), "name": old.name, "version": old.version})
    ordered = [
        sorted(route.to_dict()["arms"], key=lambda arm: arm["name"]) for route in (old, same)
    ]
    rest = [{**route.to_dict(), "arms": None} for route in (old, same)]
    assert (diff_routes(old, new) == []) == (ordered[0] == ordered[1] and rest[0] == rest[1])


def test_the_difference_names_what_changes() -> None:
    old = RouteSpec.from_dict(document(fallback=0.2))
    arms = [{"name": "champion", "model": "risk@champion", "weight": 1}]
    new = RouteSpec.from_dict(document(arms=arms, shadows=["risk@8"], version=2))
    assert diff_routes(old, new) == [
        {"path": "arms.challenger.model", "from": "risk@7", "to": None},
        {"path": "arms.challenger.weight", "from": 0.5, "to": None},
        {"path": "arms.champion.weight", "from": 0.5, "to": 1.0},
        {"path": "fallback", "from": 0.2, "to": None},
        {"path": "shadows", "from": None, "to": ["risk@8"]},
    ]
    assert diff_routes(None, new)[0] == {
        "path": "arms.champion.model",
        "from": None,
        "to": "risk@champion",
    }


def test_an_arm_defaults_to_its_models_name_and_weight_1() -> None:
    route = RouteSpec.from_dict(document(arms=[{"model": "risk@3"}]))
    assert route.arms == (Arm("risk", ModelRef("risk", "3"), 1.0),)


def test_a_reference_asks_for_aliases_alone() -> None:
    def resolve(model: str, alias: str) -> int:
        return {("risk", "champion"): 12}[model, alias]

    assert ModelRef.parse("risk@champion").resolve(resolve) == 12
    assert ModelRef.parse("risk@7").resolve(resolve) == 7
    assert ModelRef.parse("risk@7").version == 7


def test_references_are_those_of_arms_and_shadows() -> None:
    route = RouteSpec.from_dict(document(shadows=["risk@9", "risk@7"]))
    assert sorted(map(str, route.references)) == ["risk@7", "risk@9", "risk@champion"]


@pytest.mark.parametrize(
    "text", ["risk", "risk@", "@3", "risk@0", "risk@03", "RISK@3", "risk@a b", "a@b@c", None, 3]
)
def test_a_malformed_reference_is_refused(text: object) -> None:
    with pytest.raises(ValidationError):
        ModelRef.parse(text)


def arm(**changes: Any) -> dict[str, Any]:
    return {"name": "a", "model": "risk@1", **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Flight Risk"}, "valid name"),
        ({"service": "flight-risk"}, "valid identifier"),
        ({"experiment": "A B"}, "valid name"),
        ({"arms": []}, "1 to 32 arms"),
        ({"arms": [arm(name=f"a{i}") for i in range(33)]}, "1 to 32 arms"),
        ({"arms": {}}, "are lists"),
        ({"arms": ["risk@1"]}, "an arm is an object"),
        ({"arms": [arm(), arm(model="risk@2")]}, "same name"),
        ({"arms": [arm(weight=0)]}, "all weights are 0"),
        ({"arms": [arm(weight=-1), arm(name="b")]}, "not negative"),
        ({"arms": [arm(weight=float("nan"))]}, "finite"),
        ({"arms": [arm(weight=float("inf"))]}, "finite"),
        ({"arms": [arm(weight=True)]}, "weight is a number"),
        ({"arms": [arm(weight="1")]}, "weight is a number"),
        ({"arms": [arm(weigth=1)]}, "unknown key 'weigth'"),
        ({"arms": [{"name": "a"}]}, "no 'model'"),
        ({"arms": [arm(name=3)]}, "valid name"),
        ({"shadows": ["risk@1", "risk@1"]}, "shadows are the same"),
        ({"shadows": ["risk"]}, "names no version"),
        ({"fallback_models": ["risk@1", "risk@1"]}, "fallback models are the same"),
        ({"fallback_models": [f"risk@{i}" for i in range(1, 34)]}, "at most 32 fallback models"),
        ({"fallback_models": "risk@1"}, "are lists"),
        ({"fallback_models": ["risk@7~1"]}, "only an alias has a version before"),
        ({"log_share": 0}, "above 0 and up to 1"),
        ({"log_share": 1.1}, "above 0 and up to 1"),
        ({"log_share": float("nan")}, "above 0 and up to 1"),
        ({"log_share": "all"}, "log_share is a number"),
        ({"fallback": "low"}, "fallback is a number"),
        ({"fallback": float("nan")}, "fallback is not finite"),
        ({"version": 0}, "number from 1"),
        ({"version": "2"}, "number from 1"),
        ({"mirror": True}, "unknown key 'mirror'"),
    ],
)
def test_an_invalid_route_is_refused_with_its_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RouteSpec.from_dict(document(**changes))


@pytest.mark.parametrize("key", ["name", "service"])
def test_a_missing_key_is_named(key: str) -> None:
    incomplete = document()
    del incomplete[key]
    with pytest.raises(ValidationError, match=f"no '{key}'"):
        RouteSpec.from_dict(incomplete)


def test_an_unknown_arm_is_named_with_the_known_ones() -> None:
    route = RouteSpec.from_dict(document())
    assert route.arm("challenger").weight == 0.5
    with pytest.raises(ValidationError, match="champion, challenger"):
        route.arm("other")
