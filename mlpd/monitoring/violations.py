"""What did not fit its source's schema: counted by code, with a few masked samples of each source.

A sample says which columns a refused row had and what form their values had, never what they were.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final, NamedTuple

from mlpd.core.time import format_time

SAMPLES_MAX: Final = 20
"""Newest samples kept of each source: a few kB."""

COLUMNS_MAX: Final = 50
"""Columns of one sample; a schema may have more."""

REDACTED: Final = "redacted"


class Sample(NamedTuple):
    """A refused row: why, and the form of each value by column."""

    code: str
    row: Mapping[str, str]


@dataclass(slots=True)
class _Source:
    rows: dict[str, int] = field(default_factory=dict)
    requests: dict[str, int] = field(default_factory=dict)
    samples: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=SAMPLES_MAX))


class Violations:
    """Counts and samples since the start, by source.  The loop alone.

    `redact`: patterns of columns of which nothing is kept, not even the form.
    """

    def __init__(self, redact: Iterable[str] = ()) -> None:
        self._redact = tuple(redact)
        self._sources: dict[str, _Source] = {}

    def note_rows(
        self, source: str, codes: Iterable[str], samples: Iterable[Sample], now_us: int
    ) -> None:
        """Note refused rows of one batch by code, with samples of some of them."""
        found = self._sources.setdefault(source, _Source())
        for code in codes:
            found.rows[code] = found.rows.get(code, 0) + 1
        for sample in samples:
            row = dict(list(sample.row.items())[:COLUMNS_MAX])
            shown = {name: REDACTED if self._hides(name) else v for name, v in row.items()}
            found.samples.append({"at": format_time(now_us), "code": sample.code, "row": shown})

    def note_request(self, source: str, code: str) -> None:
        """Note a request of which no row was taken: an unknown column, a body that is no table."""
        requests = self._sources.setdefault(source, _Source()).requests
        requests[code] = requests.get(code, 0) + 1

    def rows(self) -> dict[tuple[str, str], int]:
        """Return how many rows were refused, by source and code."""
        return {
            (source, code): count
            for source, found in list(self._sources.items())
            for code, count in list(found.rows.items())
        }

    def describe(self, source: str) -> dict[str, Any]:
        """Return counts by code, and samples, the newest first."""
        found = self._sources.get(source) or _Source()
        return {
            "rows_by_code": dict(found.rows),
            "requests_by_code": dict(found.requests),
            "samples": list(reversed(found.samples)),
        }

    def _hides(self, column: str) -> bool:
        return any(fnmatchcase(column, pattern) for pattern in self._redact)
