"""Scenario monitoring: drift of the same rows by mlpd, Evidently and NannyML; whylogs counts."""

import json
import math
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from bench.drift import FEATURES, KERNELS, ROWS, Rows, timed
from bench.options import Options, SkippedError
from bench.peers import FOLDER, python_of, version_of
from bench.turns import Case, in_turns
from mlpd.core.kernels import load_kernels
from mlpd.monitoring.counting import CountLayout, Counts
from mlpd.monitoring.drift import report
from mlpd.monitoring.reference import ReferenceProfile, build_reference

Ask = Callable[[int], Mapping[str, float]]
NAMES: Final = [f"f{i}" for i in range(FEATURES)]


def monitoring(options: Options) -> dict[str, Case]:
    """Drift of 100,000 x 20 live rows against as many reference rows.

    Ours makes the whole report (PSI with its p-value, Jensen-Shannon, Wasserstein, missing and
    unseen shares) of counted rows: `from scratch` it builds the reference's profile first, else it
    has that, as every model version does.  Evidently has no profiles: its report is the same in
    both.  Peers have their rows as pandas frames already, and are warm.  whylogs only profiles the
    live rows.
    """
    rng = np.random.default_rng(1)
    reference, live = rng.normal(size=(ROWS, FEATURES)), rng.normal(0.1, 1.1, (ROWS, FEATURES))
    sides = Sides(reference, live)
    found: dict[str, Case] = {}
    missing: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.npz"
        np.savez(rows, reference=reference, live=live)
        for peer, questions in PEERS.items():
            try:
                python = python_of(peer, options.peers)
            except SkippedError as error:
                missing.append(str(error))
                continue
            version = version_of(peer, python)
            with _asking(python, peer, rows) as ask:
                for what, question in questions.items():
                    found[f"{peer}, {what}"] = _case(options, sides, ask, question, version)
    if not found:
        raise SkippedError("; ".join(missing))
    return found


class Question(NamedTuple):
    """What a peer is asked, by number, and which statistic of the first feature tells the same.

    `tolerance`: relative; bins differ, and our Wasserstein distance is that of ten bins.
    """

    number: int
    statistic: str
    tolerance: float
    from_scratch: bool = False


PEERS: Final[Mapping[str, Mapping[str, Question]]] = {
    "evidently": {
        "by PSI": Question(0, "psi", 0.25),
        "by PSI, from scratch": Question(0, "psi", 0.25, from_scratch=True),
        "by its default": Question(1, "w1_sigma", 0.5),
        "by its default, from scratch": Question(1, "w1_sigma", 0.5, from_scratch=True),
    },
    "nannyml": {
        "by Jensen-Shannon": Question(1, "js", 0.25),
        "by Jensen-Shannon, from scratch": Question(0, "js", 0.25, from_scratch=True),
    },
    "whylogs": {"its profile": Question(0, "mean", 1e-9)},
}


class Sides:
    """Our side: a report of the live rows."""

    def __init__(self, reference: Rows, live: Rows) -> None:
        self._reference, self._live = reference, live
        self._kernels: Any = load_kernels(KERNELS)
        self._profile = self._build()

    def ask(self, question: Question) -> float:
        """Make the report; return the statistic of its first feature."""
        profile = self._build() if question.from_scratch else self._profile
        counts = Counts(CountLayout(profile))
        counts.add_rows(self._live, kernels=self._kernels)
        return float(getattr(report(profile, counts).features[0], question.statistic))

    def _build(self) -> ReferenceProfile:
        return build_reference(self._reference, names=NAMES, kinds=["numeric"] * FEATURES)


def _case(options: Options, sides: Sides, ask: Ask, question: Question, version: str) -> Case:
    check_same(ask(question.number)["statistic"], sides.ask(question), question.tolerance)
    return in_turns(
        lambda: timed(lambda: sides.ask(question)),
        lambda: {"ms": ask(question.number)["ms"]},
        rounds=options.rounds,
        measure="ms",
        rows=ROWS,
        features=FEATURES,
        version=version,
    )


def check_same(theirs: float, ours: float, tolerance: float) -> None:
    """Raise RuntimeError unless both measured the same thing of the first feature."""
    if not math.isclose(theirs, ours, rel_tol=tolerance):
        raise RuntimeError(f"the peer gives {theirs!r}, mlpd {ours!r}")


@contextmanager
def _asking(python: Path, peer: str, rows: Path) -> Iterator[Ask]:
    """Run a peer's script until the block ends."""
    command = [str(python), str(FOLDER / f"{peer}_drift.py"), str(rows)]
    with (
        rows.with_name(f"{peer}.log").open("w+") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        questions, answers = process.stdin, process.stdout
        assert questions is not None
        assert answers is not None

        def ask(number: int) -> Mapping[str, float]:
            questions.write(f"{number}\n")
            questions.flush()
            for line in answers:
                if line.startswith("{"):
                    answer: Mapping[str, float] = json.loads(line)
                    return answer
            log.seek(0)
            raise RuntimeError(f"{peer} ended: {log.read()[-1000:]}")

        yield ask
        questions.close()
