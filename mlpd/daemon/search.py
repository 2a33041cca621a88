"""The search of a run, in its child: trials on the training rows, judged on the validation rows.

What a killed attempt left in the run's folder is taken up: its trials, and the moment that its data
is of, without which they could not be compared.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlpd.core.hashing import definition_hash
from mlpd.core.specs import SearchSpec
from mlpd.daemon.fit import Recipe
from mlpd.daemon.training_set import TrainingSet, Vectors
from mlpd.training.backend import canonical_params
from mlpd.training.search import Outcome, Search, Trial, Watch
from mlpd.training.trainer import Progress, train

JOURNAL, MOMENT = "search.journal", "search.json"


def pin_moment(folder: Path, moment: Mapping[str, int]) -> dict[str, int]:
    """Return the moment that the run's first attempt was of; this one's, if it is the first."""
    path = folder / MOMENT
    if path.exists():
        known: dict[str, int] = json.loads(path.read_bytes())
        return known
    waiting = path.with_suffix(".tmp")
    waiting.write_text(json.dumps(moment), encoding="utf-8")
    waiting.rename(path)
    return dict(moment)


def search(
    spec: SearchSpec,
    data: TrainingSet,
    vectors: Vectors,
    recipe: Recipe,
    folder: Path,
    tell: Callable[[list[Trial], Progress | None], None],
) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe with the best parameters found, and what was tried as JSON.

    `tell` hears of the trials that ended, and of each round of the one under way.
    """
    canonical_params(dict.fromkeys(spec.space))  # an unknown name ends it now, not later
    named = [data.digest, vectors.digest, dict(recipe.params), dataclasses.asdict(spec)]
    found = Search(
        folder / JOURNAL,
        spec,
        name=definition_hash(named),
        seed=int(recipe.params.get("seed", 0)),
    )
    taken_up = len(found.trials)

    def evaluate(params: Mapping[str, Any], watch: Watch) -> Outcome:
        return _try(vectors, recipe.with_params(params), found.trials, watch, tell)

    trials = found.run(evaluate, lambda ended: tell(ended, None))
    best = found.best
    assert best is not None  # the first trial is never pruned
    report = {
        "trials": [trial.to_dict() for trial in trials],
        "best": best.number,
        "params": dict(best.params),
        "taken_up": taken_up,
    }
    return recipe.with_params(best.params), report


def _try(
    vectors: Vectors,
    recipe: Recipe,
    ended: list[Trial],
    watch: Watch,
    tell: Callable[[list[Trial], Progress | None], None],
) -> Outcome:
    last: list[Progress] = []

    def on_progress(progress: Progress) -> None:
        last[:] = [progress]
        tell(ended, progress)

    model = train(
        vectors.sets["train"],
        vectors.sets["valid"],
        params=recipe.params,
        num_boost_round=recipe.num_boost_round,
        early_stopping_rounds=recipe.early_stopping_rounds,
        categorical=list(vectors.vectorizer.categorical),
        on_progress=on_progress,
        should_stop=lambda: watch(last[0].round, last[0].merit),
    )
    return Outcome(model.merit, last[0].round)
