"""The cells of latest-value views: one rule for online reads and joins.

A cell is a value with its validity and its `Status`.  A feature's cells lie side by side: that of
feature f and row r is number `f * rows + r`.
"""

# ruff: noqa: PLR0913, PLR0917  a kernel's arguments are flat arrays

from mlpd.core.kernels import device, kernel
from mlpd.features.words import I8, U1

PRESENT, NULL, MISSING, STALE = range(4)
"""The values of `Status`."""
EVENT_WORD = 1
"""Word of a row's fixed section with its event time; word 0 is never 0 (docs/formats/rows.md)."""
TOMBSTONE = 1
"""Bit of a row's flags, the upper half of word 0: its entity was deleted."""
FLAGS_SHIFT = 32
WORD, NULL_WORD, NULL_BIT, DEFAULT, HAS_DEFAULT = range(5)
"""A feature in a query: its word in the fixed section, the word and the bit that mark it as null,
and what stands in for a value that isn't there."""
FEATURE_WIDTH = 5
ELSEWHERE = -1
"""Default of a text: it is none of the row's, which lie at places of 0 and above."""


@kernel("const i8[], const u1[], const i8[], i8, i8, i8[], u1[], u1[]")
def settle_rows(
    query: I8, missing: U1, age_us: I8, ttl_us: int, keep_stale: int,
    words: I8, valid: U1, state: U1,
) -> None:  # fmt: skip
    """Give cells with values and validity their status, as an online read does.

    `missing`: 1 for a row that isn't there.  `age_us`: of the others; above `ttl_us` it is stale.
    `keep_stale`: 1 for values that stay all the same.
    """
    rows = len(missing)
    for feature in range(len(query) // FEATURE_WIDTH):
        for row in range(rows):
            cell = feature * rows + row
            settle(
                query, feature * FEATURE_WIDTH, missing[row] != 0, age_us[row], ttl_us, keep_stale,
                1 - valid[cell], words, valid, state, cell,
            )  # fmt: skip


@device
def settle(
    query: I8, at: int, is_missing: bool, age_us: int, ttl_us: int, keep_stale: int, null: int,
    words: I8, valid: U1, state: U1, cell: int,
) -> None:  # fmt: skip
    """Set the status of the cell of feature `query[at:]`; what isn't there becomes its default."""
    state[cell] = MISSING if is_missing else STALE if age_us > ttl_us else null
    valid[cell] = 1
    if is_missing or null != 0 or (age_us > ttl_us and keep_stale == 0):
        words[cell] = query[at + DEFAULT]
        valid[cell] = query[at + HAS_DEFAULT]
