"""Tables of rows to be sent: mappings, columns by name, or a polars frame; split alike."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mlpd.client import requests as r


class Table:
    """Rows in the form in which they were given; what is taken has the same form."""

    def __init__(self, data: r.Data) -> None:
        self._frame: Any = data if r.is_frame(data) else None
        self.data: Any = data if r.is_frame(data) else r.plain_table(data)

    def __len__(self) -> int:
        if isinstance(self.data, Mapping):
            return len(next(iter(self.data.values()), ()))
        return len(self.data)

    def columns(self, names: Iterable[str]) -> dict[str, Sequence[Any]]:
        """Return columns as lists; those that aren't there are left out, absent values are None."""
        if self._frame is not None:
            return {n: self._frame[n].to_list() for n in names if n in self._frame.columns}
        if isinstance(self.data, Mapping):
            return {name: [*map(_plain, self.data[name])] for name in names if name in self.data}
        return {name: [_plain(_value(row, name)) for row in self.data] for name in names}

    def take(self, rows: Sequence[int]) -> r.Data:
        """Return the rows at places, in their order."""
        if self._frame is not None:
            return self._frame[list(rows)]
        if isinstance(self.data, Mapping):
            return {name: [values[i] for i in rows] for name, values in self.data.items()}
        return [self.data[i] for i in rows]


def _plain(value: Any) -> Any:
    """Return a value of a key as its daemon will see it: of Python's own types."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str):  # of an enum, say
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    return bytes(value) if isinstance(value, bytes | bytearray | memoryview) else value


_PLAIN = frozenset((str, int, bool, float, bytes, type(None)))


def _value(row: Any, name: str) -> Any:
    return row.get(name) if isinstance(row, Mapping) else None
