"""Trials: how far a canary has come, and what its next look makes of it; pure values."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from mlpd.serving.canary import Canary, Moments, Step, Tally, find_failure

State = Literal["running", "finished", "rolled_back", "stopped"]
Decision = Literal["wait", "advance", "finish", "fail"]


@dataclass(frozen=True, slots=True)
class Trial:
    """One canary at work, or how the last one ended.

    `reference`: the version that is tried.  `weights`: of all arms before it.  `step` counts from
    0.  `elapsed_us`: how long the daemon has served at this step.  `arm`, `others`: what happened
    meanwhile.  `why`: what ended it.  Times are of the wall clock.
    """

    canary: Canary
    reference: str
    weights: Mapping[str, float]
    started_us: int
    entered_us: int
    step: int = 0
    elapsed_us: int = 0
    arm: Tally = field(default_factory=Tally)
    others: Tally = field(default_factory=Tally)
    state: State = "running"
    why: str = ""
    ended_us: int | None = None

    @property
    def is_running(self) -> bool:
        """Whether it still moves weights."""
        return self.state == "running"

    @property
    def now(self) -> Step:
        """The step it is at, or ended at."""
        return self.canary.steps[self.step]

    def decide(self) -> tuple[Decision, str]:
        """Return what is to be done, and why, or what it waits for."""
        failure = find_failure(self.canary.guard, self.arm, self.others)
        if failure is not None:
            return "fail", failure
        step, is_last = self.now, self.step + 1 == len(self.canary.steps)
        if self.elapsed_us < step.hold_us:
            return "wait", "time"
        if self.arm.rows < step.rows:
            return "wait", "rows"
        return ("finish", "the last step is over") if is_last else ("advance", "")

    def advanced(self, now_us: int) -> "Trial":
        """Return the next step's beginning."""
        fresh = Tally()
        start = replace(self, step=self.step + 1, entered_us=now_us, elapsed_us=0)
        return replace(start, arm=fresh, others=fresh)

    def ended(self, state: State, why: str, now_us: int) -> "Trial":
        """Return how it ended."""
        return replace(self, state=state, why=why, ended_us=now_us)

    def encode(self) -> dict[str, Any]:
        """Return msgpack values for `decode`."""
        return {**asdict(self), "canary": self.canary.to_dict()}

    @classmethod
    def decode(cls, fields: Mapping[str, Any]) -> "Trial":
        """Return the trial that `encode` gave."""
        parts = {name: _tally(fields[name]) for name in ("arm", "others")}
        return cls(**{**fields, **parts, "canary": Canary.from_dict(fields["canary"])})


def _tally(fields: Mapping[str, Any]) -> Tally:
    moments = {name: Moments(**fields[name]) for name in ("request_us", "score")}
    return Tally(**{**fields, **moments})
