"""Child entry `reproduce`: train a version again from its lineage, and compare.

The log up to the version's sequence is what it was then, whatever has arrived since: what comes
later, also with an earlier event time or known time, has a later sequence.  The definitions are
those in the lineage, the parameters those that were used, defaults and threads among them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.core.specs import JobSpec
from mlpd.daemon.child import Send
from mlpd.daemon.fit import (
    Fitted,
    Recipe,
    Workshop,
    evaluate,
    fit,
    headline,
    serve,
    working_folder,
)
from mlpd.daemon.offline import Offline, open_offline
from mlpd.daemon.plugins import Plugins
from mlpd.daemon.surroundings import cpu_flags, packages
from mlpd.daemon.training_set import TrainingSet, Vectors, build_training_set, build_vectors
from mlpd.registry.lineage import Lineage


@dataclass(frozen=True, slots=True)
class Check:
    """One thing compared: what the version says, what came this time."""

    what: str
    expected: Any
    found: Any

    @property
    def same(self) -> bool:
        """Whether the two are equal, numbers by their bits."""
        return repr(self.expected) == repr(self.found)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "what": self.what,
            "same": self.same,
            "expected": self.expected,
            "found": self.found,
        }


def run(request: dict[str, Any], send: Send) -> dict[str, Any]:
    """Train as `request["lineage"]` says; `golden` is the version's golden.msgpack.

    Returns `reproduced`, `checks` in the order of the work, and what is another `packages` or
    `cpu_flags` now.  Rows or vectors that differ end it there: their trees would say nothing.
    Raises ValidationError(code="not_reproducible") where the log or the lineage doesn't reach.
    """
    lineage = Lineage.parse(request["lineage"])
    checks: list[Check] = []
    with open_offline(request) as today:
        if lineage.as_of_sequence > today.through:
            raise _unreachable(lineage, today)
        then = replace(today, through=lineage.as_of_sequence)
        offline = then.with_definitions(lineage.definitions or {})
        job = _job_of(lineage, offline)
        send({"kind": "progress", "step": "join"})
        data = _build_rows(offline, job, lineage, checks)
    vectors = build_vectors(job, data) if data and _all_same(checks) else None
    if vectors is not None:
        checks += _compare_vectors(lineage, vectors)
    if data is not None and vectors is not None and _all_same(checks):
        fitted = _fit(job, lineage, vectors, request, send)
        checks += _compare_model(job, lineage, data, vectors, fitted)
        checks.append(_compare_golden(request["golden"], fitted))
    return {
        "reproduced": _all_same(checks) and any(check.what == "trees" for check in checks),
        "checks": [check.to_dict() for check in checks],
        "packages": _changes(lineage.packages, packages(tuple(lineage.packages))),
        "cpu_flags": sorted({*lineage.cpu_flags} ^ {*cpu_flags()}),
    }


def _all_same(checks: list[Check]) -> bool:
    return all(check.same for check in checks)


def _job_of(lineage: Lineage, offline: Offline) -> JobSpec:
    """Return the job as it was, with what the lineage says of rows and split.

    Its `mode` is the definitions': the lineage repeats it.
    """
    job = offline.catalog.definitions.job(lineage.job or "")
    return replace(
        job,
        service=lineage.service,
        spine_source=lineage.spine["source"],
        spine_time=lineage.spine["time"],
        spine_filter=lineage.spine["filter"],
        start_us=lineage.spine["start_us"],
        end_us=lineage.spine["end_us"],
        spine_closed=lineage.spine["closed"],
        label=lineage.label,
        categorical=lineage.categorical,
        valid_share=lineage.split["valid_share"],
        test_share=lineage.split["test_share"],
        gap_us=lineage.split.get("gap_us", 0),
        group=lineage.split.get("group"),
    )


def _build_rows(
    offline: Offline, job: JobSpec, lineage: Lineage, checks: list[Check]
) -> TrainingSet | None:
    """Return the training set and add what it was compared by; None where no row is left."""
    closure = offline.catalog.closures[job.service]
    checks.append(Check("feature service", lineage.service_hash, closure.hash))
    try:
        data = build_training_set(offline, job, closure)
    except ValidationError as error:
        if error.code != "no_rows":
            raise
        checks.append(Check("rows", lineage.rows, 0))
        return None
    checks.append(Check("rows", lineage.rows, len(data.labels)))
    checks.append(Check("events and labels", lineage.row_set_digest, data.digest))
    return data


def _compare_vectors(lineage: Lineage, vectors: Vectors) -> list[Check]:
    if lineage.vectors_digest is None:
        return []
    return [Check("features", lineage.vectors_digest, vectors.digest)]


def _fit(
    job: JobSpec, lineage: Lineage, vectors: Vectors, request: Mapping[str, Any], send: Send
) -> Fitted:
    def tell(**told: Any) -> None:
        send({"kind": "progress", **told})

    threads = int(lineage.params["num_threads"])
    plugins = Plugins.from_request(request["plugins"])
    with working_folder(Path(request["folder"])) as folder:
        workshop = Workshop(plugins, threads, folder)
        recipe = Recipe.of_lineage(lineage, job)
        model = fit(vectors, recipe, workshop, tell)
    send({"kind": "progress", "step": "score"})
    return serve(job.model, model, vectors, threads, recipe.calibration)


def _compare_model(
    job: JobSpec, lineage: Lineage, data: TrainingSet, vectors: Vectors, fitted: Fitted
) -> list[Check]:
    test = evaluate(job, data, vectors.vectorizer, fitted.scores.score, vectors.parts["test"])
    found = headline(test)
    metrics = sorted({*lineage.metrics} | {*found})
    return [
        Check("rounds", lineage.best_iteration, fitted.model.rounds),
        Check("trees", lineage.tree_digest, fitted.model.digest),
        *_compare_calibrators(lineage, fitted),
        *(Check(f"test {name}", lineage.metrics.get(name), found.get(name)) for name in metrics),
    ]


def _compare_calibrators(lineage: Lineage, fitted: Fitted) -> list[Check]:
    if lineage.calibration is None or fitted.calibrator is None:
        return []
    found = fitted.calibrator.to_dict()
    return [Check("calibration", lineage.calibration["digest"], found["digest"])]


def _compare_golden(golden: bytes, fitted: Fitted) -> Check:
    """Score the version's golden rows: how many of them come out with the same bits."""
    stored = msgpack.unpackb(golden)
    arrays = {name: np.frombuffer(data).reshape(shape) for name, (shape, data) in stored.items()}
    raw = fitted.session.run(np.ascontiguousarray(arrays["features"]))
    pairs = ((raw, arrays["raw_score"]), (fitted.session.score(raw), arrays["score"]))
    equal = np.logical_and(*(_equal_rows(ours, theirs) for ours, theirs in pairs))
    return Check("golden rows", len(raw), int(equal.sum()))


def _equal_rows(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.bool_]:
    if left.shape != right.shape:
        return np.zeros(len(left), np.bool_)
    ours, theirs = (np.ascontiguousarray(side).view(np.int64) for side in (left, right))
    equal: NDArray[np.bool_] = np.all(ours == theirs, axis=1)
    return equal


def _changes(left: Mapping[str, str], right: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the packages that the lineage names and that have another version now."""
    return [
        {"name": name, "from": left[name], "to": right.get(name)}
        for name in sorted(left)
        if left[name] != right.get(name)
    ]


def _unreachable(lineage: Lineage, offline: Offline) -> ValidationError:
    return ValidationError(
        f"the version was trained on events up to sequence {lineage.as_of_sequence}, "
        f"but this log ends at {offline.through}",
        code="not_reproducible",
        hint="Reproduce it where it was trained: an imported version comes without its events.",
    )
