"""Window views: aggregates over sliding windows per entity, updated, read and joined by one engine.

`WindowPlan` holds what `window_kernel` needs for one view and turns columns into its flat arrays.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column, Columns, DType, height
from mlpd.core.errors import InternalError, NotFoundError, ValidationError
from mlpd.core.expressions import Expression
from mlpd.core.hashing import hash_values
from mlpd.core.lists import pack_lists
from mlpd.core.specs import SourceSpec, ViewSpec
from mlpd.features.block import Block
from mlpd.features.kernels import FeatureKernels
from mlpd.features.read_kernel import WINDOW
from mlpd.features.reading import Place, Scratch, Source, ViewReader, join_values
from mlpd.features.stamps import Stamps
from mlpd.features.state_kernel import (
    BAD_ENTITY,
    BAD_VALUE,
    FUTURE_EVENT,
    OK,
    PAST_READ,
    STORED_HEAD,
    STORED_WIDTH,
)
from mlpd.features.tile_kernel import EVENTS, HASHED, REAL
from mlpd.features.tiles import MIN_RECENT, Stream, TileLayout, build_layout

Int64s = NDArray[np.int64]
JoinMode = Literal["as_known", "as_corrected", "as_of_sequence"]

TRANSPOSED_ROWS = 1024
"""Rows of a block that is transposed at once: it fits the first two cache levels."""

MAX_QUERIES = 256
"""Tables for sets of features kept per plan; services read few distinct ones."""


@dataclass(frozen=True, slots=True)
class WindowInputs:
    """A batch as the kernels read it, per row and stream, row-major.

    `bits`: int64 [n * streams], the value or, of a float64, its bits.  `valid`: uint8, 0 where
    the value is null or the filter isn't true.
    """

    bits: Int64s
    valid: NDArray[np.uint8]
    streams: int

    def take(self, rows: Int64s) -> "WindowInputs":
        """Return the inputs of the rows at the indexes `rows`."""
        bits = self.bits.reshape(-1, self.streams).take(rows, axis=0)
        valid = self.valid.reshape(-1, self.streams).take(rows, axis=0)
        return WindowInputs(bits.reshape(-1), valid.reshape(-1), self.streams)


@dataclass(slots=True)
class TileUpdate:
    """What a batch changes: new values by the entity's index.

    `recent`: None where nothing changes.  `older`: those that change, None for no older tiles.
    `late_rows`: rows beyond the retention.
    """

    recent: list[bytes | None]
    older: dict[int, bytes | None]
    late_rows: int


GetOlder = Callable[[Sequence[int]], Sequence["bytes | None"]]
"""Returns the older values of the entities at these indexes."""


@dataclass(frozen=True, slots=True)
class WindowQuery:
    """A set of features, resolved: the kernels' table as a source, the types of the columns.

    `needs_older`: whether a read wants older values.  `lists`: of every list the column of its
    length, the first of its values, and their number.  `reader`: of this view alone.
    """

    source: Source
    dtypes: tuple[DType, ...]
    needs_older: bool
    lists: tuple[tuple[int, int, int], ...]
    reader: ViewReader

    @property
    def table(self) -> Int64s:
        """The kernels' table."""
        return self.source.tables[1]

    def lists_of(self, words: Int64s, extra: Int64s) -> dict[int, NDArray[Any]]:
        """Return the lists by column, as `core.lists` packs them, object [n]; null ones are empty.

        `words`: int64 [k, n], of a list its length; `extra`: the values of all lists, [e, n].
        """
        return {
            column: _packed(words[column], extra[first : first + n].T)
            for column, first, n in self.lists
        }


class WindowPlan:
    """Updates, reads and joins of one window view.

    Immutable but for caches; any thread may call it.  An entity has two values, opaque bytes: its
    recent tiles and, once there are many, the older ones.
    """

    def __init__(self, layout: TileLayout, kernels: FeatureKernels) -> None:
        self.layout: Final = layout
        self.columns: Final = _read_columns(layout.streams)
        self.inputs_key: Final = tuple((*stream.texts, stream.kind) for stream in layout.streams)
        """Plans of one source whose keys are equal have equal inputs."""
        self._kernels = kernels
        self._scratch = Scratch(layout.work_words)
        self._queries: dict[tuple[str, ...], WindowQuery] = {}
        # A window closed on the right is one closed on the left over events 1 us earlier.
        self._shift_us = 1 if layout.view.closed == "right" else 0

    @classmethod
    def build(
        cls,
        view: ViewSpec,
        source: SourceSpec,
        kernels: FeatureKernels,
        *,
        min_recent: int = MIN_RECENT,
    ) -> "WindowPlan":
        """Return the plan of a window view; once, at apply or start.

        `kernels`: from `load_feature_kernels`.  `min_recent`: see `build_layout`.  Raises
        DefinitionError(code="too_many_tiles").
        """
        return cls(build_layout(view, source, min_recent=min_recent), kernels)

    def inputs(self, columns: Mapping[str, Column]) -> WindowInputs:
        """Return the aggregates' inputs for a batch: every expression evaluated once.

        `columns` holds at least `self.columns`, and one column if that is empty (a view that only
        counts events).  0.6 us per stream, and 5 us per expression that isn't just a column.
        """
        n, streams = height(columns), self.layout.streams
        bits = np.zeros((n, len(streams)), np.int64)
        valid = np.ones((n, len(streams)), np.uint8)
        reals = bits.view(np.float64)
        evaluated: dict[str, Column] = {}
        for index, stream in enumerate(streams):
            if stream.input is not None:
                column = _evaluate(stream.input, columns, evaluated)
                if column.valid is not None:
                    valid[:, index] = column.valid
                if stream.kind == HASHED:
                    bits[:, index] = hash_values(column.values)
                    if column.values.dtype.kind == "f":
                        valid[:, index] &= column.values == column.values
                elif stream.kind != EVENTS:
                    (reals if stream.kind == REAL else bits)[:, index] = column.values
            if stream.filter is not None:
                kept = _evaluate(stream.filter, columns, evaluated)
                valid[:, index] &= kept.values & kept.mask()
        return WindowInputs(bits.reshape(-1), valid.reshape(-1), len(streams))

    def update(
        self,
        values: Sequence[bytes | None],
        get_older: GetOlder,
        entity_of_row: Int64s,
        stamps: Stamps,
        inputs: WindowInputs,
        newest_known_us: int,
    ) -> TileUpdate:
        """Return the new values of every entity after the rows, applied in their order.

        `values`: current recent ones, None for an entity never seen; `get_older` is asked for the
        few that need their older tiles.  `entity_of_row`: index into `values`, int64 [n].
        `newest_known_us`: at least every event time; reads at a later t stay exact, tiles that
        none of them can need are dropped.  A row older than every retention changes nothing and
        counts in `late_rows`.
        """
        entities = len(values)
        recent, starts = join_values(values)
        batch = (self._shifted(stamps.event_us), stamps.known_us, stamps.sequences)
        rows = (*batch, inputs.bits, inputs.bits.view(np.float64), inputs.valid, newest_known_us)
        groups = np.empty(len(entity_of_row), np.int64), np.empty(entities + 1, np.int64)
        work = self._scratch.work, self._scratch.work_f
        out, ends = self._room(len(recent), entities, len(entity_of_row))
        unloaded = np.empty(entities, np.uint8)
        late = self._kernels.update_recent(
            self.layout.plan, recent, starts, entity_of_row, *rows, *groups, *work, out, ends,
            unloaded,
        )  # fmt: skip
        update = TileUpdate(_cut(out, ends), {}, self._checked(late))
        if unloaded.any():
            chosen = np.flatnonzero(unloaded)
            older, older_starts = join_values(get_older(chosen.tolist()))
            stored_words, n = len(recent) + len(older), len(chosen)
            out, ends = self._room(stored_words, n, len(entity_of_row))
            older_out, older_ends = np.empty_like(out), np.empty_like(ends)
            late = self._kernels.update_all(
                self.layout.plan, recent, starts, older, older_starts, chosen, *rows, *groups,
                *work, out, ends, older_out, older_ends,
            )  # fmt: skip
            update.late_rows += self._checked(late)
            new = zip(_cut(out, ends), _cut(older_out, older_ends), strict=True)
            for entity, (value, older_value) in zip(chosen.tolist(), new, strict=True):
                if value is not None:
                    update.recent[entity], update.older[entity] = value, older_value
        return update

    def _room(self, stored_words: int, entities: int, rows: int) -> tuple[Int64s, Int64s]:
        """Return room for new values of `entities`, and for where they end.

        `stored_words`: of the tiles that are there; each row may bring one tile of each hop.
        """
        layout = self.layout
        head = STORED_HEAD + STORED_WIDTH * len(layout.hops_us)
        grown = stored_words + entities * head + rows * len(layout.hops_us) * layout.tile_words
        return (
            np.empty(min(grown, entities * (head + layout.max_words)), np.int64),
            np.empty(entities + 1, np.int64),
        )

    def _checked(self, result: int) -> int:
        if result < OK:
            raise self.failure(result)
        return result

    def read(
        self,
        values: Sequence[bytes | None],
        older: Sequence[bytes | None],
        t_us: Int64s | int,
        features: Sequence[str],
    ) -> Columns:
        """Return the features of each entity as of t: one t, or int64 [n].

        `values` and `older`: its recent and older tiles.  Every t must be later than the newest
        event in them: true for t after all arrivals of the snapshot; else
        ValidationError(code="read_in_the_past").  About 6 us, and per entity and window 10 ns for
        each tile and stream.
        """
        query, n = self.query(tuple(features)), len(values)
        block = Block.empty(len(features), n, with_state=0)
        extra = np.empty((query.source.width - len(features), n), np.int64)
        fault = query.reader.read(
            [0, n, n],
            np.arange(n),
            [*values, *older],
            np.atleast_1d(np.asarray(t_us, np.int64)),
            block,
            extra=extra,
        )
        if fault is not None:
            raise self.failure(fault[1])
        return _columns(features, query, block.words, extra, block.valid)

    def join(  # noqa: PLR0913  two tables side by side
        self,
        event_codes: Int64s,
        event_us: Int64s,
        known_us: Int64s,
        sequences: Int64s,
        inputs: WindowInputs,
        spine_codes: Int64s,
        spine_t_us: Int64s,
        features: Sequence[str],
        *,
        mode: JoinMode,
        spine_sequence: Int64s | None = None,
    ) -> Columns:
        """Return the features of every spine row, in spine order: what a read at its t gave.

        Codes number the entities from 0 on both sides; -1 is none.  A row at t sees the events with
        event_time < t (closed="left") that are also known: by `as_known` known_time <= t, by
        `as_of_sequence` sequence <= the row's `spine_sequence`; `as_corrected` sees all.
        Events are accumulated in (known_time, sequence), sequence, or (event_time, sequence) order.

        Time O(m + n) per window when both sides come in time order, plus sorting them otherwise;
        memory: a copy of both sides in walk order and two of the result.  An `as_of_sequence` row
        whose t isn't later than every event up to its sequence costs its entity's events once more.
        """
        query, n = self.query(tuple(features)), len(spine_codes)
        width = query.source.width
        event_us = self._shifted(event_us)
        visible, asked = _visibility(
            mode, event_us, known_us, sequences, spine_t_us, spine_sequence
        )
        groups = 2 + max(_highest(event_codes), _highest(spine_codes))
        order, event_starts = self._walk_order(event_codes, groups, visible, sequences)
        taken = inputs.take(order)
        bits, valid = taken.bits, taken.valid
        rows, spine_starts = self._walk_order(spine_codes, groups, asked, spine_t_us)
        out, present = np.empty(n * width, np.int64), np.empty(n * width, np.uint8)
        work, spare = (np.zeros(self.layout.walk_words, np.int64) for _ in range(2))
        self._kernels.join_rows(
            self.layout.plan, query.table, event_starts, event_us[order], known_us[order],
            sequences[order], visible[order], bits, bits.view(np.float64), valid,
            spine_starts, rows, spine_t_us[rows], asked[rows], np.empty(n, np.int64),
            work, work.view(np.float64), spare, spare.view(np.float64),
            out, out.view(np.float64), present,
        )  # fmt: skip
        k, words = len(features), _transposed(out.reshape(n, width))
        marks = np.ascontiguousarray(present.reshape(n, width)[:, :k].T).astype(np.bool_)
        return _columns(features, query, words[:k], words[k:], marks)

    def _shifted(self, event_us: Int64s) -> Int64s:
        return event_us - self._shift_us if self._shift_us else event_us

    def query(self, features: tuple[str, ...]) -> "WindowQuery":
        """Return what reads of `features` need to know; raises NotFoundError."""
        query = self._queries.get(features)
        if query is None:
            query = self._build_query(features)
            if len(self._queries) >= MAX_QUERIES:
                self._queries.clear()
            self._queries[features] = query
        return query

    def _build_query(self, features: tuple[str, ...]) -> WindowQuery:
        outputs = self.layout.outputs
        for feature in features:
            if feature not in outputs:
                raise NotFoundError(
                    f"view {self.layout.view.name!r} has no feature {feature!r}; "
                    f"it has: {', '.join(outputs)}",
                    code="unknown_feature",
                    hint="Check the spelling, or add the aggregate or window and run mlpd apply.",
                )
        lengths = [outputs[feature].length for feature in features]
        first = list(accumulate(lengths, initial=0))
        k, layout = len(features), self.layout
        source = Source(
            WINDOW,
            (layout.plan, layout.query(features)),
            k,
            k + first[-1],
            work_words=layout.work_words,
        )
        return WindowQuery(
            source,
            tuple(outputs[feature].dtype for feature in features),
            layout.needs_older(features),
            tuple((i, first[i], n) for i, n in enumerate(lengths) if n),
            ViewReader(self._kernels.read_views, [(source, Place(older=0))]),
        )

    def _walk_order(
        self, codes: Int64s, groups: int, first: Int64s, second: Int64s
    ) -> tuple[Int64s, Int64s]:
        """Return (order by code, first, second; starts of the groups -1, 0, 1, ...)."""
        before = None if _is_sorted(first, second) else np.lexsort((second, first))
        order, starts = np.empty(len(codes), np.int64), np.empty(groups + 1, np.int64)
        walked = codes if before is None else codes[before]
        if self._kernels.group_rows(walked, groups, order, starts) != OK:
            raise self.failure(BAD_ENTITY)
        return order if before is None else before[order], starts

    def failure(self, code: int) -> InternalError | ValidationError:
        """Return the error for what a kernel returned."""
        name = self.layout.view.name
        if code == PAST_READ:
            return ValidationError(
                f"view {name!r} has events later than the time of the read",
                code="read_in_the_past",
                hint="Read history through a point-in-time join.",
            )
        reasons = {
            BAD_ENTITY: "an entity code is out of range",
            BAD_VALUE: "a stored value isn't of this view's layout, or is damaged",
            FUTURE_EVENT: "an event is later than the newest known time",
        }
        return InternalError(f"view {name!r}: {reasons[code]}", code="window_state")


def _read_columns(streams: Sequence[Stream]) -> tuple[str, ...]:
    """Return the source's columns that the streams read."""
    expressions = [e for s in streams for e in (s.input, s.filter) if e is not None]
    return tuple(sorted({name for e in expressions for name in e.columns}))


def _evaluate(
    expression: Expression, columns: Mapping[str, Column], evaluated: dict[str, Column]
) -> Column:
    """Return an expression's result, at once when it is a column's name."""
    text = expression.text
    if text in columns:
        return columns[text]
    if text not in evaluated:
        evaluated[text] = expression.evaluate(columns)
    return evaluated[text]


def _cut(words: Int64s, ends: Int64s) -> list[bytes | None]:
    """Return the values between successive ends, None for those without words."""
    spans = pairwise(ends.tolist())
    return [words[start:end].tobytes() if end > start else None for start, end in spans]


def _visibility(
    mode: JoinMode,
    event_us: Int64s,
    known_us: Int64s,
    sequences: Int64s,
    spine_t_us: Int64s,
    spine_sequence: Int64s | None,
) -> tuple[Int64s, Int64s]:
    """Return what is compared: of the events, and of the spine rows that see those up to it."""
    if mode == "as_known":
        return known_us, spine_t_us
    if mode == "as_corrected":
        return event_us, spine_t_us - 1
    if spine_sequence is None:
        raise ValidationError(
            "as_of_sequence needs the sequence that each spine row saw",
            code="missing_sequence",
            hint="Give spine_sequence, or join as_known.",
        )
    return sequences, spine_sequence


def _highest(codes: Int64s) -> int:
    return int(codes.max()) if len(codes) else -1


def _is_sorted(first: Int64s, second: Int64s) -> bool:
    a, b = first[:-1], first[1:]
    return bool(((a < b) | ((a == b) & (second[:-1] <= second[1:]))).all())


def _packed(lengths: Int64s, values: Int64s) -> NDArray[Any]:
    """Return lists as packed values; `values`: int64 [n, most]."""
    flat = values[np.arange(values.shape[1]) < lengths[:, None]]
    packed = np.empty(len(lengths), object)
    packed[:] = pack_lists(DType.INT64, flat, lengths)  # the words of a float64 are its bytes, too
    return packed


def _columns(
    features: Sequence[str],
    query: WindowQuery,
    words: Int64s,
    extra: Int64s,
    valid: NDArray[np.bool_],
) -> Columns:
    """Return the columns of `words` and `valid`, [k, n], and the values of lists, [e, n]."""
    masks: list[NDArray[np.bool_] | None] = [None] * len(features)
    if not valid.all():
        masks = [None if mask.all() else mask for mask in valid]
    lists = query.lists_of(words, extra)
    found: dict[int, NDArray[Any]] = {
        i: words[i].view(np.float64) if dtype is DType.FLOAT64 else words[i]
        for i, dtype in enumerate(query.dtypes)
    }
    return {
        feature: Column(dtype, lists.get(i, found[i]), masks[i])
        for i, (feature, dtype) in enumerate(zip(features, query.dtypes, strict=True))
    }


def _transposed(rows: Int64s) -> Int64s:
    """Return the transpose, C-contiguous; by blocks, which numpy's own copy does not do."""
    if len(rows) <= TRANSPOSED_ROWS:
        return np.ascontiguousarray(rows.T)
    columns = np.empty(rows.shape[::-1], np.int64)
    for start in range(0, len(rows), TRANSPOSED_ROWS):
        block = slice(start, start + TRANSPOSED_ROWS)
        columns[:, block] = rows[block].T
    return columns
