"""Runs: the record of a training run and the changes of state that it may make; pure."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgpack

from mlpd.core.deploys import SHADOW, canary_share
from mlpd.core.errors import ConflictError
from mlpd.core.time import SECOND_US

ATTEMPTS_MAX = 3
"""A run lost with the daemon or its child is tried this often; a failed one is not repeated."""


RETRY_WAIT_US = 2 * SECOND_US
"""About how long the second attempt waits; the third four times as long, each half more or less."""


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
    None.  `deploy`: a step as `deploys.check_deploy` reads it.  `progress`: the last step told.
    `result`: model, version, metrics, gate report, what is deployed.  `error`: code and message.
    `not_before_us`: when the next attempt may begin, at the earliest.  `key`: of schedule, interval
    and definition: no two runs are queued by a schedule with one key; empty for runs by hand.
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
    not_before_us: int = 0
    key: str = ""

    @property
    def awaits_canary(self) -> bool:
        """Whether its version passed and is to get a share of the champion's routes."""
        result = self.result
        if result is None or canary_share(self.deploy) is None or "routes" in result:
            return False
        return bool(result["gate"]["passed"] and result["deployed"] == SHADOW)

    @property
    def is_undecided(self) -> bool:
        """Whether something of its version is left to do."""
        waiting = self.result is not None and self.result["gate"].get("waiting", False)
        return bool(waiting) or self.awaits_canary

    @property
    def is_open(self) -> bool:
        """Whether something is left to do of the run or of its version."""
        return self.is_undecided or not self.state.finished

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

    def recover(self, now_us: int, chance: float, cause: str) -> "Run":
        """Return what becomes of a run whose daemon or child ended under it, by what `cause`.

        `chance` in [0, 1) spreads attempts: what ended them may have been too many at once.
        """
        if self.attempt >= ATTEMPTS_MAX:
            error = {
                "code": "run_lost",
                "message": f"lost {self.attempt} times; the last time {cause}",
                "hint": "mlpd runs log tells how far it came. A child that ends without an answer "
                "often lacks memory: raise [training] memory_bytes_max, or train on fewer rows.",
            }
            return self.move(RunState.FAILED, finished_us=now_us, error=error)
        wait_us = int(RETRY_WAIT_US * 4 ** (self.attempt - 1) * (0.5 + chance))
        changes = {"attempt": self.attempt + 1, "progress": {}, "not_before_us": now_us + wait_us}
        return self.move(RunState.QUEUED, **changes)

    def wait_us(self, now_us: int) -> int:
        """Return how long the next attempt has to wait, 0 for none.

        More than any attempt waits means that the clock was put back: then it waits no longer.
        """
        wait_us = self.not_before_us - now_us
        return wait_us if 0 < wait_us <= RETRY_WAIT_US * 4**ATTEMPTS_MAX else 0
