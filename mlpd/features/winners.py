"""Which event a latest-value view shows to each row of a spine."""

from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import InternalError, ValidationError
from mlpd.core.kernels import Kernels, load_kernels
from mlpd.features.stamps import Stamps

Int64s = NDArray[np.int64]
Mode = Literal["as_known", "as_corrected", "as_of_sequence"]
Closed = Literal["right", "left"]
"""Whether a row at t sees events of t itself ("right") or only earlier ones."""

NEVER_US = 2**63 - 1
KERNELS = "mlpd.features.winner_kernel"


def find_winners(
    event_codes: Int64s,
    stamps: Stamps,
    spine_codes: Int64s,
    t_us: Int64s,
    sequences: Int64s | None,
    *,
    mode: Mode,
    closed: Closed = "right",
) -> Int64s:
    """Return the index of the event behind each spine row, -1 for none.

    Codes number the entities from 0 on both sides; -1 is none.  A row at t sees the events with
    known_time <= t (`as_known`), with event_time <= t (`as_corrected`), or with a sequence up to
    its own (`as_of_sequence`); of these, closed="left", those with event_time < t.  The largest
    (event_time, known_time, sequence) wins.

    About 0.1 us per event and row where events come in the order in which they became visible and
    rows in time order; else events are sorted, and rows search.  24 bytes of memory per event.
    """
    if mode == "as_of_sequence":
        if sequences is None:
            raise ValidationError(
                "as_of_sequence needs the sequence that each spine row saw", code="missing_sequence"
            )
        if closed == "left" and len(sequences) and sequences.min() == sequences.max():
            # Without the events after it event times decide alone.
            event_codes = np.where(stamps.sequences > sequences[0], -1, event_codes)
            mode = "as_corrected"
    visible = {
        "as_known": stamps.known_us,
        "as_corrected": stamps.event_us,
        "as_of_sequence": stamps.sequences,
    }[mode]
    asked = sequences if mode == "as_of_sequence" and sequences is not None else t_us
    limits = t_us - 1 if closed == "left" else np.full(len(t_us), NEVER_US)
    kernels = _load_kernels()
    groups = 2 + max(int(codes.max(initial=-1)) for codes in (event_codes, spine_codes))
    order, starts = np.empty(len(event_codes), np.int64), np.empty(groups + 1, np.int64)
    walk = None
    if not kernels.is_walk_order(visible, *stamps):
        walk = np.lexsort((stamps.sequences, stamps.known_us, stamps.event_us, visible))
        event_codes = event_codes[walk]
    if not kernels.group_events(event_codes, groups, order, starts):
        raise InternalError("an entity code is out of range", code="join_codes")
    if walk is not None:
        order = walk[order]
    scratch = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    rows = np.empty(len(spine_codes), np.int64)
    kernels.find_winners(
        *(order, starts, visible, *stamps, spine_codes, asked, limits),
        *(*scratch, np.empty(groups, np.int64), rows),
    )
    return rows


@cache
def _load_kernels() -> Kernels:
    return load_kernels(KERNELS)
