"""Work of several calls, written once for both clients: generators that yield what to do next.

They yield a Request (and get its answer, or its error thrown in) or a number of seconds to wait.
"""

import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeVar

from mlpd.client.requests import Request, get
from mlpd.core.errors import MlpdError, UnavailableError

T = TypeVar("T")
Steps = Generator[Request | float, Any, T]
Progress = Callable[[Mapping[str, Any]], None]
"""Called with the run whenever its state or progress has changed."""

FINISHED = ("succeeded", "failed", "cancelled")


def wait_run(
    run_id: str, on_progress: Progress | None, timeout_s: float, poll_s: float
) -> Steps[dict[str, Any]]:
    """Return a run once it has ended, however it ended."""
    deadline_s = time.monotonic() + timeout_s
    seen: Any = None
    while True:
        run: dict[str, Any] = yield get("v1", "runs", run_id)
        now = (run["state"], run["progress"])
        if on_progress is not None and now != seen:
            on_progress(run)
            seen = now
        if run["state"] in FINISHED:
            return run
        if time.monotonic() > deadline_s:
            raise UnavailableError(
                f"run {run_id} is still {run['state']} after {timeout_s:.0f} s",
                code="timeout",
                hint="It goes on; wait again, or cancel it.",
            )
        yield poll_s


def wait_ready(timeout_s: float, poll_s: float) -> Steps[None]:
    """Return once the daemon is ready; raises the last error after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            # Not repeatable: this loop is the retry.
            yield Request("GET", "/readyz", repeatable=False)
        except MlpdError as error:
            if error.status != UnavailableError.status or time.monotonic() > deadline_s:
                raise
            yield poll_s
        else:
            return
