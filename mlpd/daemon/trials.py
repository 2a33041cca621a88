"""Trials of canaries, as the loop keeps them: requests are counted here, a look decides on them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.time import format_time
from mlpd.serving.canary import mean_ratio
from mlpd.serving.trial import Trial

PASSED_US_MAX = 5_000_000
"""Most time between two looks that counts: a machine that slept has not served meanwhile."""


class Trials:
    """The last trial of each route that had one; every method belongs to the loop."""

    def __init__(self) -> None:
        self._all: dict[str, Trial] = {}
        self._running: set[str] = set()
        self._changed: set[str] = set()
        self.ended = {"finished": 0, "rolled_back": 0, "stopped": 0}
        """Trials that ended since the start, by how."""

    def restore(self, trials: Mapping[str, Trial]) -> None:
        """Take up what was stored."""
        for name, trial in trials.items():
            self._all[name] = trial
            if trial.is_running:
                self._running.add(name)

    def get(self, name: str) -> Trial | None:
        """Return a route's last trial."""
        return self._all.get(name)

    def running(self) -> list[str]:
        """Return the routes whose canary is at work."""
        return sorted(self._running)

    def set(self, name: str, trial: Trial | None) -> None:
        """Replace a route's trial."""
        if name in self._running and trial is not None and not trial.is_running:
            self.ended[trial.state] += 1
        self._running.discard(name)
        self._changed.discard(name)
        if trial is None:
            self._all.pop(name, None)
            return
        self._all[name] = trial
        if trial.is_running:
            self._running.add(name)

    def answered(
        self, route: str, arm: str, request_us: float, scores: NDArray[np.float64]
    ) -> None:
        """Count a request that an arm answered; 0.1 us without a canary, 15 us with one."""
        if route not in self._running:
            return
        trial = self._all[route]
        if arm == trial.canary.arm:
            trial = replace(trial, arm=trial.arm.answered(request_us, scores))
        else:
            trial = replace(trial, others=trial.others.answered(request_us, scores))
        self._all[route] = trial
        self._changed.add(route)

    def failed(self, route: str, arm: str, rows: int) -> None:
        """Count rows that an arm's model could not answer, or not in time."""
        if route not in self._running:
            return
        trial = self._all[route]
        if arm == trial.canary.arm:
            trial = replace(trial, arm=trial.arm.with_failed(rows))
        else:
            trial = replace(trial, others=trial.others.with_failed(rows))
        self._all[route] = trial
        self._changed.add(route)

    def pass_time(self, passed_us: int) -> None:
        """Add time in which the daemon served."""
        for name in self._running:
            trial = self._all[name]
            passed = min(max(passed_us, 0), PASSED_US_MAX)
            self._all[name] = replace(trial, elapsed_us=trial.elapsed_us + passed)
            self._changed.add(name)

    def take_changed(self) -> dict[str, Trial]:
        """Return the running trials that moved since the last call, to be stored."""
        changed, self._changed = self._changed & self._running, set()
        return {name: self._all[name] for name in changed}


def show_trial(trial: Trial) -> dict[str, Any]:
    """Return what people see of a trial; steps count from 1."""
    step, arm, others = trial.now, trial.arm, trial.others
    return {
        "state": trial.state,
        "arm": trial.canary.arm,
        "model": trial.reference,
        "step": trial.step + 1,
        "steps": len(trial.canary.steps),
        "share": step.share,
        "served_s": trial.elapsed_us / 1e6,
        "hold_s": step.hold_us / 1e6,
        "rows": arm.rows,
        "rows_wanted": step.rows,
        "rows_failed": arm.failed,
        "rows_of_others": others.rows,
        "rows_of_others_failed": others.failed,
        "time_ratio": _finite(mean_ratio(arm.request_us, others.request_us)),
        "score_shift": _finite(arm.score.mean - others.score.mean),
        "waits_for": trial.decide()[1] if trial.is_running else None,
        "why": trial.why or None,
        "started": format_time(trial.started_us),
        "entered": format_time(trial.entered_us),
        "ended": None if trial.ended_us is None else format_time(trial.ended_us),
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
