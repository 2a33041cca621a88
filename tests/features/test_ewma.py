"""ewma: what it means, its numerics at the edges, and that its bits don't know the order."""

import math
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest

from mlpd.features.ewma_kernel import weight_of
from mlpd.features.kernels import FeatureKernels, load_feature_kernels
from mlpd.features.windows import WindowPlan
from tests.features.test_windows import Event, Online, bits_of, build_view, event, join

pytestmark = pytest.mark.timeout(300)  # the first test may wait for the kernels' compiler


@pytest.fixture(scope="module")
def kernels() -> FeatureKernels:
    return load_feature_kernels(boundscheck=True)


def build_plan(kernels: FeatureKernels, half_life: str, column: str = "x") -> WindowPlan:
    ewma = {"name": "e", "function": "ewma", "input": column, "half_life": half_life}
    return WindowPlan.build(*build_view(windows=["50ms"], hop="1ms", aggregates=[ewma]), kernels)


def mean(plan: WindowPlan, events: list[Event], t_us: int) -> Any:
    online = Online(plan)
    online.update(events)
    ((value,),) = online.read([0], t_us, ("e_50ms",))
    for mode in ("as_known", "as_corrected"):
        assert bits_of(join(plan, events, [(0, t_us, 0)], mode)) == bits_of([[value]])
    return value


def test_a_value_weighs_half_as_much_a_half_life_later(kernels: FeatureKernels) -> None:
    plan = build_plan(kernels, "2ms")
    events = [event(1, 10_000, x=1.0), event(2, 12_000, x=4.0)]
    for t_us in (12_001, 14_000, 40_000):  # both age alike
        assert mean(plan, events, t_us) == (0.5 * 1.0 + 4.0) / 1.5
    assert mean(plan, [*events, event(3, 16_000, x=4.0)], 16_001) == (0.125 + 1 + 4) / 1.375


@pytest.mark.parametrize("value", [0.1, 1e-280, -1e280, math.pi])
def test_the_mean_of_equal_values_is_the_value(kernels: FeatureKernels, value: float) -> None:
    plan = build_plan(kernels, "3ms")
    events = [event(i + 1, 10_000 + 37 * i * i, x=value) for i in range(30)]
    assert mean(plan, events, 50_000) == value


def test_integers_keep_all_their_bits(kernels: FeatureKernels) -> None:
    plan = build_plan(kernels, "1ms", "k")
    big = 2**62  # from here on float64 has every 1024th integer
    assert mean(plan, [event(1, 10_000, k=big + 511)], 10_001) == big
    # The mean is big + 512 1/3; of rounded values it would be big + 341 1/3.
    near = [event(1, 10_000, k=big + 515), event(2, 11_000, k=big + 511)]
    assert mean(plan, near, 11_001) == big + 1024


def test_what_is_many_half_lives_old_weighs_nothing(kernels: FeatureKernels) -> None:
    plan = build_plan(kernels, "1us")
    events = [event(1, 10_000, x=1e300), event(2, 30_000, x=1.0), event(3, 30_004, x=2.0)]
    assert mean(plan, events, 30_005) == (1.0 / 16 + 2.0) / (1 + 1.0 / 16)
    assert mean(plan, [*events, event(4, 39_999, x=-0.5)], 40_000) == -0.5


def test_infinities_and_the_largest_numbers(kernels: FeatureKernels) -> None:
    plan = build_plan(kernels, "1us")
    largest = 1.7976931348623157e308
    assert mean(plan, [event(1, 10_000, x=largest)], 10_001) == largest
    old, new = event(1, 10_000, x=math.inf), event(2, 30_000, x=1.0)
    assert mean(plan, [old, new], 30_001) == math.inf
    assert math.isnan(mean(plan, [old, event(2, 30_000, x=-math.inf)], 30_001))


def test_times_before_1970_age_too(kernels: FeatureKernels) -> None:
    plan = build_plan(kernels, "2ms")
    events = [event(1, -11_000, x=1.0), event(2, -9_000, x=4.0), event(3, -5_000, x=4.0)]
    assert mean(plan, events, -4_000) == (0.125 + 1 + 4) / 1.375


def test_the_order_of_arrival_does_not_show(kernels: FeatureKernels) -> None:
    plan = build_plan(kernels, "700us")
    rng = np.random.default_rng(7)
    times = np.sort(rng.integers(10_000, 50_000, 200)).tolist()
    values = (rng.normal(size=200) * 10.0 ** rng.integers(-8, 8, 200)).tolist()
    results = set()
    for _ in range(5):
        order = rng.permutation(200).tolist()
        events = [
            Event(0, times[i], 50_000, sequence + 1, {"x": values[i]})
            for sequence, i in enumerate(order)
        ]
        results.add(mean(plan, events, 50_001).hex())
    assert len(results) == 1


def test_a_weight_is_good_to_51_bits_and_the_same_everywhere() -> None:
    fractions = [*np.linspace(0.0, 1.0, 501).tolist(), *np.random.default_rng(8).random(500)]
    with localcontext(prec=50):
        for fraction in fractions:
            exact = Decimal(2) ** (Decimal(fraction) - 1)
            assert abs(Decimal(weight_of(fraction)) / exact - 1) < Decimal(2) ** -51
    # Stored tiles hold these bits: another machine must add to them what this one would have.
    assert [weight_of(f).hex() for f in (0.0, 0.3, 0.7)] == GOLDEN


GOLDEN = ["0x1.0000000000000p-1", "0x1.3b2c47bff8329p-1", "0x1.9fdf8bcce533dp-1"]
