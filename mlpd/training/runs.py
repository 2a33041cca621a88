"""Runs: the record of a training run and the changes of state that it may make; pure."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgpack

from mlpd.core.errors import ConflictError

ATTEMPTS_MAX = 3
"""A run lost with the daemon or its child is tried this often; a failed one is not repeated."""


class RunState(StrEnum):
    """Where a run stands.

    queued -> running -> succeeded | failed | cancelled; a run found running at start was lost: it
    goes back to queued, or to failed after `ATTEMPTS_MAX` attempts.
    """

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen."""
        return self not in (RunState.QUEUED, RunState.RUNNING)


_ALLOWED = {
    RunState.QUEUED: (RunState.RUNNING, RunState.CANCELLED, RunState.FAILED),
    RunState.RUNNING: (
        *(RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED),
        RunState.QUEUED,
    ),
}


@dataclass(frozen=True, slots=True)
class Run:
    """One training run, immutable: a change makes the next record.

    `trigger`: who or what asked.  `interval`: start and end of the schedule's data interval, or
    None.  `deploy`: `none`, or `champion` to move the alias when the gate passes.  `progress`: the
    last step told.  `result`: model, version, metrics, gate report.  `error`: code and message.
    Times are microseconds UTC.
    """

    run_id: str
    job: str
    deploy: str
    trigger: str
    created_us: int
    interval: tuple[int, int] | None = None
    state: RunState = RunState.QUEUED
    attempt: int = 1
    started_us: int | None = None
    finished_us: int | None = None
    progress: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `from_dict` takes them back."""
        return dataclasses.asdict(self) | {"state": str(self.state)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Run":
        """Return the run of plain values."""
        interval = values["interval"]
        changes = {
            "state": RunState(values["state"]),
            "interval": None if interval is None else tuple(interval),
        }
        return cls(**{**values, **changes})

    def encode(self) -> bytes:
        """Return the stored form."""
        packed: bytes = msgpack.packb(self.to_dict())
        return packed

    @classmethod
    def decode(cls, value: bytes) -> "Run":
        """Return the run that `encode` wrote."""
        return cls.from_dict(msgpack.unpackb(value))

    def move(self, state: RunState, **changes: Any) -> "Run":
        """Return the run in `state`; raises ConflictError(code="run_finished") if it can't."""
        if state not in _ALLOWED.get(self.state, ()):
            raise ConflictError(
                f"run {self.run_id} is {self.state} and can't become {state}",
                code="run_finished",
                hint="mlpd runs show tells how it ended; start a new one.",
            )
        return dataclasses.replace(self, state=state, **changes)

    def recover(self, now_us: int) -> "Run":
        """Return what becomes of a run that was running when the daemon ended."""
        if self.attempt >= ATTEMPTS_MAX:
            error = {"code": "run_lost", "message": f"lost {self.attempt} times with the daemon"}
            return self.move(RunState.FAILED, finished_us=now_us, error=error)
        return self.move(RunState.QUEUED, attempt=self.attempt + 1, progress={})


def gate_report(gate: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, Any]:
    """Return whether `metrics` reach the least values in `gate`, check by check.

    A metric that the evaluation lacks fails its check.  log_loss, brier, rmse and mae are bounded
    from above, the others from below.
    """
    checks = []
    for name, bound in sorted(gate.items()):
        value = metrics.get(name)
        at_most = name in ("log_loss", "brier", "rmse", "mae")
        passed = value is not None and (value <= bound if at_most else value >= bound)
        checks.append({"metric": name, "bound": bound, "value": value, "passed": passed})
    return {"passed": all(check["passed"] for check in checks), "checks": checks}
