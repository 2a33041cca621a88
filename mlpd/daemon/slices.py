"""Slices of served rows: what a key, request field or feature of each row is called."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.vector import Vectorizer
from mlpd.monitoring.reference import ReferenceProfile, bin_index
from mlpd.monitoring.svg import bin_labels

NULL = "(null)"


@dataclass(frozen=True, slots=True)
class SliceReader:
    """Names the slice of rows of one model version.

    A key or request field goes by its value; a categorical feature by its category, with NaN as
    null or unseen; a number by its bin in the reference profile.
    """

    name: str
    vectorizer: Vectorizer
    profile: ReferenceProfile

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "SliceReader":
        """Return the reader of {"name", "encoder", "profile"}."""
        profile = ReferenceProfile.from_dict(document["profile"])
        return cls(document["name"], Vectorizer.from_dict(document["encoder"]), profile)

    def read(
        self, given: Sequence[Mapping[str, Any]], vectors: Sequence[bytes]
    ) -> list[str] | None:
        """Return the slice of each row; None if rows of this version have nothing of that name."""
        if any(self.name in row for row in given):
            return [_text(row.get(self.name)) for row in given]
        if self.name not in self.vectorizer.names:
            return None
        index = self.vectorizer.names.index(self.name)
        values = np.frombuffer(b"".join(vectors), np.float64).reshape(len(vectors), -1)[:, index]
        return self._of_feature(index, values)

    def _of_feature(self, index: int, values: NDArray[np.float64]) -> list[str]:
        encoder = self.vectorizer.features[index].encoder
        if encoder is not None:
            names = [str(category) for category in encoder.categories]
            return [NULL if code != code else names[int(code)] for code in values.tolist()]  # noqa: PLR0124
        column = self.profile.features[index]
        labels = bin_labels(column)
        return [labels[i] for i in bin_index(column, values).tolist()]


def _text(value: Any) -> str:
    return NULL if value is None else str(value)
