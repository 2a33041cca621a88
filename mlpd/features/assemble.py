"""From the features of views to a service's vector: transforms, key columns, request fields.

Online reads and offline joins end here, so a vector is put together by one piece of code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column, Columns
from mlpd.core.errors import ValidationError
from mlpd.core.specs import Closure
from mlpd.features.status import Status
from mlpd.features.transforms import TransformSet

Statuses = dict[str, NDArray[np.uint8]]
"""Status of every value by column, uint8 [n]; see `Status`."""


@dataclass(frozen=True, slots=True)
class FeatureFrame:
    """Feature values for n rows.

    `columns`: in the order of the service's vector.  `statuses`: one per column.  `event_us`: per
    latest-value view the event time behind each row, int64 [n], 0 where there is none.
    """

    columns: Columns
    statuses: Statuses
    event_us: dict[str, NDArray[np.int64]] = field(default_factory=dict)


def assemble(
    closure: Closure,
    transforms: TransformSet,
    given: Mapping[str, Column],
    parts: Sequence[FeatureFrame],
) -> FeatureFrame:
    """Return the vector's columns.

    `given`: key columns and request fields by name.  `parts`: one per view, by `view.feature`.
    """
    columns: Columns = {}
    statuses: Statuses = {}
    event_us: dict[str, NDArray[np.int64]] = {}
    for part in parts:
        columns.update(part.columns)
        statuses.update(part.statuses)
        event_us.update(part.event_us)
    for name in closure.service.request:
        columns[f"request.{name}"] = columns[name] = given[name]
    for name in closure.key_columns:
        columns[name] = given[name]
    for spec in closure.transforms:
        arguments = [columns[reference] for _, reference in spec.inputs]
        columns[spec.name] = transforms.evaluate(spec.name, arguments)
    vector = {name: columns[name] for name in closure.service.vector}
    for name, column in vector.items():
        if name not in statuses:
            statuses[name] = validity_status(column)
    return FeatureFrame(vector, {name: statuses[name] for name in vector}, event_us)


def validity_status(column: Column) -> NDArray[np.uint8]:
    """Return PRESENT where the column is valid, else NULL."""
    if column.valid is None:
        return np.zeros(len(column), np.uint8)
    return np.where(column.valid, np.uint8(Status.PRESENT), np.uint8(Status.NULL))


def check_given(closure: Closure, given: Mapping[str, Column]) -> None:
    """Raise ValidationError unless `given` holds every key column and request field, typed."""
    for kind, needed in (
        ("entity key", closure.key_columns),
        ("request field", closure.service.request),
    ):
        for name, dtype in needed.items():
            column = given.get(name)
            if column is None:
                raise ValidationError(
                    f"service {closure.service.name!r} needs the {kind} {name!r} ({dtype})",
                    code=f"missing_{kind.replace(' ', '_')}",
                    hint="Send it with every row; null is allowed and means unknown.",
                )
            if column.dtype is not dtype:
                raise ValidationError(
                    f"{kind} {name!r} takes {dtype}, got {column.dtype}", code="wrong_type"
                )
