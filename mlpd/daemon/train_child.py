"""Child entry `train`: one training run, from the log to files that the daemon can publish.

Steps: training set by point-in-time join, split by time, checks, a trainer, evaluation, parity
certificate, reference profile, golden rows.  Files go to the run's folder; the daemon publishes.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from mlpd.core.document import parse_document
from mlpd.core.hashing import definition_hash
from mlpd.core.specs import Closure, JobSpec
from mlpd.core.time import DAY_US, format_time
from mlpd.daemon.champion import compare_with_champion, load_champion, read_champion
from mlpd.daemon.child import Send
from mlpd.daemon.cross_validation import cross_validate, summarize
from mlpd.daemon.draw import draw
from mlpd.daemon.fit import (
    Fitted,
    Recipe,
    Workshop,
    certify,
    evaluate,
    fit,
    headline,
    judge,
    serve,
    working_folder,
)
from mlpd.daemon.latency import golden_rows, measure_latency
from mlpd.daemon.offline import Offline, open_offline
from mlpd.daemon.plugins import Plugins
from mlpd.daemon.search import pin_moment, search
from mlpd.daemon.surroundings import cpu_flags, packages
from mlpd.daemon.training_set import TrainingSet, Vectors, build_training_set, build_vectors
from mlpd.monitoring.calibration import fit_calibration
from mlpd.monitoring.multivariate import fit_components
from mlpd.monitoring.reference import ReferenceProfile, build_reference
from mlpd.serving.sessions import Session
from mlpd.training.checks import check_data, raise_for_errors
from mlpd.training.evaluate import Evaluation, calibration_error
from mlpd.training.search import Trial, check_search
from mlpd.training.trainer import Progress

GOLDEN_ROWS = 32
CALIBRATED_METRICS = ("log_loss", "brier")

Floats = NDArray[np.float64]


def run(request: dict[str, Any], send: Send) -> dict[str, Any]:
    """Train as the job `request["job"]` says; returns lineage, metrics and file names.

    Raises ValidationError for data that can't be trained on (`no_rows`, `training_data`).
    """
    step = _Steps(send)
    out = Path(request["out"])
    with open_offline(request) as newest:
        job = newest.catalog.definitions.job(request["job"])
        offline, as_of_us = _pin(job, request, newest, out.parent)
        closure = offline.catalog.closures[job.service]
        step("join")
        data = build_training_set(offline, job, closure)
        champion = read_champion(request["champion"], offline, job, data)
    step("vectorize", rows=len(data.labels), left_out=data.left_out)
    vectors = build_vectors(job, data)
    vectorizer, parts = vectors.vectorizer, vectors.parts
    step("check")
    findings = check_data(
        vectors.sets["train"],
        vectors.sets["valid"],
        objective=job.objective,
        categorical=vectorizer.categorical,
    )
    raise_for_errors(findings)
    threads = request["threads"]
    recipe = Recipe.of_job(job, threads, data.labels)
    recipe, tried = _search(job, data, vectors, recipe, out.parent, step)
    with working_folder(out) as folder:
        workshop = Workshop(Plugins.from_request(request["plugins"]), threads, folder)
        validated = _cross_validate(job, data, vectors, recipe, workshop, step)
        fitted_model = fit(vectors, recipe, workshop, step.round)
    step("export")
    fitted = serve(job.model, fitted_model, vectors, threads, job.calibration)
    model, session, scores = fitted.model, fitted.session, fitted.scores.score
    step("evaluate")
    evaluations = {
        name: evaluate(job, data, vectorizer, scores, rows) for name, rows in parts.items()
    }
    uncalibrated = _uncalibrated(job, data, vectors, fitted)
    compared = compare_with_champion(champion, job, data, vectors, fitted)
    step("parity")
    certificate = certify(fitted)
    step("profile")
    profile = _profile(vectors, fitted, data)
    train = parts["train"]
    components = fit_components(profile, vectors.rows[train], data.t_us[train] // DAY_US)
    golden = _golden(session, vectors.rows)
    latency = measure_latency(session, golden_rows(golden), load_champion(champion))
    step("draw")
    report = {
        "evaluation": {name: e.to_dict() for name, e in evaluations.items()},
        "findings": [finding.to_dict() for finding in findings],
        "importance": dict(model.importance),
        "calibration": _gained(fitted, uncalibrated, evaluations["test"]),
        "champion": compared,
        "latency": latency,
        "search": tried,
        "cross_validation": validated,
        "history": {name: list(values) for name, values in model.history.items()},
        "best_iteration": model.rounds,
        "trainer_metrics": dict(model.metrics),
        "rows": {name: rows.stop - rows.start for name, rows in parts.items()},
        "from": format_time(int(data.t_us.min())),
        "to": format_time(int(data.t_us.max())),
        "left_out": data.left_out,
    }
    files = {
        **model.files,
        "model.onnx": model.onnx,
        "encoder.json": _json({**vectorizer.to_dict(), "link": dict(model.link)}),
        "golden.msgpack": golden,
        "parity.json": _json(certificate),
        "profile.json": _json(profile.to_dict()),
        "components.json": _json(components.to_dict()),
        "report.json": _json(report),
        **draw(job, data, vectors, fitted, evaluations["test"], uncalibrated),
        **_calibration(job, data.labels, fitted.scores.served, parts["test"]),
    }
    for name, body in files.items():
        (out / name).write_bytes(body)
    step("done")
    metrics = headline(evaluations["test"])
    lineage = _lineage(offline, job, closure, data, vectors, fitted, metrics, as_of_us)
    lineage["run_id"] = request["run_id"]
    return {
        "files": sorted(files),
        "lineage": lineage,
        "metrics": metrics,
        "parity": certificate,
        "champion": compared,
        "latency": latency,
    }


class _Steps:
    """Tells the daemon how far the run is; a step also shows that the child lives."""

    names = (
        "join",
        "vectorize",
        "check",
        "cross_validate",
        "train",
        "export",
        "evaluate",
        "parity",
        "profile",
    )

    def __init__(self, send: Send) -> None:
        self._send = send

    def __call__(self, name: str, **details: Any) -> None:
        self._send({"kind": "progress", "step": name, **details})

    def round(self, **told: Any) -> None:
        """Tell of one round, as the trainer does."""
        self("train", **told)


def _pin(
    job: JobSpec, request: Mapping[str, Any], newest: Offline, folder: Path
) -> tuple[Offline, int]:
    """Return what this run sees, and when: a search that is taken up sees what it saw."""
    if job.search is None:
        return newest, request["as_of_us"]
    check_search()  # before the join
    known = {"as_of_sequence": newest.through, "as_of_us": request["as_of_us"]}
    moment = pin_moment(folder, known)
    return replace(newest, through=moment["as_of_sequence"]), moment["as_of_us"]


def _search(
    job: JobSpec,
    data: TrainingSet,
    vectors: Vectors,
    recipe: Recipe,
    folder: Path,
    step: _Steps,
) -> tuple[Recipe, dict[str, Any] | None]:
    spec = job.search
    if spec is None:
        return recipe, None

    def tell(ended: list[Trial], progress: Progress | None) -> None:
        merits = [trial.merit for trial in ended if trial.merit is not None]
        step(
            "search",
            trial=len(ended) + 1,
            trials=spec.trials,
            **({} if progress is None else {"round": progress.round}),
            **({} if not merits else {"best": abs(max(merits))}),
        )

    return search(spec, data, vectors, recipe, folder, tell)


def _cross_validate(
    job: JobSpec,
    data: TrainingSet,
    vectors: Vectors,
    recipe: Recipe,
    workshop: Workshop,
    step: _Steps,
) -> dict[str, Any] | None:
    spec = job.cross_validation
    if spec is None:
        return None

    def tell(fold: int, **told: Any) -> None:
        step("cross_validate", fold=fold, folds=spec.folds, **told)

    folds = cross_validate(job, data, vectors, recipe, workshop, spec, tell)
    return summarize(folds, spec, data)


def _profile(vectors: Vectors, fitted: Fitted, data: TrainingSet) -> ReferenceProfile:
    gains = fitted.model.importance
    vectorizer, rows = vectors.vectorizer, vectors.parts["train"]
    return build_reference(
        np.ascontiguousarray(vectors.rows[rows]),
        names=vectorizer.names,
        kinds=[
            "categorical" if i in vectorizer.categorical else "numeric"
            for i in range(len(vectorizer.names))
        ],
        scores=fitted.scores.served[rows],
        gains=[gains.get(name, 0.0) for name in vectorizer.names],
        t_us=data.t_us[rows],
    )


def _uncalibrated(
    job: JobSpec, data: TrainingSet, vectors: Vectors, fitted: Fitted
) -> Evaluation | None:
    """Judge on the test rows what the model would score without its calibrator."""
    if fitted.uncalibrated is None:
        return None
    rows = vectors.parts["test"]
    return judge(job, data, fitted.uncalibrated.score[rows], rows)


def _gained(fitted: Fitted, before: Evaluation | None, after: Evaluation) -> dict[str, Any] | None:
    """Return the calibrator and how well calibrated the test rows are without and with it."""
    if fitted.calibrator is None or before is None:
        return None

    def form(judged: Evaluation) -> dict[str, Any]:
        found = {name: judged.metrics.get(name) for name in CALIBRATED_METRICS}
        return {
            "metrics": {name: m and m.to_dict() for name, m in found.items()},
            "ece": calibration_error(judged.calibration),
            "bins": [bin_.to_dict() for bin_ in judged.calibration],
        }

    return {**fitted.calibrator.to_dict(), "before": form(before), "after": form(after)}


def _calibration(job: JobSpec, labels: Floats, scores: Floats, rows: slice) -> dict[str, bytes]:
    """Return the file from which performance is estimated; there is none for classes and ranks."""
    if job.objective not in ("binary", "regression"):
        return {}
    found = fit_calibration(labels[rows], scores[rows], job.objective)
    return {"calibration.json": _json(found.to_dict())}


def _golden(session: Session, vectors: Floats) -> bytes:
    """Return rows spread over the training set with their outputs, every bit kept."""
    index = np.linspace(0, len(vectors) - 1, GOLDEN_ROWS).astype(int)
    rows = np.ascontiguousarray(vectors[index])
    raw = session.run(rows)
    arrays = {"features": rows, "raw_score": raw, "score": session.score(raw)}
    packed: bytes = msgpack.packb({k: [list(a.shape), a.tobytes()] for k, a in arrays.items()})
    return packed


def _lineage(
    offline: Offline,
    job: JobSpec,
    closure: Closure,
    data: TrainingSet,
    vectors: Vectors,
    fitted: Fitted,
    metrics: Mapping[str, float],
    as_of_us: int,
) -> dict[str, Any]:
    model, document = fitted.model, offline.catalog.document
    parse_document(document)
    return {
        "service": job.service,
        "service_hash": closure.hash,
        "definitions_hash": definition_hash(document),
        "definitions": document,
        "spine": {
            "source": job.spine_source,
            "time": job.spine_time,
            "filter": job.spine_filter,
            "start_us": job.start_us,
            "end_us": job.end_us,
            "closed": job.spine_closed,
        },
        "label": job.label,
        "mode": job.mode,
        "as_of_us": as_of_us,
        "as_of_sequence": offline.through,
        "rows": len(data.labels),
        "row_set_digest": data.digest,
        "vectors_digest": vectors.digest,
        "columns": list(closure.service.vector),
        "dtypes": {name: str(dtype) for name, dtype in closure.dtypes.items()},
        "categorical": list(job.categorical),
        "split": {
            "by": "time",
            "valid_share": job.valid_share,
            "test_share": job.test_share,
            "gap_us": job.gap_us,
            "group": job.group,
        },
        "trainer": model.trainer,
        "seed": int(model.params.get("seed", 0)),
        "params": dict(model.params),
        "best_iteration": model.rounds,
        "tree_digest": model.digest,
        "calibration": None if fitted.calibrator is None else fitted.calibrator.to_dict(),
        "metrics": dict(metrics),
        "packages": packages(model.packages),
        "cpu_flags": cpu_flags(),
        "job": job.name,
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode()
