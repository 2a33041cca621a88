"""Frames: a service's features for n rows, put together in one block.

Views write their features into the block, key columns and request fields are copied to it, and
transforms read and write it in place.  Online reads and offline joins fill the same block, so a
vector is put together by one piece of code.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column, Columns, DType, height
from mlpd.core.convert import column_of
from mlpd.core.errors import ValidationError
from mlpd.core.specs import Closure, EntitySpec, ViewSpec
from mlpd.features.block import Block
from mlpd.features.kernels import FeatureKernels
from mlpd.features.latest import LatestPlan, LatestQuery
from mlpd.features.lists import ListPlan
from mlpd.features.packed import Packed, PackPlan
from mlpd.features.reading import Place, Source, ViewReader
from mlpd.features.transforms import TransformSet
from mlpd.features.view import ViewPlan
from mlpd.features.windows import WindowPlan, WindowQuery

Statuses = dict[str, NDArray[np.uint8]]
"""Status of every value by column, uint8 [n]; see `Status`."""


@dataclass(frozen=True, slots=True)
class ViewPart:
    """What a frame holds of one view: `features` at `rows` of the block."""

    view: ViewPlan
    features: tuple[str, ...]
    rows: slice


@dataclass(frozen=True, slots=True)
class LatestPart(ViewPart):
    """A latest-value view's part."""

    plan: LatestPlan
    query: LatestQuery


@dataclass(frozen=True, slots=True)
class WindowPart(ViewPart):
    """A window view's part."""

    plan: WindowPlan
    query: WindowQuery
    extra: slice
    """Rows of the values of its lists, behind one another for all views of a frame."""


class EntityParts:
    """The views that are read by the key of one entity; `view_ids` of `latest`, then `windows`.

    The last `split` views are those of which older tiles are read, too.
    """

    def __init__(
        self, entity: EntitySpec, latest: Sequence[LatestPart], windows: Sequence[WindowPart]
    ) -> None:
        self.entity = entity
        self.latest = [part for part in latest if part.view.entity.name == entity.name]
        mine = [part for part in windows if part.view.entity.name == entity.name]
        self.windows = sorted(mine, key=lambda part: part.query.needs_older)
        self.split = sum(part.query.needs_older for part in self.windows)
        self.parts: list[LatestPart | WindowPart] = [*self.latest, *self.windows]
        self.view_ids = [part.view.view_id for part in self.parts]
        self._cuts = [part for part in self.latest if part.plan.has_texts]

    def fixed(self, values: list[bytes | None]) -> list[bytes | None]:
        """Return the views' values, as many of each, with rows of texts cut to what kernels read.

        0.1 us unless there are any.
        """
        if not self._cuts:
            return values
        entities = len(values) // len(self.parts)
        found = [*values]
        for part in self._cuts:
            start = self.parts.index(part) * entities
            found[start : start + entities] = part.plan.fixed(values[start : start + entities])
        return found

    def places(self, group: int, latest: Sequence[LatestPart]) -> Iterator[tuple[Source, Place]]:
        """Yield for every view what its reader needs; `latest`: those of all entities in order."""
        for value, part in enumerate(self.parts):
            older = value - len(self.parts) + self.split
            if isinstance(part, LatestPart):
                place = Place(group, value, row=part.rows.start, event_row=latest.index(part))
            else:
                extra = part.extra.start
                place = Place(group, value, max(older, -1), part.rows.start, extra_row=extra)
            yield part.query.source, place


class FrameLayout:
    """Where a service's values are in its block; made once, immutable, any thread.

    The block has the features of latest-value views first (`latest`), those of window views
    (`windows`), key columns, request fields and transforms.  `entities`: the views by entity.
    The first `view_rows` are those of views, of them the first `with_state` have a status of their
    own.  `vector`: the row of each element of the service's vector, in its order.  `dtypes`: of
    all rows.  `lists`, `packed`: how the vector's values become Python lists, and msgpack.
    `reader` fills the rows of views, those of `parts` in this order, and `extra_rows` with the
    values of their lists.  `kernels`: the native entries.
    """

    def __init__(
        self,
        closure: Closure,
        views: Mapping[str, ViewPlan],
        transforms: TransformSet,
        kernels: FeatureKernels,
    ) -> None:
        self._closure, self._transforms, self.kernels = closure, transforms, kernels
        rows = _Rows()
        read = [(views[name], features) for name, features in closure.view_features.items()]
        self.latest = [
            LatestPart(view, features, rows.add(view, features), plan, plan.query(features))
            for view, features in read
            if isinstance(plan := view.plan, LatestPlan)
        ]
        self.with_state = len(rows)
        self.windows = [
            WindowPart(view, features, rows.add(view, features), plan, query, rows.reserve(query))
            for view, features in read
            if isinstance(plan := view.plan, WindowPlan)
            for query in (plan.query(features),)
        ]
        self.view_rows, self.extra_rows = len(rows), rows.extra_rows
        self._defaults = [
            (rows[f"{part.view.view.name}.{feature}"], _default(part.view.view, feature))
            for part in self.windows
            for feature in part.features
            if part.view.view.defaults.get(feature) is not None
        ]
        entities = (EntityParts(e, self.latest, self.windows) for e in closure.entities)
        self.entities = [parts for parts in entities if parts.view_ids]
        self.parts = [part for parts in self.entities for part in parts.parts]
        self.reader = ViewReader(
            kernels.read_views,
            [
                place
                for group, parts in enumerate(self.entities)
                for place in parts.places(group, self.latest)
            ],
        )
        self.has_texts = any(part.query.texts for part in self.latest)
        keys, request = closure.key_columns, closure.service.request
        self._given = [
            *((name, rows.put(name, dtype), dtype) for name, dtype in keys.items()),
            *((name, rows.put(f"request.{name}", dtype), dtype) for name, dtype in request.items()),
        ]
        self._steps = transforms.steps(
            (t.name, [*(rows[ref] for _, ref in t.inputs), rows.put(t.name, t.output)])
            for t in closure.transforms
        )
        self.dtypes = tuple(rows.dtypes)
        self._unread = frozenset(keys) - frozenset(closure.service.features)
        self._unread -= {ref for t in closure.transforms for _, ref in t.inputs}
        self.vector = {name: rows[name] for name in closure.service.features}
        self.vector |= {name: rows[f"request.{name}"] for name in request}
        self.lists = ListPlan(self.vector, self.dtypes)
        self.packed = PackPlan(self.vector, self.dtypes, kernels.pack_features)

    def begin(self, given: Mapping[str, Column], *, rows: int | None = None) -> Block:
        """Return a block with the key columns and request fields `given`, of equal lengths.

        Raises ValidationError unless they are all there, typed.  `rows`: their length; key columns
        that stand in no answer are then left alone.
        """
        n = height(given) if rows is None else rows
        block = Block.empty(len(self.dtypes), n, with_state=self.with_state)
        for name, row, dtype in self._given:
            if rows is not None and name in self._unread:
                continue
            column = given.get(name)
            if column is None or column.dtype is not dtype:
                found = None if column is None else column.dtype
                raise wrong_given(self._closure, name, found)
            block.put(row, column)
        return block

    def finish(self, block: Block, event_us: dict[str, NDArray[np.int64]]) -> "FeatureFrame":
        """Compute the transforms of a block that has its views; return the frame.

        `event_us`: per latest-value view the event time behind each row.
        """
        nulls = {row: _fill_nulls(block, row, default) for row, default in self._defaults}
        self._transforms.run(self._steps, block)
        return FeatureFrame(self, block, event_us, nulls)


@dataclass(frozen=True)
class FeatureFrame:
    """Feature values for n rows.

    `columns`: in the order of the service's vector.  `statuses`: one per column.  `event_us`: per
    latest-value view the event time behind each row, int64 [n], 0 where there is none.  `nulls`: by
    row of the block, where a window feature's default stands in for null, bool [n].
    """

    layout: FrameLayout
    block: Block
    event_us: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    nulls: dict[int, NDArray[np.bool_]] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.block.words.shape[1])

    @cached_property
    def columns(self) -> Columns:
        """The vector's columns; 1 us each, made on first use."""
        whole, dtypes = np.logical_and.reduce(self.block.valid, axis=1), self.layout.dtypes
        return {
            name: self.block.column(row, dtypes[row], whole=bool(whole[row]))
            for name, row in self.layout.vector.items()
        }

    @cached_property
    def statuses(self) -> Statuses:
        """The status of every value; made on first use.

        PRESENT or NULL by its validity, unless its view knows better.
        """
        return {name: self._status[row] for name, row in self.layout.vector.items()}

    def value_lists(self) -> dict[str, list[Any]]:
        """Return the columns as Python values, None where null; see `ListPlan.values`."""
        return self.layout.lists.values(self.block)

    def status_lists(self) -> dict[str, list[int]]:
        """Return the statuses as Python values."""
        return self.layout.lists.statuses(self._status)

    def pack(self, start: int, stop: int) -> Packed:
        """Return the lists of rows from `start` up to `stop` as msgpack."""
        return self.layout.packed.pack(self.block, self._status, start, stop)

    @cached_property
    def _status(self) -> NDArray[np.uint8]:
        """Return the status of every value in the block, uint8 [k, n]."""
        status = (~self.block.valid).view(np.uint8)
        status[: len(self.block.state)] = self.block.state
        for row, null in self.nulls.items():
            status[row] = null
        return status

    def take(self, index: NDArray[np.int64]) -> "FeatureFrame":
        """Return the rows that `index` selects."""
        event_us = {view: times[index] for view, times in self.event_us.items()}
        nulls = {row: null[index] for row, null in self.nulls.items()}
        return FeatureFrame(self.layout, self.block.take(index), event_us, nulls)


def wrong_given(closure: Closure, name: str, found: DType | None) -> ValidationError:
    """Return the error for a key column or request field that is missing or of a wrong type."""
    keys, request = closure.key_columns, closure.service.request
    kind, dtype = ("entity key", keys[name]) if name in keys else ("request field", request[name])
    if found is not None:
        return ValidationError(f"{kind} {name!r} takes {dtype}, got {found}", code="wrong_type")
    return ValidationError(
        f"service {closure.service.name!r} needs the {kind} {name!r} ({dtype})",
        code=f"missing_{kind.replace(' ', '_')}",
        hint="Send it with every row; null is allowed and means unknown.",
    )


def _default(view: ViewSpec, feature: str) -> int | bytes:
    """Return a window feature's default: the word of a number, a packed list."""
    block, dtype = Block.empty(1, 1, with_state=0), view.features[feature]
    block.put(0, column_of(dtype, [view.defaults[feature]]))
    return bytes(block.texts[0][0]) if block.texts else int(block.words[0, 0])


def _fill_nulls(block: Block, row: int, default: int | bytes) -> NDArray[np.bool_]:
    """Set a row's nulls to `default`; return where they were."""
    null: NDArray[np.bool_] = ~block.valid[row]
    block.texts.get(row, block.words[row])[null] = default
    block.valid[row] = True
    return null


class _Rows(dict[str, int]):
    """Rows of a block by name, given out in order."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[DType] = []
        self.extra_rows = 0

    def put(self, name: str, dtype: DType) -> int:
        self[name] = len(self.dtypes)
        self.dtypes.append(dtype)
        return self[name]

    def add(self, view: ViewPlan, features: Sequence[str]) -> slice:
        start = len(self.dtypes)
        for feature in features:
            self.put(f"{view.view.name}.{feature}", view.view.features[feature])
        return slice(start, len(self.dtypes))

    def reserve(self, query: WindowQuery) -> slice:
        """Return the rows for the values of a view's lists."""
        start = self.extra_rows
        self.extra_rows += query.source.width - query.source.features
        return slice(start, self.extra_rows)
