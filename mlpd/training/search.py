"""Searches parameters with Optuna: bounded, pruned, and resumed where it was killed.

Every trial is a function of the seed and of the trials that ended before it: the sampler is made
anew for each.  So a search that was killed and resumed tries what one in one go would have tried.
The trials lie in a journal, a line each step; child processes only, one at a time.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpd.core.errors import UnavailableError
from mlpd.core.specs import SearchRange, SearchSpec

REPORT_ROUNDS = 10
"""Rounds between two looks at whether a trial is behind; a look writes a line, about 1 ms."""

_STARTUP_TRIALS = 5
"""Trials that are never given up: what the others are compared with."""

_REJECTED = float("-inf")

Watch = Callable[[int, float], bool]
"""Told a round and the merit so far; returns whether to give the trial up."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one trial gave: `merit` (larger is better), after how many rounds."""

    merit: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial that ended; `merit` is None where it was `pruned`."""

    number: int
    state: str
    params: Mapping[str, Any]
    merit: float | None
    rounds: int
    took_s: float

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "number": self.number,
            "state": self.state,
            "params": dict(self.params),
            "merit": self.merit,
            "rounds": self.rounds,
            "took_s": self.took_s,
        }


def check_search() -> None:
    """Raise UnavailableError(code="missing_extra") unless Optuna is installed."""
    if importlib.util.find_spec("optuna") is None:
        raise UnavailableError(
            "the job searches parameters, which needs the package optuna",
            code="missing_extra",
            hint="pip install 'mlpd[search]'",
        )


class Search:
    """The search of one run, in the journal at `path`.

    `name` must tell apart whatever makes trials comparable: another name begins anew.  Constructing
    imports Optuna, which takes a second; a journal that was cut off mid-line is mended.
    """

    def __init__(self, path: Path, spec: SearchSpec, *, name: str, seed: int) -> None:
        check_search()
        import optuna  # noqa: PLC0415 - an extra, and slow to import

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        _mend(path)
        self._optuna = optuna
        self._spec = spec
        self._seed = seed
        self._study = optuna.create_study(
            storage=_storage(path),
            study_name=name,
            direction="maximize",
            load_if_exists=True,
            pruner=self._pruner(),
        )
        for trial in self._study.get_trials(deepcopy=False):
            if not trial.state.is_finished():  # it died with its process
                self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)

    @property
    def trials(self) -> list[Trial]:
        """The trials that ended, in their order."""
        return list(self._ended())

    @property
    def best(self) -> Trial | None:
        """The trial with the largest merit, the first of equals; None before one was whole."""
        whole = [trial for trial in self._ended() if trial.merit is not None]
        return max(whole, key=lambda trial: trial.merit or _REJECTED, default=None)

    def run(
        self,
        evaluate: Callable[[Mapping[str, Any], Watch], Outcome],
        tell: Callable[[list[Trial]], None],
    ) -> list[Trial]:
        """Carry out what is left of the search and return all trials that ended.

        `evaluate` trains with parameters, telling its watch; what it raises ends the search.
        `tell` hears of the trials after each.
        """
        while not self._is_over(found := self.trials):
            tell(found)
            self._study.sampler = self._optuna.samplers.TPESampler(seed=self._seed + len(found))
            trial = self._study.ask()
            params = {name: _suggest(trial, name, of) for name, of in self._spec.space.items()}
            outcome = evaluate(params, self._watch(trial))
            self._finish(trial, outcome)
        return found

    def _is_over(self, found: list[Trial]) -> bool:
        limit_us = self._spec.timeout_us
        spent_us = sum(trial.took_s for trial in found) * 1e6
        enough = len(found) >= self._spec.trials
        return enough or (limit_us is not None and spent_us >= limit_us and self.best is not None)

    def _watch(self, trial: Any) -> Watch:
        def is_behind(round_: int, merit: float) -> bool:
            if not self._spec.prune or round_ % REPORT_ROUNDS:
                return False
            trial.report(merit, round_)
            behind: bool = trial.should_prune()
            if behind:
                trial.set_user_attr("pruned", True)
            return behind

        return is_behind

    def _finish(self, trial: Any, outcome: Outcome) -> None:
        trial.set_user_attr("rounds", outcome.rounds)
        if trial.user_attrs.get("pruned"):
            self._study.tell(trial, state=self._optuna.trial.TrialState.PRUNED)
        else:
            self._study.tell(trial, outcome.merit)

    def _ended(self) -> Iterator[Trial]:
        states = self._optuna.trial.TrialState
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state not in (states.COMPLETE, states.PRUNED):
                continue
            pruned = trial.state is states.PRUNED
            yield Trial(
                number=trial.number,
                state="pruned" if pruned else "complete",
                params=dict(trial.params),
                merit=None if pruned else trial.value,
                rounds=trial.user_attrs.get("rounds", 0),
                took_s=trial.duration.total_seconds(),
            )

    def _pruner(self) -> Any:
        pruners = self._optuna.pruners
        if not self._spec.prune:
            return pruners.NopPruner()
        return pruners.MedianPruner(n_startup_trials=_STARTUP_TRIALS, n_warmup_steps=REPORT_ROUNDS)


def _suggest(trial: Any, name: str, of: SearchRange | tuple[Any, ...]) -> Any:
    if isinstance(of, tuple):
        return trial.suggest_categorical(name, list(of))
    if of.whole:
        return trial.suggest_int(name, of.low, of.high, log=of.log)
    return trial.suggest_float(name, of.low, of.high, log=of.log)


def _storage(path: Path) -> Any:
    from optuna.storages import JournalStorage  # noqa: PLC0415 - an extra
    from optuna.storages.journal import JournalFileBackend  # noqa: PLC0415

    return JournalStorage(JournalFileBackend(str(path), lock_obj=_Alone()))


class _Alone:
    """No lock: a run has one child at a time, and a killed one would leave its lock behind."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        return None


def _mend(path: Path) -> None:
    """Cut off the line that a killed process did not finish: Optuna would append to it."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
