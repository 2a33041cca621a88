"""The entry for cells that stay: copies those of a read's rows into its block, in one call."""

# ruff: noqa: PLR0913, PLR0917  a kernel's arguments are flat arrays

from mlpd.core.kernels import kernel
from mlpd.features.words import I8, U1

NOBODY = 0
"""The place with the cells of a row without an entity."""


@kernel(
    "const i8[], const i8[], const i8[], const u1[], const u1[], const i8[], "
    "const i8[], const i8[], const i8[], i8[], u1[], u1[], i8[]"
)
def copy_cells(
    group_of_row: I8, group_of_latest: I8, from_words: I8, from_valid: U1, from_state: U1,
    from_event_us: I8,
    places: I8, starts: I8, codes: I8, words: I8, valid: U1, state: U1, event_us: I8,
) -> None:  # fmt: skip
    """Write the features of all views for n rows.

    `places[starts[g] + c]` has the cells of group g's entity c; `codes`: per group and row the
    entity, negative for none.  Cells of a place lie side by side in `from_...`, those of a feature
    in the block; the first features have a state, and per latest-value view there is a time.
    """
    rows, latest = len(group_of_row), len(group_of_latest)
    n = len(codes) // max(len(starts), 1)
    with_state = len(state) // max(n, 1)
    for i in range(n):
        for row in range(rows):
            group = group_of_row[row]
            code = codes[group * n + i]
            place = NOBODY if code < 0 else places[starts[group] + code]
            words[row * n + i] = from_words[place * rows + row]
            valid[row * n + i] = from_valid[place * rows + row]
            if row < with_state:
                state[row * n + i] = from_state[place * with_state + row]
        for view in range(latest):
            group = group_of_latest[view]
            code = codes[group * n + i]
            place = NOBODY if code < 0 else places[starts[group] + code]
            event_us[view * n + i] = from_event_us[place * latest + view]


@kernel(
    "const i8[], const i8[], i8[], u1[], u1[], i8[], "
    "const i8[], i8, const i8[], const u1[], const u1[], const i8[]"
)
def keep_cells(
    group_of_row: I8, group_of_latest: I8, to_words: I8, to_valid: U1, to_state: U1,
    to_event_us: I8,
    places: I8, n: int, words: I8, valid: U1, state: U1, event_us: I8,
) -> None:  # fmt: skip
    """Do the reverse: row i of group g goes to `places[g * n + i]`, if that isn't negative."""
    rows, latest = len(group_of_row), len(group_of_latest)
    with_state = len(state) // max(n, 1)
    for i in range(n):
        for row in range(rows):
            place = places[group_of_row[row] * n + i]
            if place >= 0:
                to_words[place * rows + row] = words[row * n + i]
                to_valid[place * rows + row] = valid[row * n + i]
                if row < with_state:
                    to_state[place * with_state + row] = state[row * n + i]
        for view in range(latest):
            place = places[group_of_latest[view] * n + i]
            if place >= 0:
                to_event_us[place * latest + view] = event_us[view * n + i]
