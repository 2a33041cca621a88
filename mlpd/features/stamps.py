"""Stamps of events: when they happened, when they became known, their place in the log."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlpd.storage.segments import EVENT_TIME, KNOWN_TIME, SEQUENCE

if TYPE_CHECKING:
    import polars as pl


class Stamps(NamedTuple):
    """Three int64 arrays of equal length, one element per event; times in microseconds UTC.

    The winner among an entity's events is the largest (event_us, known_us, sequences).
    """

    event_us: NDArray[np.int64]
    known_us: NDArray[np.int64]
    sequences: NDArray[np.int64]

    def take(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> "Stamps":
        """Return the stamps that `index` selects."""
        return Stamps(self.event_us[index], self.known_us[index], self.sequences[index])


def stamps_of(frame: "pl.DataFrame") -> Stamps:
    """Return the stamps of a frame of events."""
    return Stamps(*(frame[name].to_numpy() for name in (EVENT_TIME, KNOWN_TIME, SEQUENCE)))
