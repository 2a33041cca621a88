"""Simulated experiments: units in arms, their outcomes, and the cells that each look would see.

Everything random comes from the caller's generator.  Sums up to each look are cumulated in numpy,
without the code under test; what is decided from them is the code under test.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from mlpd.experiments.estimates import Cell
from mlpd.experiments.metric import Metric
from mlpd.experiments.moments import Moments, Products, RatioMoments
from mlpd.experiments.spec import Arm, ExperimentSpec
from mlpd.experiments.verdict import compare_arms

Floats = NDArray[np.float64]
Cells = dict[tuple[int, str, str], Cell]
METRIC = "outcome"
EVEN = 0.5
PROPORTION, MEAN = Metric(METRIC), Metric(METRIC, "mean")
Z_95, Z_99 = 1.959963984540054, 2.5758293035489004


@dataclass(frozen=True, slots=True)
class Look:
    """What one look sees: the cells of all phases, and how many phases have begun."""

    cells: Cells
    phases: int = 1


World = Callable[[np.random.Generator], Sequence[Look]]
"""Draws one experiment and returns what every look at it sees."""


def spec_of(metric: Metric, planned_units: int, **changes: object) -> ExperimentSpec:
    """Return a two-armed experiment on one metric; its arms are `a`, the control, and `b`."""
    spec = ExperimentSpec("sim", "unit", (Arm("a"), Arm("b")), (metric,), planned_units)
    return replace(spec, **changes)  # type: ignore[arg-type]  # the fields of the spec


def decides(spec: ExperimentSpec, look: Look) -> bool:
    """Tell whether a look calls any arm better or worse on any metric: the code under test."""
    compared = compare_arms(spec, look.phases, look.cells, srm_alarm=False)
    return any(comparison.verdict in ("better", "worse") for comparison in compared)


def first_decision(spec: ExperimentSpec, looks: Sequence[Look]) -> int | None:
    """Return the number of the first look that decides, from 0, or None."""
    return next((i for i, look in enumerate(looks) if decides(spec, look)), None)


def naive_decides(look: Look) -> bool:
    """Tell whether an uncorrected z-test of all units at this look rejects at 5 %; no guard."""
    totals = {}
    for arm in "ab":
        moments = RatioMoments()
        for (_, _, name), cell in look.cells.items():
            moments = moments.merge(cell.moments) if name == arm else moments
        totals[arm] = moments
    variance = sum(moments.ratio_variance for moments in totals.values())
    difference = totals["b"].ratio - totals["a"].ratio
    return bool(variance > 0 and difference**2 > Z_95**2 * variance)


def looks_at(
    in_b: NDArray[np.bool_], x: Floats, looks: Sequence[int], phase: int = 0
) -> list[Cells]:
    """Return the cells after the first `looks` units, each with one outcome `x`."""
    found: list[Cells] = [{} for _ in looks]
    at, shift = np.asarray(looks) - 1, float(x.mean())
    for arm, chosen in (("a", ~in_b), ("b", in_b)):
        centred = np.where(chosen, x - shift, 0.0)
        n, events, ones = (np.cumsum(v)[at] for v in (chosen, chosen & (x != 0), chosen & (x != 1)))
        sums, squares, cubes = (np.cumsum(centred**k)[at] for k in (1, 2, 3))
        mean = sums / np.maximum(n, 1)
        m2, m3 = squares - mean * sums, cubes - 3 * mean * squares + 2 * n * mean**3
        for i, cells in enumerate(found):
            count = int(n[i])
            spread = max(0.0, float(m2[i])), float(m3[i])
            x_moments = about(count, float(mean[i]) + shift, *spread)
            pair = paired(x_moments, about(count, 1.0), 0.0)
            cells[phase, METRIC, arm] = Cell(pair, int(events[i]), int(ones[i]))
    return found


def moments(values: Floats) -> Moments:
    """Return the moments of some values."""
    mean = values.mean() if len(values) else 0.0
    m2, m3 = (float(((values - mean) ** k).sum()) for k in (2, 3))
    return about(len(values), float(mean), m2, m3)


def about(n: int, mean: float, m2: float = 0.0, m3: float = 0.0) -> Moments:
    """Return the sums of `n` values with these central moments."""
    given = [Fraction(value) for value in (mean, m2, m3)]
    scale = max(value.denominator.bit_length() - 1 for value in given)
    one = given[0]
    squares = given[1] + n * one**2
    cubes = given[2] + 3 * one * given[1] + n * one**3
    sums = (int(v * 2 ** (k * scale)) for k, v in enumerate((n * one, squares, cubes), start=1))
    return Moments(n, scale, *sums)


def paired(x: Moments, y: Moments, comoment: float) -> RatioMoments:
    """Return pairs of which `x` and `y` are the moments."""
    products = Fraction(comoment)
    if x.n:
        products += Fraction(x.total * y.total, x.n << (x.scale + y.scale))
    scale = 64 + x.scale + y.scale
    return RatioMoments(x, y, Products(scale, round(products * 2**scale)))


def cell_of(x: Floats, y: Floats) -> Cell:
    """Return the cell of units with sums `x` and numbers of outcomes `y`."""
    mx, my = moments(x), moments(y)
    comoment = float(((x - mx.mean) * (y - my.mean)).sum())
    return Cell(paired(mx, my, comoment), int((x != 0).sum()), int((x != y).sum()))


def one_phase(
    draw: Callable[[np.random.Generator, int], Floats],
    *,
    share: float,
    units: int,
    effect: float = 0.0,
    looks: int = 30,
) -> World:
    """Return a world of one phase: `share` of the units see `b`, which adds `effect`."""

    def world(rng: np.random.Generator) -> list[Look]:
        in_b = rng.random(units) < share
        x = draw(rng, units)
        if effect:
            x = np.where(in_b, np.maximum(x, rng.random(units) < effect), x)
        at = np.linspace(units // 40, units, looks).astype(int).tolist()
        return [Look(cells) for cells in looks_at(in_b, x, at)]

    return world


def proportion(rate: float) -> Callable[[np.random.Generator, int], Floats]:
    """Return a draw of zeros and ones."""
    return lambda rng, n: (rng.random(n) < rate).astype(float)


def lognormal(sigma: float) -> Callable[[np.random.Generator, int], Floats]:
    """Return a draw of a skewed amount; skewness 6 at sigma 1, 33 at 1.5."""
    return lambda rng, n: rng.lognormal(0.0, sigma, n)


def purchases(rate: float, sigma: float) -> Callable[[np.random.Generator, int], Floats]:
    """Return a draw of revenue: nothing from most units, a skewed amount from a few."""
    return lambda rng, n: (rng.random(n) < rate) * rng.lognormal(0.0, sigma, n)


def ramp(rng: np.random.Generator) -> list[Look]:
    """Return looks at a ramp of 1, 10 and 50 % while the base rate climbs from 10 to 60 %."""
    found: list[Look] = []
    done: Cells = {}
    at = range(1000, 6001, 1000)
    for phase, (share, rate) in enumerate(((0.01, 0.1), (0.1, 0.3), (0.5, 0.6))):
        in_b, late = rng.random(6000) < share, (rng.random(6000) < rate).astype(float)
        found += [Look(done | cells, phase + 1) for cells in looks_at(in_b, late, at, phase)]
        done = found[-1].cells
    return found


def returning(rng: np.random.Generator) -> list[Look]:
    """Return looks at 1,000 units that come back 30 times, each with a rate of its own."""
    in_b, rates = rng.random(1000) < EVEN, rng.beta(1, 2, 1000)
    x, y = np.zeros(1000), np.zeros(1000)
    found, visits = [], 0.4
    for _ in range(30):
        came = rng.random(1000) < visits
        x, y = x + (came & (rng.random(1000) < rates)), y + came
        seen = y > 0
        arms = (("a", seen & ~in_b), ("b", seen & in_b))
        found.append(Look({(0, METRIC, arm): cell_of(x[at], y[at]) for arm, at in arms}))
    return found


def naive_returning(rng: np.random.Generator) -> list[Look]:
    """Return the same world as somebody sees it who counts every outcome as a unit of its own."""
    return [
        Look({key: _by_outcome(cell) for key, cell in look.cells.items()})
        for look in returning(rng)
    ]


def _by_outcome(cell: Cell) -> Cell:
    pair = cell.moments
    n = round(pair.n * pair.y.mean)
    rate = pair.ratio
    return Cell(paired(about(n, rate, n * rate * (1 - rate)), about(n, 1.0), 0.0), n, n)
