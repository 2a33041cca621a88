"""Counts of served rows against one reference profile: what is added, merged, stored and read.

A `CountLayout` is a profile flattened for the kernel; `Counts` are the sums.  Bins and the apart
counts are integers and add exactly in any order, across buckets, arms and shards; means and
variances merge by Chan's formula, to rounding.
"""

import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.monitoring.count_kernel import (
    ABOVE,
    APART_WIDTH,
    BELOW,
    BLOCK_ROWS,
    DEFAULTED,
    FINITE,
    HIGH,
    LOW,
    M2,
    MEAN,
    MISSING,
    MOMENTS_WIDTH,
    NEGATIVE_INFINITE,
    POSITIVE_INFINITE,
    STALE,
    count_flags,
    count_rows,
)  # fmt: skip
from mlpd.monitoring.reference import ColumnProfile, ReferenceProfile, unknown_bin

_HEADER: Final = struct.Struct("<4sIqq32s")
_MAGIC: Final = b"mct1"


class CountKernels(Protocol):
    """The two kernels of `count_kernel`: native from `load_kernels`, or the module itself."""

    count_rows: Callable[..., Any]
    count_flags: Callable[..., Any]


class PlainKernels:
    """The kernels as plain Python: exact and slow, for tests and small batches."""

    # Native code overflows to inf silently; numpy's scalars would warn.
    count_rows = staticmethod(np.errstate(over="ignore", invalid="ignore")(count_rows))
    count_flags = staticmethod(count_flags)


class CountLayout:
    """A profile's columns as flat arrays, in the order of `profile.columns` (the score last)."""

    def __init__(self, profile: ReferenceProfile) -> None:
        columns = profile.columns
        self.profile: Final = profile
        self.columns: Final = columns
        self.width: Final = len(columns)
        self.digest: Final = bytes.fromhex(profile.digest().removeprefix("sha256:"))
        self.categorical: Final = np.array([c.kind == "categorical" for c in columns], np.uint8)
        self.keys: Final = np.array([key for c in columns for key in c.keys], np.float64)
        self.slots: Final = np.array([slot for c in columns for slot in _slots(c)], np.int64)
        self.key_starts: Final = _starts(len(c.keys) for c in columns)
        self.tally_starts: Final = _starts(_tallies(c) for c in columns)
        self.limits: Final = np.array([limit for c in columns for limit in _limits(c)], np.float64)


def _starts(sizes: Iterable[int]) -> NDArray[np.int64]:
    return np.cumsum([0, *sizes], dtype=np.int64)


def _slots(column: ColumnProfile) -> tuple[int, ...]:
    return column.slots if column.kind == "categorical" else (0,) * len(column.keys)


def _tallies(column: ColumnProfile) -> int:
    # A numeric column counts its edges; a categorical one its bins up to that of unknown codes.
    return len(column.keys) if column.kind == "numeric" else unknown_bin(column) + 1


def _limits(column: ColumnProfile) -> tuple[float, float]:
    # Codes have no range, and without a finite reference value nothing is out of it.
    if column.kind == "categorical" or column.low is None or column.high is None:
        return -np.inf, np.inf
    return column.low, column.high


@dataclass(frozen=True, slots=True)
class ColumnCounts:
    """One column's counts, read out: `bins` int64 as in the profile, missing last.

    `below` and `above` are finite values outside the reference's range, `new` codes never seen in
    it; `mean`, `deviation` (population), `low`, `high` are of finite values: None without any,
    or when a moment overflows.
    """

    bins: NDArray[np.int64]
    missing: int
    negative_infinite: int
    positive_infinite: int
    below: int
    above: int
    new: int
    stale: int
    defaulted: int
    mean: float | None
    deviation: float | None
    low: float | None
    high: float | None


class Counts:
    """How served rows fell into a layout's bins.  One thread at a time.

    `tallies`, `apart` (int64) and `moments` (float64) are flat, as the kernel writes them.
    """

    __slots__ = ("apart", "layout", "moments", "rows", "tallies")

    def __init__(self, layout: CountLayout) -> None:
        self.layout = layout
        self.rows = 0
        self.tallies = np.zeros(int(layout.tally_starts[-1]), np.int64)
        self.apart = np.zeros(layout.width * APART_WIDTH, np.int64)
        self.moments = np.zeros(layout.width * MOMENTS_WIDTH, np.float64)
        self.moments[LOW::MOMENTS_WIDTH] = np.inf
        self.moments[HIGH::MOMENTS_WIDTH] = -np.inf

    def add_rows(
        self,
        rows: NDArray[np.float64],
        *,
        kernels: CountKernels,
        flags: NDArray[np.uint8] | None = None,
    ) -> None:
        """Count float64 [n, width] rows, C-contiguous, the score in the last column.

        `flags` uint8 [n, width] marks stale (1) and defaulted (2) values.  70 ns per row of 20
        columns and 10 bins with native kernels, which leave the GIL free.
        """
        layout = self.layout
        scratch = np.empty(BLOCK_ROWS, np.float64)
        for start in range(0, len(rows), BLOCK_ROWS):
            block = rows[start : start + BLOCK_ROWS].reshape(-1)
            kernels.count_rows(
                block, layout.width, layout.categorical, layout.keys, layout.slots,
                layout.key_starts, layout.tally_starts, layout.limits,
                scratch, self.tallies, self.apart, self.moments,
            )  # fmt: skip
        if flags is not None:
            kernels.count_flags(flags.reshape(-1), layout.width, self.apart)
        self.rows += len(rows)

    def add(self, other: "Counts") -> None:
        """Merge another's counts of the same layout into this one."""
        if other.layout.digest != self.layout.digest:
            raise ValidationError("counts of two reference profiles can't be added")
        self._merge_moments(other)
        self.tallies += other.tallies
        self.apart += other.apart
        self.rows += other.rows

    def column(self, index: int) -> ColumnCounts:
        """Return column `index` (the score's is the last), its bins as differences of edges."""
        profile = self.layout.columns[index]
        apart = self.apart[index * APART_WIDTH :]
        bins = self._bins(index, profile, int(apart[MISSING]))
        finite = int(apart[FINITE])
        mean, squares, low, high = self.moments[index * MOMENTS_WIDTH :][:MOMENTS_WIDTH].tolist()
        is_shaped = finite > 0 and profile.kind == "numeric"
        return ColumnCounts(
            bins=bins,
            missing=int(apart[MISSING]),
            negative_infinite=int(apart[NEGATIVE_INFINITE]),
            positive_infinite=int(apart[POSITIVE_INFINITE]),
            below=int(apart[BELOW]),
            above=int(apart[ABOVE]),
            new=int(bins[-2]) if profile.kind == "categorical" else 0,
            stale=int(apart[STALE]),
            defaulted=int(apart[DEFAULTED]),
            mean=mean if is_shaped and math.isfinite(mean) else None,
            deviation=math.sqrt(squares / finite) if is_shaped and squares < math.inf else None,
            low=low if is_shaped else None,
            high=high if is_shaped else None,
        )

    def to_bytes(self) -> bytes:
        """Return the counts as bytes; docs/paths/monitor.md has the format."""
        sizes = (self.layout.width, len(self.tallies), self.rows)
        arrays = (self.tallies, self.apart, self.moments)
        header = _HEADER.pack(_MAGIC, *sizes, self.layout.digest)
        return header + b"".join(array.tobytes() for array in arrays)

    @classmethod
    def from_bytes(cls, data: bytes, layout: CountLayout) -> "Counts":
        """Return what `to_bytes` wrote; raises ValidationError if it belongs to another profile."""
        counts = cls(layout)
        arrays = (counts.tallies, counts.apart, counts.moments)
        whole = len(data) == _HEADER.size + sum(array.nbytes for array in arrays)
        if (
            not whole
            or data[:4] != _MAGIC
            or data[_HEADER.size - 32 : _HEADER.size] != layout.digest
        ):
            raise ValidationError(
                f"{len(data)} bytes are no counts of reference profile {layout.digest.hex()[:12]}",
                code="counts_format",
                hint="drop the stored bucket: it was written for another model version",
            )
        counts.rows = _HEADER.unpack_from(data)[3]
        offset = _HEADER.size
        for array in arrays:
            array[:] = np.frombuffer(data, array.dtype, len(array), offset)
            offset += array.nbytes
        return counts

    def _bins(self, index: int, profile: ColumnProfile, missing: int) -> NDArray[np.int64]:
        first, last = self.layout.tally_starts[index : index + 2]
        tallies = self.tallies[first:last]
        if profile.kind == "numeric":
            at_least = np.concatenate([[self.rows - missing], tallies, [0]])
            values = at_least[:-1] - at_least[1:]
        else:
            values = np.zeros(profile.bins - 1, np.int64)
            values[: len(tallies)] = tallies
        return np.append(values, missing)

    def _merge_moments(self, other: "Counts") -> None:
        ours, theirs = (counts.moments.reshape(-1, MOMENTS_WIDTH) for counts in (self, other))
        before = self.apart[FINITE::APART_WIDTH].astype(np.float64)
        added = other.apart[FINITE::APART_WIDTH].astype(np.float64)
        share = added / np.maximum(before + added, 1.0)
        with np.errstate(over="ignore", invalid="ignore"):  # as in the kernel
            delta = theirs[:, MEAN] - ours[:, MEAN]
            ours[:, MEAN] += delta * share
            ours[:, M2] += theirs[:, M2] + delta**2 * before * share
        ours[:, LOW] = np.minimum(ours[:, LOW], theirs[:, LOW])
        ours[:, HIGH] = np.maximum(ours[:, HIGH], theirs[:, HIGH])
