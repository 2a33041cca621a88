"""Entities of rows: which distinct keys there are, and which of them each row has."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column
from mlpd.core.keys import encode_entity
from mlpd.core.specs import EntitySpec

Codes = NDArray[np.int64]
"""The number of each row's entity, from 0 in order of first use; -1 for a null key."""


def entity_codes(entity: EntitySpec, columns: Mapping[str, Column]) -> tuple[list[bytes], Codes]:
    """Return (distinct entity bytes, int64 [n]: code of every row).

    About 0.1 us per row and 0.5 us per distinct entity, of one key column.
    """
    keys = _keys(entity, columns)
    codes = _number(keys)
    types, name, is_single = entity.types, entity.name, len(entity.keys) == 1
    entities: list[bytes] = []
    for key in codes:
        encoded = None if key is None else encode_entity(types, (key,) if is_single else key, name)
        if encoded is not None:
            entities.append(encoded)
    return entities, _look_up(codes, keys)


def shared_codes(
    entity: EntitySpec, left: Mapping[str, Column], right: Mapping[str, Column]
) -> tuple[Codes, Codes]:
    """Return the codes of two tables' rows, equal for equal keys.  About 0.2 us per row."""
    sides = [_keys(entity, columns) for columns in (left, right)]
    codes = _number(key for side in sides for key in dict.fromkeys(side))
    return _look_up(codes, sides[0]), _look_up(codes, sides[1])


def _keys(entity: EntitySpec, columns: Mapping[str, Column]) -> Sequence[Any]:
    """Return each row's key: the value of the one key column, or a tuple; None without a key."""
    lists = [columns[name].to_list() for name in entity.columns]
    if len(lists) == 1:
        return lists[0]
    if all(columns[name].valid is None for name in entity.columns):
        return list(zip(*lists, strict=True))
    return [None if None in key else key for key in zip(*lists, strict=True)]


def _number(keys: Iterable[Any]) -> dict[Any, int]:
    """Return the code of every distinct key; they are typed, so that equal ones are the same."""
    distinct = dict.fromkeys(keys)
    has_null = None in distinct
    distinct.pop(None, None)
    codes = dict(zip(distinct, count()))
    if has_null:
        codes[None] = -1
    return codes


def _look_up(codes: Mapping[Any, int], keys: Sequence[Any]) -> Codes:
    return np.fromiter(map(codes.__getitem__, keys), np.int64, len(keys))
