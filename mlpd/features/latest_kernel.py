"""The cells of latest-value views: one kernel each for online reads and joins, one rule for both.

A cell is a value with its validity and its `Status`.  A feature's cells lie side by side: that of
feature f and row r is number `f * rows + r`.
"""

# ruff: noqa: PLR0913, PLR0917  a kernel's arguments are flat arrays

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mlpd.core.kernels import device, kernel

I8: TypeAlias = NDArray[np.int64]
U1: TypeAlias = NDArray[np.uint8]

PRESENT, NULL, MISSING, STALE = range(4)
"""The values of `Status`."""
EVENT_WORD = 1
"""Word of a row's fixed section with its event time; word 0 is never 0 (docs/formats/rows.md)."""
WORD, NULL_WORD, NULL_BIT = range(3)
"""Where a feature is in the fixed section: its word, the word and the bit that mark it as null."""
PLACE_WIDTH = 3


@kernel("const i8[], const i8[], const i8[], const u1[], i8, i8, i8[], u1[], u1[], i8[]")
def read_rows(
    fixed: I8, places: I8, defaults: I8, has_default: U1, t_us: int, ttl_us: int,
    words: I8, valid: U1, state: U1, event_us: I8,
) -> None:  # fmt: skip
    """Decode the cells of rows' fixed sections, as of `t_us`; a section of zeros is no row.

    `places`: three per feature.  `defaults`, `has_default`: one per feature.  `ttl_us`: an age
    above it is stale.  Writes the cells and, per row, its event time.
    """
    rows, features = len(event_us), len(defaults)
    width = len(fixed) // max(rows, 1)
    for row in range(rows):
        first = row * width
        event_us[row] = fixed[first + EVENT_WORD]
        known = _row_status(fixed[first] == 0, t_us - event_us[row], ttl_us)
        for feature in range(features):
            place, cell = feature * PLACE_WIDTH, feature * rows + row
            words[cell] = fixed[first + places[place + WORD]]
            null = fixed[first + places[place + NULL_WORD]] >> places[place + NULL_BIT] & 1
            _settle(known, null, defaults[feature], has_default[feature], words, valid, state, cell)


@kernel("const u1[], const i8[], const i8[], const u1[], i8, i8[], u1[], u1[]")
def settle_rows(
    missing: U1, age_us: I8, defaults: I8, has_default: U1, ttl_us: int,
    words: I8, valid: U1, state: U1,
) -> None:  # fmt: skip
    """Give cells with values and validity their status, as `read_rows` does.

    `missing`: 1 for a row that isn't there.  `age_us`: of the others.
    """
    rows = len(missing)
    for feature in range(len(defaults)):
        for row in range(rows):
            cell = feature * rows + row
            known = _row_status(missing[row] != 0, age_us[row], ttl_us)
            null = 1 - valid[cell]
            _settle(known, null, defaults[feature], has_default[feature], words, valid, state, cell)


@device
def _row_status(is_missing: bool, age_us: int, ttl_us: int) -> int:
    if is_missing:
        return MISSING
    return STALE if age_us > ttl_us else PRESENT


@device
def _settle(
    row_status: int, null: int, default: int, has_default: int,
    words: I8, valid: U1, state: U1, cell: int,
) -> None:  # fmt: skip
    """Set a cell's status; what isn't PRESENT becomes null, or the feature's default."""
    status = null if row_status == PRESENT else row_status
    state[cell] = status
    valid[cell] = 1
    if status != PRESENT:
        words[cell] = default
        valid[cell] = has_default
