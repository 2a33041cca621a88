"""Traceparent after W3C, the steps of a request, and the context that carries both."""

import asyncio
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.trace import STEPS_MAX, Span, end_step, get_span, set_span

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    "header",
    [
        f"00-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-ff",
        f"01-{TRACE}-{PARENT}-01-what-the-future-brings",
        f"fe-{TRACE}-{PARENT}-01",
    ],
)
def test_a_request_joins_the_trace_with_a_span_of_its_own(header: str) -> None:
    span = Span.begin(header)
    assert span.trace_id == TRACE
    assert re.fullmatch("[0-9a-f]{16}", span.span_id)
    assert span.span_id != PARENT
    assert span.is_sampled
    assert span.traceparent == f"00-{TRACE}-{span.span_id}-01"
    assert Span.begin(header).span_id != span.span_id


def test_what_is_not_recorded_is_passed_on_so() -> None:
    span = Span.begin(f"00-{TRACE}-{PARENT}-00")
    assert not span.is_sampled
    assert span.traceparent.endswith("-00")


@pytest.mark.parametrize(
    "header",
    [
        *(None, "", "00", f"00-{TRACE}-{PARENT}", f"ff-{TRACE}-{PARENT}-01"),
        *(f"00-{TRACE}-{PARENT}-01-more", f"00-{TRACE.upper()}-{PARENT}-01"),
        *(f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01", f" 00-{TRACE}-{PARENT}-01"),
        *(f"00-{TRACE}-{PARENT}-01\n", f"00-{TRACE[:-1]}-{PARENT}-01", f"00-{TRACE}-{PARENT}-0g"),
    ],
)
def test_anything_else_counts_as_no_trace(header: str | None) -> None:
    span = Span.begin(header)
    assert (span.trace_id, span.traceparent, span.is_sampled) == ("", "", False)


@given(st.text(max_size=80))
def test_no_header_breaks_a_request(header: str) -> None:
    assert len(Span.begin(header).traceparent) in (0, 55)


def test_steps_add_up_to_the_time_between_their_ends() -> None:
    span = Span()
    span.end_step("body")
    time.sleep(0.01)
    span.end_step("model")
    span.end_step("body")
    steps = span.steps_ms()
    assert list(steps) == ["body", "model"]
    assert steps["model"] >= 10.0
    assert sum(steps.values()) <= 1e3 * (time.perf_counter() - span.started_s) + 0.01


def test_a_span_does_not_grow_without_end() -> None:
    span = Span()
    for _ in range(1000):
        span.end_step("again")
    assert len(span.steps) == STEPS_MAX


async def test_threads_and_tasks_of_a_request_see_its_span_and_no_other() -> None:
    async def request(span: Span) -> None:
        set_span(span)
        await asyncio.sleep(0)
        assert get_span() is span
        assert await asyncio.to_thread(get_span) is span
        assert await asyncio.create_task(asyncio.to_thread(get_span)) is span
        end_step("mine")
        assert list(span.steps_ms()) == ["mine"]

    async with asyncio.TaskGroup() as group:
        for _ in range(5):
            group.create_task(request(Span()))
    assert get_span() is None
    end_step("nobody's")  # outside of a request: nothing
