"""The entry for answers: a block's features as msgpack, in one call.

Format: https://github.com/msgpack/msgpack/blob/master/spec.md.  The bytes are those that
msgpack-python packs of the same values: integers as short as they go, reals as float64.
"""

# ruff: noqa: PLR0913, PLR0917  a kernel's arguments are flat arrays

from mlpd.core.kernels import device, kernel
from mlpd.features.words import I8, U1

REAL, INTEGER, FLAG, ELSEWHERE = range(4)
"""Kinds of features; the values of one that is ELSEWHERE, no words, are put in by the caller."""
VALUE_BYTES_MAX, HEAD_BYTES_MAX = 9, 5
"""What a number takes at most, and what stands before the items of an array or a map."""

_FIX_ARRAY, _ARRAY16, _FIX_MAP, _MAP16 = 0x90, 0xDC, 0x80, 0xDE
_NIL, _FALSE, _FLOAT64, _UINT8, _INT8 = 0xC0, 0xC2, 0xCB, 0xCC, 0xD0


@kernel(
    "const i8[], const i8[], const u1[], const i8[], const i8[], const u1[], const u1[], i8, "
    "i8, i8, u1[], i8[]",
    returns="i8",
)
def pack_features(
    rows: I8, kinds: I8, names: U1, name_ends: I8, words: I8, valid: U1, status: U1, n: int,
    first: int, end: int, out: U1, cuts: I8,
) -> int:  # fmt: skip
    """Write two maps to `out`: of each feature's values, and of its statuses; return their length.

    Of n rows those from `first` up to `end`.  Feature f is number `rows[f]` of the block and has
    the packed name that ends at `name_ends[f]`.
    `cuts[f]`: where its values end, with nothing before them if they are ELSEWHERE; behind them
    stands where the second map begins.
    """
    at, start = _put_head(out, 0, len(rows), _FIX_MAP, _MAP16), 0
    for feature in range(len(rows)):
        at = _copy(out, at, names, start, name_ends[feature])
        start = name_ends[feature]
        if kinds[feature] != ELSEWHERE:
            at = _put_head(out, at, end - first, _FIX_ARRAY, _ARRAY16)
            for cell in range(rows[feature] * n + first, rows[feature] * n + end):
                at = _put_value(out, at, kinds[feature], words[cell], valid[cell])
        cuts[feature] = at
    cuts[len(rows)] = at
    at, start = _put_head(out, at, len(rows), _FIX_MAP, _MAP16), 0
    for feature in range(len(rows)):
        at = _copy(out, at, names, start, name_ends[feature])
        start = name_ends[feature]
        at = _put_head(out, at, end - first, _FIX_ARRAY, _ARRAY16)
        for cell in range(rows[feature] * n + first, rows[feature] * n + end):
            out[at] = status[cell]  # below 128 a number is its own byte
            at += 1
    return at


@device
def _put_value(out: U1, at: int, kind: int, word: int, valid: int) -> int:
    if valid == 0:
        out[at] = _NIL
        return at + 1
    if kind == REAL:
        out[at] = _FLOAT64
        return _put_bytes(out, at + 1, word, 8)
    if kind == FLAG:
        out[at] = _FALSE + (word != 0)
        return at + 1
    return _put_integer(out, at, word)


@device
def _put_integer(out: U1, at: int, word: int) -> int:
    if -32 <= word < 128:  # noqa: PLR2004 - msgpack's
        out[at] = word & 0xFF
        return at + 1
    size = 0
    if word >= 0:
        while size < 3 and word >> (8 << size) != 0:  # noqa: PLR2004 - 8 << 3 is 64
            size += 1
        out[at] = _UINT8 + size
    else:
        while size < 3 and word < -(1 << ((8 << size) - 1)):  # noqa: PLR2004 - 8 << 3 is 64
            size += 1
        out[at] = _INT8 + size
    return _put_bytes(out, at + 1, word, 1 << size)


@device
def _put_head(out: U1, at: int, count: int, short: int, long: int) -> int:
    """Begin an array or a map of so many items."""
    if count < 16:  # noqa: PLR2004 - msgpack's
        out[at] = short | count
        return at + 1
    wide = count >= 1 << 16
    out[at] = long + wide
    return _put_bytes(out, at + 1, count, 4 if wide else 2)


@device
def _put_bytes(out: U1, at: int, word: int, size: int) -> int:
    """Write the last `size` bytes of a word, the highest first."""
    for i in range(size):
        out[at + i] = word >> 8 * (size - 1 - i) & 0xFF
    return at + size


@device
def _copy(out: U1, at: int, source: U1, start: int, end: int) -> int:
    for i in range(start, end):
        out[at + i - start] = source[i]
    return at + end - start
