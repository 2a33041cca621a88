"""Cells: stored values of one shard's keys, handed to another that reads rows which need both.

They are the bytes of the store, so that whoever reads them cuts windows and computes transforms as
of one moment, by the code that reads its own; docs/paths/router.md.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlpd.core.columns import DType
from mlpd.core.convert import column_of, convert_value
from mlpd.core.errors import ConflictError, ValidationError
from mlpd.core.keys import encode_entity, online_keys
from mlpd.core.names import NAME_PATTERN
from mlpd.core.shards import SHARDS_MAX
from mlpd.core.specs import EntitySpec
from mlpd.features.assemble import EntityParts, FrameLayout
from mlpd.features.catalog import view_key
from mlpd.features.online import CheckKeys, GetMany, Stored
from mlpd.features.view import ViewPlan
from mlpd.storage.tables import Table

KEYS_MAX = 100_000
"""Of one request, over all entities."""

Keys = Sequence[Sequence[Any]]
Asked = Mapping[tuple[str, ...], Keys]
"""Keys by the key columns of their entity."""


@dataclass(frozen=True, slots=True)
class CellGroup:
    """Cells of the keys of one entity: by `view_key` the values, and of older tiles or None."""

    columns: tuple[str, ...]
    keys: Keys
    views: Mapping[str, tuple[Stored, Stored | None]]

    def to_dict(self) -> dict[str, Any]:
        """Return what `decode_cells` reads."""
        views = {name: {"values": v, "older": older} for name, (v, older) in self.views.items()}
        return {"columns": self.columns, "keys": self.keys, "views": views}


@dataclass(frozen=True, slots=True)
class Cells:
    """Cells that were handed over; all of them were stored before `t_us`.

    `sequences`: by the name of each shard that they came from the last event that it had seen;
    without them nobody can tell later what a row saw.
    """

    t_us: int
    groups: tuple[CellGroup, ...]
    sequences: Mapping[str, int]

    def over(
        self, layout: FrameLayout, owned: bytes, get_many: GetMany, check_keys: CheckKeys
    ) -> tuple[GetMany, CheckKeys]:
        """Return `get_many` and `check_keys` for a read of `layout` in which cells stand in.

        `owned`: per slot 1 or 0; what is owned is read from the store all the same.  Raises
        ConflictError(code="other_definitions") for views that the cells don't have.
        """
        found: dict[Table, dict[bytes, bytes | None]] = {Table.ONLINE: {}, Table.TILES: {}}
        for parts in layout.entities:
            for group in self.groups:
                if group.columns == parts.entity.columns:
                    _place(group, parts, owned, found)

        def get(table: Table, keys: Sequence[bytes]) -> Sequence[bytes | None]:
            cells = found[table]
            stored = iter(get_many(table, [key for key in keys if key not in cells]))
            return [cells[key] if key in cells else next(stored) for key in keys]

        def check(entity: EntitySpec, keys: Sequence[bytes]) -> None:
            cells = found[Table.ONLINE]
            check_keys(entity, [key for key in keys if key not in cells])

        return get, check


def collect_cells(
    layouts: Iterable[FrameLayout], asked: Asked, get_many: GetMany, check_keys: CheckKeys | None
) -> list[CellGroup]:
    """Return what `layouts` read of the keys, in the order asked; raises as `check_keys` does.

    ValidationError(code="wrong_entity_key") for a null or one of another type.
    """
    views: dict[tuple[str, ...], dict[str, tuple[Stored, Stored | None]]] = {c: {} for c in asked}
    for layout in layouts:
        for parts in layout.entities:
            columns = parts.entity.columns
            if columns in asked:
                encoded = _encode(parts.entity, asked[columns])
                found = _collect(parts, encoded, get_many, check_keys)
                known = views[columns]
                for name, cells in found.items():
                    if name not in known or known[name][1] is None:
                        known[name] = cells
    return [CellGroup(columns, asked[columns], found) for columns, found in views.items()]


def decode_asked(value: Sequence[Mapping[str, Any]]) -> Asked:
    """Return the keys in a request: rows of `columns` and `values`.

    Raises ValidationError(code="invalid_cells").
    """
    asked = {}
    for row in value:
        if row.keys() != {"columns", "values"}:
            raise _invalid("keys come as columns and values")
        asked[_columns(row["columns"])] = _keys(row["columns"], row["values"])
    if sum(map(len, asked.values())) > KEYS_MAX:
        raise _invalid(f"there are more than {KEYS_MAX} keys")
    return asked


def decode_cells(value: Mapping[str, Any]) -> Cells:
    """Return the cells in a request; raises ValidationError(code="invalid_cells")."""
    is_right = value.keys() - {"sequences"} == {"t_us", "groups"}
    if not is_right or not isinstance(value["groups"], list):
        raise _invalid("they have t_us and groups, and may have sequences")
    if type(value["t_us"]) is not int:
        raise _invalid("t_us is no integer")
    sequences = _sequences(value.get("sequences", {}))
    return Cells(value["t_us"], tuple(map(_decode_group, value["groups"])), sequences)


def _place(
    group: CellGroup, parts: EntityParts, owned: bytes, found: dict[Table, dict[bytes, Any]]
) -> None:
    """Put the cells of keys that aren't owned where the store has those that are."""
    encoded = _encode(parts.entity, group.keys)
    for number, part in enumerate(parts.parts):
        keys = online_keys([part.view.view_id], encoded)
        values, older = group.views.get(_name(part.view), (None, None))
        needs_older = number >= len(parts.parts) - parts.split
        if values is None or (needs_older and older is None):
            raise ConflictError(
                f"the cells have no values of view {part.view.view.name!r} as it is defined here",
                code="other_definitions",
                hint="Bring all members to the same definitions: mlpd apply.",
            )
        _put(found[Table.ONLINE], keys, values, owned)
        if needs_older and older is not None:
            _put(found[Table.TILES], keys, older, owned)


def _put(
    cells: dict[bytes, Any], keys: Sequence[bytes], values: Sequence[Any], owned: bytes
) -> None:
    pairs = zip(keys, values, strict=True)
    cells.update((key, value) for key, value in pairs if not owned[key[0] << 8 | key[1]])


def _collect(
    parts: EntityParts, encoded: Sequence[bytes], get_many: GetMany, check_keys: CheckKeys | None
) -> dict[str, tuple[Stored, Stored | None]]:
    keys, n = online_keys(parts.view_ids, encoded), len(encoded)
    if check_keys is not None:
        check_keys(parts.entity, keys[:n])
    values = [*get_many(Table.ONLINE, keys)]
    first_older = len(parts.parts) - parts.split
    older = [*get_many(Table.TILES, keys[first_older * n :])]
    found: dict[str, tuple[Stored, Stored | None]] = {}
    for number, part in enumerate(parts.parts):
        at = (number - first_older) * n
        of_view = None if number < first_older else older[at : at + n]
        found[_name(part.view)] = values[number * n : (number + 1) * n], of_view
    return found


def _name(view: ViewPlan) -> str:
    return view_key(view.view, view.entity)


def _encode(entity: EntitySpec, keys: Keys) -> list[bytes]:
    encoded = []
    for key in keys:
        parts = [convert_value(t, part, "key") for t, part in zip(entity.types, key, strict=True)]
        found = encode_entity(entity.types, parts, entity.name)
        if found is None:
            raise _invalid("a null is no key")
        encoded.append(found)
    return encoded


def _decode_group(value: Any) -> CellGroup:
    if not isinstance(value, Mapping) or value.keys() != {"columns", "keys", "views"}:
        raise _invalid("a group has columns, keys and views")
    keys = _keys(value["columns"], value["keys"])
    if not isinstance(value["views"], Mapping):
        raise _invalid("views are no object")
    views = {str(name): _decode_view(cells, len(keys)) for name, cells in value["views"].items()}
    return CellGroup(_columns(value["columns"]), keys, views)


def _decode_view(cells: Any, keys: int) -> tuple[Stored, Stored | None]:
    if not isinstance(cells, Mapping) or cells.keys() != {"values", "older"}:
        raise _invalid("a view has values and older")
    values, older = _stored(cells["values"], keys), cells["older"]
    return values, None if older is None else _stored(older, keys)


def _stored(values: Any, keys: int) -> Stored:
    if not isinstance(values, list) or len(values) != keys:
        raise _invalid("there is one value for each key")
    return column_of(DType.BYTES, values, "cells").to_list()


def _sequences(value: Any) -> dict[str, int]:
    is_right = isinstance(value, Mapping) and all(
        isinstance(shard, str) and NAME_PATTERN.fullmatch(shard) and type(sequence) is int
        for shard, sequence in value.items()
    )
    if not is_right or len(value) > SHARDS_MAX:
        raise _invalid("sequences are integers by the names of shards")
    return dict(value)


def _columns(value: Any) -> tuple[str, ...]:
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise _invalid("columns are names")


def _keys(columns: Any, value: Any) -> Keys:
    width = len(_columns(columns))
    if isinstance(value, list) and all(isinstance(k, list) and len(k) == width for k in value):
        return value
    raise _invalid("each key has a value for each column")


def _invalid(problem: str) -> ValidationError:
    return ValidationError(
        f"the cells can't be used: {problem}",
        code="invalid_cells",
        hint="They are what POST /v1/cluster/cells answers, for keys of other shards.",
    )
