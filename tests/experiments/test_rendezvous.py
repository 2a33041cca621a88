import json
import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.errors import DefinitionError
from mlpd.experiments import rendezvous
from mlpd.experiments.rendezvous import Rendezvous, draw, salt, unit_bytes

UNITS = [f"N{i}" for i in range(20_000)]
WEIGHTS = st.lists(st.integers(0, 100), min_size=2, max_size=5).filter(any)


def test_draws_match_the_published_vectors_of_b2sum() -> None:
    golden = json.loads((Path(__file__).parent / "golden_draws.json").read_text())
    for vector in golden["vectors"]:
        u = draw(salt(*vector["salt"]), unit_bytes(vector["unit"]))
        assert u == vector["u"] == (int(vector["blake2b_64"], 16) >> 11) / 2**53


def test_arms_of_known_units_never_change() -> None:
    chooser = Rendezvous(("exposure", "flight-risk"), {"v1": 1, "v2": 1, "v3": 2})
    assert "".join(chooser.choose(unit)[1] for unit in UNITS[:40]) == (
        "3213222333233332213333321233331323131321"
    )


def test_arms_get_their_share_of_units() -> None:
    weights = {"a": 1.0, "b": 4.0, "c": 0.0, "d": 5.0}
    chooser = Rendezvous(("exposure", "shares"), weights)
    counts = Counter(chooser.choose(unit) for unit in UNITS)
    assert "c" not in counts
    for arm, p in chooser.propensities.items():
        assert abs(counts[arm] - p * len(UNITS)) <= 4 * math.sqrt(len(UNITS) * p * (1 - p))


@given(WEIGHTS, st.data())
def test_raising_one_weight_moves_units_only_to_that_arm(
    values: list[int], data: st.DataObject
) -> None:
    weights = {f"arm{i}": float(value) for i, value in enumerate(values)}
    raised = data.draw(st.sampled_from(sorted(weights)))
    more = weights | {raised: weights[raised] + data.draw(st.integers(1, 100))}
    before, after = Rendezvous(("e", "x"), weights), Rendezvous(("e", "x"), more)
    for unit in UNITS[:50]:
        assert after.choose(unit) in (before.choose(unit), raised)


def test_a_ramp_moves_the_minimum_of_units() -> None:
    small, even = (Rendezvous(("e", "ramp"), {"a": 100 - b, "b": b}) for b in (1, 50))
    moved = sum(small.choose(unit) != even.choose(unit) for unit in UNITS) / len(UNITS)
    assert moved == pytest.approx(0.49, abs=0.015)


@given(WEIGHTS, st.integers(1, 1000))
def test_the_scale_of_weights_does_not_matter(values: list[int], factor: int) -> None:
    one = Rendezvous(("e", "x"), {str(i): v for i, v in enumerate(values)})
    scaled = Rendezvous(("e", "x"), {str(i): v * factor for i, v in enumerate(values)})
    assert [one.choose(u) for u in UNITS[:20]] == [scaled.choose(u) for u in UNITS[:20]]


@given(st.text())
def test_every_unit_has_an_arm_of_positive_weight(unit: str) -> None:
    assert Rendezvous(("e", "x"), {"a": 0, "b": 1e-300, "c": 1e300}).choose(unit) in ("b", "c")


def test_lone_surrogates_are_units_too() -> None:
    assert Rendezvous(("e", "x"), {"a": 1, "b": 1}).choose("\ud800") in ("a", "b")


def test_a_draw_of_zero_scores_lowest_and_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        rendezvous, "draw", lambda salted, _unit: 0.0 if salted == salt("e", "a") else 1e-9
    )
    assert Rendezvous(("e",), {"a": 1, "b": 1}).choose("unit") == "b"
    assert Rendezvous(("e",), {"a": 1, "b": 0}).choose("unit") == "a"


def test_salts_give_independent_draws() -> None:
    left = [draw(salt("exposure", "x"), unit_bytes(u)) for u in UNITS]
    right = [draw(salt("holdout", "x"), unit_bytes(u)) for u in UNITS]
    covariance = sum((a - 0.5) * (b - 0.5) for a, b in zip(left, right, strict=True)) / len(UNITS)
    assert abs(covariance * 12) < 4 / math.sqrt(len(UNITS))


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": -1, "b": 2}, {"a": math.nan}])
def test_weights_that_cannot_share_traffic_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(DefinitionError) as caught:
        Rendezvous(("e",), weights)
    assert caught.value.code == "invalid_weights"
    assert caught.value.hint
