"""Sums of an experiment as values that travel, and back: whole numbers of any length as text."""

from typing import Any

from mlpd.core.errors import ValidationError
from mlpd.experiments.analysis import ExperimentState
from mlpd.experiments.estimates import Cell, CovariateMoments
from mlpd.experiments.moments import Moments, Products, RatioMoments


def pack_state(state: ExperimentState) -> dict[str, Any]:
    """Return the sums of a state as what msgpack and JSON take."""
    return {
        "exposed": [[phase, arm, n] for (phase, arm), n in state.exposed.items()],
        "standing": dict(state.standing),
        "cells": [[*key, _flat(cell)] for key, cell in state.cells.items()],
    }


def merge_packed(state: ExperimentState, packed: Any) -> None:
    """Add the sums that another member packed, of other units; in phases that `state` knows.

    Raises ValidationError(code="invalid_part").
    """
    try:
        phases = len(state.phases)
        other = ExperimentState(state.spec, state.phases)
        for phase, arm, n in packed["exposed"]:
            if phase < phases:
                other.exposed[phase, arm] = n
        other.standing.update(packed["standing"])
        for phase, metric, arm, cell in packed["cells"]:
            if phase < phases:
                other.cells[phase, metric, arm] = _cell(cell)
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise ValidationError(
            f"these are no sums of an experiment: {error!r}"[:200], code="invalid_part"
        ) from None
    state.merge(other)


def _flat(cell: Cell) -> list[str]:
    (x, y, products), (c, cx, cy) = cell.moments, cell.covariate
    numbers = *x, *y, *products, cell.events, cell.non_events, *c, *cx, *cy
    return [f"{number:x}" for number in numbers]


def _cell(texts: list[str]) -> Cell:
    numbers = iter([int(text, 16) for text in texts])

    def moments() -> Moments:
        return Moments(*(next(numbers) for _ in Moments._fields))

    def products() -> Products:
        return Products(next(numbers), next(numbers))

    pairs = RatioMoments(moments(), moments(), products())
    events, non_events = next(numbers), next(numbers)
    return Cell(pairs, events, non_events, CovariateMoments(moments(), products(), products()))
