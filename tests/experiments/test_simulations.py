"""A small profile of `python -m bench experiments`: equal arms, looked at over and over."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from bench.experiments import aa_worlds, alarm_rate, e_alarm, rate, z_alarm
from bench.simulations import (
    PROPORTION,
    Look,
    cell_of,
    decides,
    looks_at,
    naive_decides,
    one_phase,
    proportion,
    spec_of,
)
from mlpd.experiments import verdict
from mlpd.experiments.metric import Metric

RUNS = 100
ALLOWED = 0.05  # without binomial slack: seeds are fixed, and the rates found are 0 to 3 %
WORLDS = aa_worlds()


@pytest.mark.parametrize("name", WORLDS)
def test_arms_that_are_the_same_are_not_told_apart_at_any_look(name: str) -> None:
    spec, world, _ = WORLDS[name]
    assert rate(world, partial(decides, spec), seed=[1], runs=RUNS) <= ALLOWED


@pytest.mark.parametrize("name", WORLDS)
def test_a_peeked_z_test_would_be_fooled(name: str) -> None:
    assert rate(WORLDS[name][2], naive_decides, seed=[1], runs=40) > 0.1


@pytest.mark.parametrize("name", ["99/1, proportion", "99/1, skewed amounts"])
def test_a_canary_without_the_guard_would_be_fooled(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(verdict, "MIN_UNITS", 2)
    monkeypatch.setattr(verdict, "MIN_EVENTS", 0)
    spec, world, _ = WORLDS[name]
    assert rate(world, partial(decides, spec), seed=[2], runs=60) > 0.1


def test_a_real_effect_is_found() -> None:
    spec = spec_of(PROPORTION, 4000)
    world = one_phase(proportion(0.3), share=0.5, units=8000, effect=0.08)
    assert rate(world, partial(decides, spec), seed=[3], runs=50) > 0.9


def test_holm_over_ten_metrics_at_every_look() -> None:
    metrics = tuple(Metric(f"m{i}") for i in range(10))
    spec = replace(spec_of(PROPORTION, 2000), metrics=metrics)

    def world(rng: np.random.Generator) -> list[Look]:
        in_b = rng.random(2000) < 0.5
        looks: list[Look] = [Look({}) for _ in range(5)]
        for metric in metrics:
            late = (rng.random(2000) < 0.3).astype(float)
            for look, cells in zip(looks, looks_at(in_b, late, range(400, 2001, 400)), strict=True):
                look.cells.update({(0, metric.name, arm): c for (_, _, arm), c in cells.items()})
        return looks

    assert rate(world, partial(decides, spec), seed=[6], runs=RUNS) <= ALLOWED


@pytest.mark.parametrize("share", [0.5, 0.01])
def test_a_split_that_follows_the_weights_hardly_ever_alarms(share: float) -> None:
    assert alarm_rate(share, e_alarm, seed=1) <= 0.01
    assert alarm_rate(share, z_alarm, seed=1) > 0.05


def test_the_looks_of_a_simulation_are_the_moments_of_its_units() -> None:
    rng = np.random.default_rng(8)
    in_b, x = rng.random(300) < 0.3, rng.lognormal(0, 1, 300)
    (early, late) = looks_at(in_b, x, [100, 300])
    for cells, n in ((early, 100), (late, 300)):
        for arm, chosen in (("a", ~in_b[:n]), ("b", in_b[:n])):
            values = x[:n][chosen]
            expected, found = cell_of(values, np.ones(len(values))), cells[0, "outcome", arm]
            for name in ("n", "mean", "m2", "m3"):
                want = pytest.approx(getattr(expected.moments.x, name))
                assert getattr(found.moments.x, name) == want
            assert (found.events, found.non_events) == (expected.events, expected.non_events)
