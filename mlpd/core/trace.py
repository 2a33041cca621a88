"""Traces: W3C `traceparent` in and out, and where the time of the request under way went.

Format: https://www.w3.org/TR/trace-context/.  The span of a request travels in a context variable,
so that logs of whatever the request calls, in threads too, carry its ids.

    >>> span = Span.begin("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    >>> span.trace_id, span.is_sampled
    ('0af7651916cd43dd8448eb211c80319c', True)
"""

import random
import re
import time
from contextvars import ContextVar
from typing import Final, Self

TRACEPARENT: Final = "traceparent"
STEPS_MAX: Final = 32
"""Steps that one request keeps; a loop can't make a span grow."""

# A version above 00 may bring more fields, which are passed over; ff is no version.
_FORM = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_NO_TRACE, _NO_SPAN = "0" * 32, "0" * 16
_random = random.Random()  # noqa: S311 - ids need to differ, not to be secret


class Span:
    """One request: its place in a trace, if it came with one, and the ends of its steps.

    `trace_id`, `span_id`, `parent_id`: 32 and 16 hex digits, empty outside of a trace.  `method`
    is the request's.
    """

    __slots__ = ("flags", "method", "parent_id", "span_id", "started_s", "steps", "trace_id")

    def __init__(
        self, trace_id: str = "", span_id: str = "", flags: str = "00", parent_id: str = ""
    ) -> None:
        self.trace_id = trace_id
        self.span_id = span_id
        self.flags = flags
        self.parent_id = parent_id
        self.method = ""
        self.started_s = time.perf_counter()
        self.steps: list[tuple[str, float]] = []
        """Name and end, by `time.perf_counter`, of each step."""

    @classmethod
    def begin(cls, traceparent: str | None) -> Self:
        """Return the span of a request with this header; a malformed one counts as none.

        0.3 us without a header, 2 us with one.
        """
        found = None if traceparent is None else _FORM.fullmatch(traceparent)
        if found is None:
            return cls()
        version, trace_id, parent, flags, more = found.groups()
        if trace_id == _NO_TRACE or parent == _NO_SPAN or (version == "00" and more):
            return cls()
        return cls(trace_id, new_span_id(), flags, parent)

    @property
    def is_sampled(self) -> bool:
        """Whether whoever began the trace records it."""
        return bool(int(self.flags, 16) & 1)

    @property
    def traceparent(self) -> str:
        """The header that passes this span on as the parent; empty outside of a trace."""
        if not self.trace_id:
            return ""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.is_sampled else '00'}"

    def end_step(self, name: str) -> None:
        """Note that what the request did since its last step's end was `name`.  0.1 us."""
        if len(self.steps) < STEPS_MAX:
            self.steps.append((name, time.perf_counter()))

    def steps_ms(self) -> dict[str, float]:
        """Return the time of each step in ms; of several of one name the sum."""
        found: dict[str, float] = {}
        before_s = self.started_s
        for name, at_s in self.steps:
            found[name] = found.get(name, 0.0) + 1e3 * (at_s - before_s)
            before_s = at_s
        return {name: round(ms, 3) for name, ms in found.items()}


def new_span_id() -> str:
    """Return 16 hex digits, not all 0."""
    return f"{_random.getrandbits(64) or 1:016x}"


_current: ContextVar[Span | None] = ContextVar("mlpd_span", default=None)


def set_span(span: Span) -> None:
    """Make `span` the one of this task, and of the threads and tasks that it starts."""
    _current.set(span)


def get_span() -> Span | None:
    """Return the span of the request that this code runs for, if it does for one."""
    return _current.get()


def end_step(name: str) -> None:
    """Note the end of a step of the request under way; nothing outside of one.  0.15 us."""
    span = _current.get()
    if span is not None:
        span.end_step(name)
