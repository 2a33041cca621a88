"""Cells that stay: those of entities that were read lately, as long as they are what is stored.

What an online read finds of an entity changes with a commit that touches it, when one of its
windows moves on by a hop, and when a value comes of age.  In between its cells are copied from
here, without a get and without a fold; they are those of an earlier read, so the bits are the same.
"""

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlpd.features.assemble import FrameLayout
from mlpd.features.block import Block, words_of
from mlpd.features.fold_kernel import QUERY_HEAD, RESOLUTION, WIDTH_US, WINDOW_WIDTH, WINDOWS
from mlpd.features.latest import NEVER_US
from mlpd.features.resident_kernel import NOBODY
from mlpd.features.state_kernel import HOP_US, PLAN_HEAD, RESOLUTION_WIDTH

Int64s = NDArray[np.int64]
Keyed = tuple[list[bytes], Int64s]
"""Distinct entities, and per row the number of its own, -1 for none."""
Load = Callable[[Sequence[Keyed], Block, Int64s], None]
"""Reads entities from the store: the features of all views into a block, and the event times."""

CELLS_MAX = 500_000
"""Cells kept of one layout: 5 MB, and 0.15 KB for each key."""
PLACES_MAX, PLACES_MIN = 16_384, 512
"""Entities of one kind that are kept; a layout too wide for the least of it keeps none."""
_ALWAYS = 1 << 62
_FIRST = NOBODY + 1
_ABSENT = -1


class _Place(NamedTuple):
    """Where an entity's cells are, and the moments in [since, ends) for which their ages hold."""

    number: int
    since_us: int
    ends_us: int

    def holds(self, t_us: int) -> bool:
        return self.since_us <= t_us < self.ends_us


class ResidentCells:
    """The cells of one layout; one caller at a time.

    A group is the views of one entity; its entities have places of its own.  `forget` is called
    with what commits touched, before `fill` is with a snapshot that shows them.
    """

    def __init__(self, layout: FrameLayout, places: int) -> None:
        self._copy, self._keep = layout.kernels.copy_cells, layout.kernels.keep_cells
        self._places = places
        rows, latest, groups = layout.view_rows, len(layout.latest), len(layout.entities)
        self._known: list[dict[bytes, _Place]] = [{} for _ in range(groups)]
        self._missed: list[set[bytes]] = [set() for _ in range(groups)]
        self._next = [_FIRST] * groups
        self._has_nobody = False
        self._spans = sorted({*_spans(layout)})
        self._from_us = self._until_us = 0
        self._words = np.empty((places, rows), np.int64)
        self._valid = np.empty((places, rows), np.bool_)
        self._state = np.empty((places, layout.with_state), np.uint8)
        self._event_us = np.empty((places, latest), np.int64)
        rows_of = [_rows(part.rows for part in parts.parts) for parts in layout.entities]
        self._latest_of = [
            [layout.latest.index(part) for part in parts.latest] for parts in layout.entities
        ]
        self._ttls_us = [part.query.source.ttl_us for part in layout.latest]
        self._group_of = np.empty(rows, np.int64), np.empty(latest, np.int64)
        for group, (mine, events) in enumerate(zip(rows_of, self._latest_of, strict=True)):
            self._group_of[0][mine], self._group_of[1][events] = group, group
        kept = self._words, self._valid, self._state, self._event_us
        self._kept = words_of(*self._group_of, *kept)

    @classmethod
    def of(cls, layout: FrameLayout) -> "ResidentCells | None":
        """Return room for a layout's cells, None if they can't stay: texts, lists, or too wide."""
        if layout.has_texts or layout.extra_rows or not layout.view_rows:
            return None
        places = min(CELLS_MAX // layout.view_rows, PLACES_MAX)
        return cls(layout, places) if places >= PLACES_MIN else None

    def forget(self, entities: AbstractSet[bytes] | None) -> None:
        """Forget the cells of these entities, None for all."""
        for group, known in enumerate(self._known):
            if entities is None:
                self._clear(group)
            elif known:
                for entity in entities:
                    known.pop(entity, None)

    def fill(
        self, keyed: Sequence[Keyed], t_us: int, block: Block, event_us: Int64s, load: Load
    ) -> None:
        """Write the features of all views to a block, as of `t_us`; what isn't here is loaded.

        `keyed`: the rows' entities by group, fewer than PLACES_MIN.  `event_us`: int64 [latest
        views, n].
        """
        if not self._from_us <= t_us < self._until_us:
            # Nothing is kept yet: a replay steps over a hop with each of its reads.
            self.forget(None)
            self._from_us, self._until_us = _steady(self._spans, t_us)
            load(keyed, block, event_us)
            return
        for group, (entities, _) in enumerate(keyed):
            if self._next[group] + len(entities) > self._places:
                self._clear(group)
        found = [
            [
                place.number if (place := known.get(e)) and place.holds(t_us) else _ABSENT
                for e in entities
            ]
            for known, (entities, _) in zip(self._known, keyed, strict=True)
        ]
        if not self._has_nobody or any(_ABSENT in places for places in found):
            if not self._were_missed(keyed, found):
                load(keyed, block, event_us)
                return
            self._load(keyed, found, t_us, load)
        starts = np.array([*accumulate(map(len, found), initial=0)][:-1], np.int64)
        places = np.array([*chain.from_iterable(found)], np.int64)
        codes = np.concatenate([codes for _, codes in keyed])
        self._copy.raw(
            *self._kept, *words_of(places, starts, codes),
            *words_of(block.words, block.valid, block.state, event_us),
        )  # fmt: skip

    def _were_missed(self, keyed: Sequence[Keyed], found: Sequence[list[int]]) -> bool:
        """Tell whether one that isn't here was asked for before: others don't come back."""
        were_missed = False
        for missed, (entities, _), places in zip(self._missed, keyed, found, strict=True):
            if _ABSENT in places:
                absent = {e for e, p in zip(entities, places, strict=True) if p == _ABSENT}
                were_missed |= not missed.isdisjoint(absent)
                if len(missed) > PLACES_MAX:
                    missed.clear()
                missed.update(absent)
        return were_missed

    def _clear(self, group: int) -> None:
        self._known[group].clear()
        self._next[group] = _FIRST

    def _load(
        self, keyed: Sequence[Keyed], found: Sequence[list[int]], t_us: int, load: Load
    ) -> None:
        """Read what isn't here, at first nobody before it, into a block; set the places."""
        lacking = [[i for i, place in enumerate(places) if place < 0] for places in found]
        first = 0 if self._has_nobody else 1
        n = first + max(map(len, lacking))
        asked: list[Keyed] = []
        to = np.full((len(keyed), n), _ABSENT)
        to[:, :first] = NOBODY
        for group, ((entities, _), lacks) in enumerate(zip(keyed, lacking, strict=True)):
            codes = np.full(n, -1)
            if lacks:
                codes[first : first + len(lacks)] = range(len(lacks))
                to[group, first : first + len(lacks)] = self._next[group] + np.arange(len(lacks))
            asked.append(([entities[i] for i in lacks], codes))
        block = Block.empty(self._words.shape[1], n, with_state=self._state.shape[1])
        event_us = np.empty((self._event_us.shape[1], n), np.int64)
        load(asked, block, event_us)
        self._keep.raw(
            *self._kept, *words_of(to), n,
            *words_of(block.words, block.valid, block.state, event_us),
        )  # fmt: skip
        self._has_nobody = True
        for group, ((missing, _), lacks) in enumerate(zip(asked, lacking, strict=True)):
            if lacks:
                places = range(self._next[group], self._next[group] + len(lacks))
                self._next[group] += len(lacks)
                spans = self._fresh(group, event_us[:, first : first + len(lacks)], t_us)
                for i, entity, place, span in zip(lacks, missing, places, spans, strict=True):
                    found[group][i] = place
                    self._known[group][entity] = _Place(place, *span)

    def _fresh(self, group: int, event_us: Int64s, t_us: int) -> list[tuple[int, int]]:
        """Return from when and until when no value of each entity comes of age, as at `t_us`."""
        spans = [(-_ALWAYS, _ALWAYS)] * event_us.shape[1]
        for view in self._latest_of[group]:
            ttl_us = self._ttls_us[view]
            for i, happened_us in enumerate(event_us[view].tolist() if ttl_us != NEVER_US else ()):
                if happened_us:
                    (since_us, ends_us), stale_us = spans[i], happened_us + ttl_us + 1
                    is_stale = stale_us <= t_us
                    spans[i] = (
                        max(since_us, stale_us) if is_stale else since_us,
                        ends_us if is_stale else min(ends_us, stale_us),
                    )
        return spans


def _spans(layout: FrameLayout) -> Iterator[tuple[int, int]]:
    """Yield length and hop of each window that is read, in us."""
    for part in layout.windows:
        plan, query = part.plan.layout.plan, part.query.table
        for window in range(int(query[WINDOWS])):
            spec = QUERY_HEAD + window * WINDOW_WIDTH
            resolution = PLAN_HEAD + int(query[spec + RESOLUTION]) * RESOLUTION_WIDTH
            yield int(query[spec + WIDTH_US]), int(plan[resolution + HOP_US])


def _steady(spans: Sequence[tuple[int, int]], t_us: int) -> tuple[int, int]:
    """Return from when and until when windows hold the same tiles as at `t_us`."""
    starts = [
        ((t_us - width_us) // hop_us * hop_us + width_us, hop_us) for width_us, hop_us in spans
    ]
    return (
        max((start_us for start_us, _ in starts), default=-_ALWAYS),
        min((start_us + hop_us for start_us, hop_us in starts), default=_ALWAYS),
    )


def _rows(slices: Iterator[slice]) -> list[int]:
    return [row for rows in slices for row in range(rows.start, rows.stop)]
