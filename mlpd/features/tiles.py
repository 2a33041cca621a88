"""Layout of a window view's tiles: its streams, the words they need, the tables kernels read.

The values of an entity in LMDB are described byte by byte in docs/formats/tiles.md.
"""

import math
import zlib
from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import DType
from mlpd.core.errors import DefinitionError, InternalError
from mlpd.core.expressions import Expression, parse_expression
from mlpd.core.hashing import canonical_json
from mlpd.core.specs import (
    AGGREGATE_FUNCTIONS,
    MAX_LENGTH,
    AggregateSpec,
    SourceSpec,
    ViewSpec,
)
from mlpd.features.distinct_kernel import ROOM, SKETCH_WIDTH
from mlpd.features.ends_kernel import END_WIDTH
from mlpd.features.ewma_kernel import EWMA_WIDTH, NO_EXPONENT
from mlpd.features.fold_kernel import FOLDS_HEAD, QUERY_HEAD, WINDOW_WIDTH
from mlpd.features.state_kernel import (
    META_WIDTH,
    PLAN_HEAD,
    RESOLUTION_WIDTH,
    STORED_HEAD,
    STORED_TILES,
    STORED_WIDTH,
    WORK_HEAD,
)
from mlpd.features.tile_kernel import (
    ABSENT,
    COUNT_AT,
    COUNTS,
    EVENTS,
    EWMA_AT,
    EWMAS,
    FIRST_AT,
    FIRSTS,
    HASHED,
    INTEGER,
    INTEGER_SUMS,
    LAST_AT,
    LAST_N_AT,
    LASTS,
    LISTS,
    M2_AT,
    MAX_AT,
    MAXIMA,
    MERGES,
    MIN_AT,
    MINIMA,
    PARAMETER,
    REAL,
    REAL_SUMS,
    SKETCH_AT,
    SKETCHES,
    SQUARES,
    STREAM_WIDTH,
    SUM_AT,
    TOPK_AT,
    TOPS,
)
from mlpd.features.topk_kernel import TOPK_SCRATCH, TOPK_WIDTH

FORMAT = 2
"""Version of the stored form; part of every value's layout word."""

MAX_TILES = 65_536
"""Tiles of one resolution at most: 45 days in 1 min hops."""

MIN_RECENT = 8
"""Up to twice as many tiles are all stored as recent, of n others at most max(MIN_RECENT, sqrt(n)):
an event writes these, and the older ones are written again once for half as many new tiles, so the
square root costs least.  Half a page of LMDB, 2 KB, is a good length of a value: a longer one takes
a page of its own beside the one that points to it."""

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

PIECES: dict[int, tuple[int, ...]] = {
    SUM_AT: (0, 0),
    M2_AT: (0, 0),
    MIN_AT: (INT64_MAX,),
    MAX_AT: (INT64_MIN,),
    FIRST_AT: (0, INT64_MAX, 0, 0),
    LAST_AT: (0, INT64_MIN, 0, 0),
    EWMA_AT: (NO_EXPONENT, *(0,) * (EWMA_WIDTH - 1)),
    SKETCH_AT: (0,) * SKETCH_WIDTH,
    LAST_N_AT: (0,) * (1 + END_WIDTH * MAX_LENGTH),
    TOPK_AT: (0,) * TOPK_WIDTH,
}
"""Each piece's words when there are no values, in their order in a stream, after its count; of a
list with room for fewer than MAX_LENGTH values, only as many as it needs."""

_NEEDS: dict[str, tuple[int, ...]] = {
    "count": (),
    "sum": (SUM_AT,),
    "mean": (SUM_AT,),
    "min": (MIN_AT,),
    "max": (MAX_AT,),
    "var": (SUM_AT, M2_AT),
    "std": (SUM_AT, M2_AT),
    "first": (FIRST_AT,),
    "last": (LAST_AT,),
    "ewma": (EWMA_AT,),
    "approx_distinct": (SKETCH_AT,),
    "last_n": (LAST_N_AT,),
    "topk": (TOPK_AT,),
}

_SCRATCH = {SKETCH_AT: ROOM, LAST_N_AT: END_WIDTH * MAX_LENGTH, TOPK_AT: TOPK_SCRATCH}
"""Words that merging a piece uses."""

Table = NDArray[np.int64]
Key = tuple[str | None, str | None, int | None, bool]
"""What makes a stream one: input, filter, parameter, and whether its values are hashed."""


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """What a view accumulates of one (input, filter): `places` maps pieces to words in a tile.

    Aggregates with a parameter, such as a half-life, or of hashes have streams of their own.
    """

    input: Expression | None
    filter: Expression | None
    kind: int
    parameter: int | None
    places: dict[int, int]

    @property
    def texts(self) -> tuple[str | None, str | None]:
        """The texts of input and filter: streams of one kind that share them have equal values."""
        texts = (e.text if e is not None else None for e in (self.input, self.filter))
        return next(texts), next(texts)

    @property
    def words(self) -> list[int]:
        """The words of no values."""
        pieces = (piece for piece in self.places if piece in PIECES)
        return [0, *(word for piece in pieces for word in self.empty(piece))]

    def empty(self, piece: int) -> tuple[int, ...]:
        """Return the words of a piece without values."""
        words = PIECES[piece]
        return words[: 1 + END_WIDTH * (self.parameter or 0)] if piece == LAST_N_AT else words

    @property
    def spec(self) -> list[int]:
        """The stream's row in the kernels' stream table."""
        columns = range(COUNT_AT, PARAMETER)
        places = [self.places.get(piece, ABSENT) for piece in columns]
        return [self.kind, len(self.words), *places, self.parameter or 0]


@dataclass(frozen=True, slots=True)
class Output:
    """One feature: `function` (its number in the kernels) of a stream over a window.

    `length`: of a list at most, 0 for the other types.
    """

    function: int
    pieces: tuple[int, ...]
    stream: int
    window: int
    dtype: DType
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """An entity's tiles, decoded: by hop in us the words [n, tile_words], oldest first."""

    newest_event_us: int
    by_hop: dict[int, Table]


@dataclass(frozen=True)
class TileLayout:
    """Everything about a view's tiles.

    `plan`: the table of `window_kernel`.  `outputs`: by feature name.  `work_words`: length of the
    kernels' scratch state, without the folds that a join keeps behind it: `walk_words` with them,
    at `folds_at` of each window; merging uses what is at `scratch_at`.  `split_hops_us`: those that
    may have older tiles.  `max_words`: of an entity's live tiles.
    """

    view: ViewSpec
    streams: tuple[Stream, ...]
    hops_us: tuple[int, ...]
    tile_words: int
    layout_word: int
    plan: Table
    outputs: dict[str, Output]
    scratch_at: int
    work_words: int
    folds_at: tuple[int, ...]
    walk_words: int
    split_hops_us: frozenset[int]
    max_words: int

    def needs_older(self, features: Sequence[str]) -> bool:
        """Tell whether reads of `features` need an entity's older tiles."""
        windows = {self.outputs[feature].window for feature in features}
        return any(self.view.hops_us[window] in self.split_hops_us for window in windows)

    def query(self, features: Sequence[str]) -> Table:
        """Return the kernels' table for the outputs `features`, in this order as columns.

        Behind these come the columns of the lists' values, in the order of the lists.
        """
        chosen = [self.outputs[feature] for feature in features]
        elements = [*accumulate((output.length for output in chosen), initial=len(chosen))]
        windows = sorted({output.window for output in chosen})
        head = QUERY_HEAD + WINDOW_WIDTH * len(windows)
        window_words: list[int] = []
        output_words: list[int] = []
        for window in windows:
            start = head + len(output_words)
            for column, output in enumerate(chosen):
                if output.window == window:
                    output_words += [output.function, output.stream, column, elements[column]]
            width, hop = self.view.windows_us[window], self.view.hops_us[window]
            window_words += [self.hops_us.index(hop), width, width // hop]
            window_words += [self.folds_at[window], start, head + len(output_words)]
        needs = {(self.streams[o.stream], piece) for o in chosen for piece in (COUNT_AT, *o.pieces)}
        merges_at = head + len(output_words)
        words = [len(windows), merges_at, *window_words, *output_words]
        return np.array([*words, *_merge_list(needs, merges_at, self.scratch_at)], np.int64)


def build_layout(view: ViewSpec, source: SourceSpec, *, min_recent: int = MIN_RECENT) -> TileLayout:
    """Return the layout of a window view; `min_recent` changes what is stored where, no result.

    Raises DefinitionError(code="too_many_tiles") for windows of more than MAX_TILES hops.
    """
    gathered = _gather(view, source)
    streams, tile_words = _place(gathered.values())
    hops = tuple(sorted(set(view.hops_us)))
    retentions = [_retention_us(view, hop) for hop in hops]
    capacities = [-(-retention // hop) + 1 for retention, hop in zip(retentions, hops, strict=True)]
    if max(capacities) > MAX_TILES:
        raise DefinitionError(
            f"view {view.name!r}: a window of {max(capacities)} hops; the limit is {MAX_TILES}",
            code="too_many_tiles",
            hint="Declare a longer hop.",
        )
    tiles_at = WORK_HEAD + META_WIDTH * len(hops)
    grid: list[tuple[int, int, int, int, int]] = []
    scratch_at = tiles_at + 4 * tile_words  # after four single tiles; then the regions, the folds
    pieces = (piece for stream in streams for piece in stream.places)
    work_words = scratch_at + max((_SCRATCH.get(piece, 0) for piece in pieces), default=0)
    for hop, retention, capacity in zip(hops, retentions, capacities, strict=True):
        recent = max(min_recent, math.isqrt(capacity)) if capacity > 2 * min_recent else capacity
        grid.append((hop, retention, capacity, recent, work_words))
        work_words += 2 * capacity * tile_words
    places = [2 * capacities[hops.index(hop)] for hop in view.hops_us]
    folds = accumulate((FOLDS_HEAD + n * tile_words for n in places), initial=work_words)
    *folds_at, walk_words = folds
    layout_word = _layout_word(streams, hops, retentions)
    return TileLayout(
        view=view,
        streams=streams,
        hops_us=hops,
        tile_words=tile_words,
        layout_word=layout_word,
        plan=_plan(streams, tile_words, layout_word, tiles_at, scratch_at, grid),
        outputs=_outputs(view, list(gathered)),
        scratch_at=scratch_at,
        work_words=work_words,
        folds_at=tuple(folds_at),
        walk_words=walk_words,
        split_hops_us=frozenset(hop for hop, _, capacity, recent, _ in grid if capacity > recent),
        max_words=sum(capacities) * tile_words,
    )


def _plan(
    streams: Sequence[Stream],
    tile_words: int,
    layout_word: int,
    tiles_at: int,
    scratch_at: int,
    grid: Sequence[tuple[int, int, int, int, int]],
) -> Table:
    """Return the kernels' plan: head, resolutions, stream table, empty tile, merge list."""
    streams_at = PLAN_HEAD + RESOLUTION_WIDTH * len(grid)
    empty_at = streams_at + STREAM_WIDTH * len(streams)
    merges_at = empty_at + tile_words
    words = [len(grid), len(streams), streams_at, merges_at, empty_at, tile_words, layout_word]
    words += [tiles_at + i * tile_words for i in range(4)]
    words += [word for resolution in grid for word in resolution]
    words += [word for stream in streams for word in stream.spec]
    words += [0, *(word for stream in streams for word in stream.words)]
    words += _merge_list({(s, piece) for s in streams for piece in s.places}, merges_at, scratch_at)
    return np.array(words, np.int64)


def decode_tiles(layout: TileLayout, recent: bytes, older: bytes | None = None) -> Tiles:
    """Return an entity's stored values for people: all tiles, the older ones first.

    Raises InternalError(code="window_state") for values of another layout.
    """
    parts = [_decode(layout, value) for value in (older, recent) if value]
    rows = (np.concatenate(tiles) for tiles in zip(*(tiles for _, tiles in parts), strict=True))
    return Tiles(parts[-1][0], dict(zip(layout.hops_us, rows, strict=True)))


def _decode(layout: TileLayout, value: bytes) -> tuple[int, list[Table]]:
    words = np.frombuffer(value, np.int64)
    head = STORED_HEAD + STORED_WIDTH * len(layout.hops_us)
    counts = words[STORED_HEAD + STORED_TILES : head : STORED_WIDTH]
    if words[0] != layout.layout_word or len(words) != head + counts.sum() * layout.tile_words:
        raise InternalError(
            f"view {layout.view.name!r}: a value isn't of this view's layout, or is damaged",
            code="window_state",
        )
    tiles = np.split(words[head:].reshape(-1, layout.tile_words), np.cumsum(counts)[:-1])
    return int(words[1]), tiles


def _retention_us(view: ViewSpec, hop_us: int) -> int:
    windows = zip(view.windows_us, view.hops_us, strict=True)
    return max(window for window, hop in windows if hop == hop_us)


def _gather(view: ViewSpec, source: SourceSpec) -> dict[Key, Stream]:
    """Return the streams in order of first use, their pieces not yet placed."""
    streams: dict[Key, Stream] = {}
    for aggregate in view.aggregates:
        key = _key(aggregate)
        if key not in streams:
            streams[key] = _stream(view, aggregate, source)
        for piece in _NEEDS[aggregate.function]:
            streams[key].places[piece] = ABSENT
    return streams


def _key(aggregate: AggregateSpec) -> Key:
    is_hashed = SKETCH_AT in _NEEDS[aggregate.function]
    return aggregate.input, aggregate.filter, aggregate.parameter, is_hashed


def _stream(view: ViewSpec, aggregate: AggregateSpec, source: SourceSpec) -> Stream:
    def parse(text: str | None) -> Expression | None:
        what = f"view {view.name!r}: aggregate {aggregate.name!r}"
        return None if text is None else parse_expression(text, source.schema, what)

    expression = parse(aggregate.input)
    kind = EVENTS
    if SKETCH_AT in _NEEDS[aggregate.function]:
        kind = HASHED
    elif expression is not None and expression.dtype.is_numeric:
        kind = REAL if expression.dtype in (DType.FLOAT32, DType.FLOAT64) else INTEGER
    kept = parse(aggregate.filter)
    return Stream(expression, kept, kind, aggregate.parameter, {COUNT_AT: ABSENT})


def _place(streams: Collection[Stream]) -> tuple[tuple[Stream, ...], int]:
    """Give every piece its words; return the streams and a tile's length."""
    word = 1  # the first is the tile's index
    for stream in streams:
        pieces = [piece for piece in PIECES if piece in stream.places]
        stream.places.clear()
        stream.places[COUNT_AT] = word
        word += 1
        for piece in pieces:
            stream.places[piece] = word
            word += len(stream.empty(piece))
    return tuple(streams), word


def _merge_list(needs: AbstractSet[tuple[Stream, int]], at: int, scratch_at: int) -> list[int]:
    """Return the kernels' merge list, to stand at word `at`, for these pieces of streams."""
    kinds: list[list[int]] = [[] for _ in range(MERGES)]
    for stream, piece in sorted(needs, key=lambda need: need[0].places[need[1]]):
        place = stream.places[piece]
        if piece == M2_AT:
            kinds[SQUARES] += [place, stream.places[COUNT_AT], stream.places[SUM_AT], stream.kind]
        elif piece == SUM_AT:
            kinds[INTEGER_SUMS if stream.kind == INTEGER else REAL_SUMS].append(place)
        elif piece in _SCRATCH:
            kinds[_MERGED_AS[piece]] += [place, scratch_at, stream.parameter or 0]
        else:
            kinds[_MERGED_AS[piece]].append(place)
    starts = accumulate((len(kind) for kind in kinds), initial=at + MERGES + 1)
    return [*starts, *(word for kind in kinds for word in kind)]


_MERGED_AS = {
    COUNT_AT: COUNTS,
    MIN_AT: MINIMA,
    MAX_AT: MAXIMA,
    FIRST_AT: FIRSTS,
    LAST_AT: LASTS,
    EWMA_AT: EWMAS,
    SKETCH_AT: SKETCHES,
    LAST_N_AT: LISTS,
    TOPK_AT: TOPS,
}


def _layout_word(streams: Sequence[Stream], hops: Sequence[int], retentions: Sequence[int]) -> int:
    """Return the word that marks values of this layout: checksum << 32 | format."""
    shape: list[list[object]] = []
    for stream in streams:
        declared = [] if stream.parameter is None else [stream.parameter]
        shape.append([*stream.texts, stream.kind, list(stream.places.items()), *declared])
    checksum = zlib.crc32(canonical_json([shape, list(hops), list(retentions)])) >> 1
    return checksum << 32 | FORMAT


def _outputs(view: ViewSpec, keys: Sequence[Key]) -> dict[str, Output]:
    """Return the outputs by feature name; `view.features` has windows within aggregates."""
    pairs = [(a, w) for a in view.aggregates for w in range(len(view.windows_us))]
    found = {}
    for (name, dtype), (aggregate, window) in zip(view.features.items(), pairs, strict=True):
        found[name] = Output(
            function=AGGREGATE_FUNCTIONS.index(aggregate.function),
            pieces=_NEEDS[aggregate.function],
            stream=keys.index(_key(aggregate)),
            window=window,
            dtype=dtype,
            length=0 if dtype.element is None else aggregate.parameter or 0,
        )
    return found
