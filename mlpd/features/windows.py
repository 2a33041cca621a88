"""Window views: aggregates over sliding windows per entity, updated, read and joined by one engine.

`WindowPlan` holds what `window_kernel` needs for one view and turns columns into its flat arrays.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any, Final, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column, Columns, DType, height
from mlpd.core.errors import InternalError, NotFoundError, ValidationError
from mlpd.core.expressions import Expression
from mlpd.core.kernels import address_of, load_kernels
from mlpd.core.specs import SourceSpec, ViewSpec
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
from mlpd.features.tile_kernel import EVENTS, REAL
from mlpd.features.tiles import MIN_RECENT, Stream, TileLayout, build_layout

Int64s = NDArray[np.int64]
Joined = tuple[Int64s, Int64s]
"""The words of several values, and where each starts and, last, the end."""
JoinMode = Literal["as_known", "as_corrected", "as_of_sequence"]

KERNELS = ("mlpd.features.update_kernel", "mlpd.features.window_kernel")
"""The modules behind `load_window_kernels`; `precompile` compiles them side by side."""

TRANSPOSED_ROWS = 1024
"""Rows of a block that is transposed at once: it fits the first two cache levels."""

MAX_QUERIES = 256
"""Tables for sets of features kept per plan; services read few distinct ones."""


class WindowKernels(Protocol):
    """The entries of KERNELS, from `load_window_kernels`; reads need native ones, for `raw`."""

    update_recent: Any
    update_all: Any
    read_values: Any
    group_rows: Any
    join_rows: Any


def load_window_kernels(*, boundscheck: bool | None = None) -> WindowKernels:
    """Return the native kernels; see `load_kernels`."""
    entries: dict[str, Any] = {}
    for module in KERNELS:
        kernels = load_kernels(module, boundscheck=boundscheck)
        entries |= {name: kernels[name] for name in kernels}
    return cast("WindowKernels", SimpleNamespace(**entries))


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
    """A set of features, resolved: the kernel's table and the types of the columns.

    `words`: the table's address and length.  `needs_older`: whether a read wants older values.
    """

    table: Int64s
    dtypes: tuple[DType, ...]
    words: tuple[int, int]
    needs_older: bool


class _Scratch(threading.local):
    """Each thread's scratch state for the kernels."""

    def __init__(self, words: int) -> None:
        self.work = np.zeros(words, np.int64)
        self.work_f = self.work.view(np.float64)
        self.words = address_of(self.work), words


class WindowPlan:
    """Updates, reads and joins of one window view.

    Immutable but for caches; any thread may call it.  An entity has two values, opaque bytes: its
    recent tiles and, once there are many, the older ones.
    """

    def __init__(self, layout: TileLayout, kernels: WindowKernels) -> None:
        self.layout: Final = layout
        self.columns: Final = _columns(layout.streams)
        self.inputs_key: Final = tuple(stream.key for stream in layout.streams)
        """Plans of one source whose keys are equal have equal inputs."""
        self._kernels = kernels
        self._scratch = _Scratch(layout.work_words)
        self._plan_words = address_of(layout.plan), layout.plan.size
        self._queries: dict[tuple[str, ...], WindowQuery] = {}
        # A window closed on the right is one closed on the left over events 1 us earlier.
        self._shift_us = 1 if layout.view.closed == "right" else 0

    @classmethod
    def build(
        cls,
        view: ViewSpec,
        source: SourceSpec,
        kernels: WindowKernels,
        *,
        min_recent: int = MIN_RECENT,
    ) -> "WindowPlan":
        """Return the plan of a window view; once, at apply or start.

        `kernels`: from `load_window_kernels`.  `min_recent`: see `build_layout`.  Raises
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
                if stream.kind != EVENTS:
                    (reals if stream.kind == REAL else bits)[:, index] = column.values
                if column.valid is not None:
                    valid[:, index] = column.valid
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
            raise self._failure(result)
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
        query = self.query(tuple(features))
        times = np.empty(len(values), np.int64)
        times[:] = t_us
        words = self.read_words(query, join_values(values), join_values(older), times)
        return _to_columns(features, query, *words)

    def read_words(
        self, query: "WindowQuery", recent: Joined, older: Joined, t_us: Int64s
    ) -> tuple[Int64s, NDArray[np.uint8]]:
        """Return the words of k features of n entities, and 1 where they aren't null: both [n, k].

        `recent` and `older`: from `join_values`, or with a part of its starts [n + 1].  `t_us`:
        int64 [n].  The kernel gets the arrays' addresses as they are, which takes 5 us less.
        """
        n, width = len(t_us), len(query.dtypes)
        out, present = np.empty((n, width), np.int64), np.empty((n, width), np.uint8)
        words, scratch = (address_of(out), out.size), self._scratch.words
        result = self._kernels.read_values.raw(
            *self._plan_words, *query.words,
            address_of(recent[0]), recent[0].size, address_of(recent[1]), n + 1,
            address_of(older[0]), older[0].size, address_of(older[1]), n + 1,
            address_of(t_us), n, *scratch, *scratch, *words, *words, address_of(present), out.size,
        )  # fmt: skip
        if result < OK:
            raise self._failure(result)
        return out, present

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
        width = len(query.dtypes)
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
        return _to_columns(features, query, out.reshape(n, width), present.reshape(n, width))

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
        dtypes = tuple(outputs[feature].dtype for feature in features)
        table = self.layout.query(features)
        needs_older = self.layout.needs_older(features)
        return WindowQuery(table, dtypes, (address_of(table), table.size), needs_older)

    def _walk_order(
        self, codes: Int64s, groups: int, first: Int64s, second: Int64s
    ) -> tuple[Int64s, Int64s]:
        """Return (order by code, first, second; starts of the groups -1, 0, 1, ...)."""
        before = None if _is_sorted(first, second) else np.lexsort((second, first))
        order, starts = np.empty(len(codes), np.int64), np.empty(groups + 1, np.int64)
        walked = codes if before is None else codes[before]
        if self._kernels.group_rows(walked, groups, order, starts) != OK:
            raise self._failure(BAD_ENTITY)
        return order if before is None else before[order], starts

    def _failure(self, code: int) -> InternalError | ValidationError:
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


def _columns(streams: Sequence[Stream]) -> tuple[str, ...]:
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


def join_values(values: Sequence[bytes | None]) -> Joined:
    """Return (words of all values, where each starts and, last, the end)."""
    parts = [value or b"" for value in values]
    joined = np.frombuffer(b"".join(parts), np.int64)
    ends = accumulate((len(part) >> 3 for part in parts), initial=0)
    return joined, np.fromiter(ends, np.int64, len(parts) + 1)


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


def _to_columns(
    features: Sequence[str], query: WindowQuery, out: Int64s, present: NDArray[np.uint8]
) -> Columns:
    """Return the columns of results [n, features] and of the marks of those that aren't null."""
    words = _transposed(out)
    reals = words.view(np.float64)
    masks: list[NDArray[np.bool_] | None] = [None] * len(features)
    if not present.all():
        marks = np.ascontiguousarray(present.T).view(np.bool_)
        complete: Any = marks.all(axis=1).tolist()
        masks = [None if c else m for c, m in zip(complete, marks, strict=True)]
    return {
        feature: Column(dtype, real if dtype is DType.FLOAT64 else word, mask)
        for feature, dtype, real, word, mask in zip(
            features, query.dtypes, reals, words, masks, strict=True
        )
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
