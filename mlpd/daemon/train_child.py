"""Child entry `train`: one training run, from the log to files that the daemon can publish.

Steps: training set by point-in-time join, split by time, checks, LightGBM, evaluation, ONNX, parity
certificate, reference profile, golden rows.  Files go to the run's folder; the daemon publishes.
"""

import hashlib
import json
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Column, Columns
from mlpd.core.document import parse_document
from mlpd.core.errors import ValidationError
from mlpd.core.expressions import parse_expression
from mlpd.core.hashing import definition_hash
from mlpd.core.specs import Closure, JobSpec
from mlpd.core.time import DAY_US, format_time
from mlpd.core.vector import Vectorizer
from mlpd.daemon.child import Send
from mlpd.daemon.offline import Offline, open_offline, stamps_of, take_columns
from mlpd.features.assemble import FeatureFrame
from mlpd.features.offline import Spine, join_history
from mlpd.monitoring.reference import build_reference
from mlpd.serving.package import ModelPackage, Signature
from mlpd.serving.sessions import Session
from mlpd.training.checks import check_data, raise_for_errors
from mlpd.training.evaluate import Evaluation, evaluate_binary, evaluate_regression
from mlpd.training.exporter import ExportedModel, export_model
from mlpd.training.parity import certify, parity_rows
from mlpd.training.shape import gain_importance
from mlpd.training.trainer import Dataset, Progress, TrainedModel, train

GOLDEN_ROWS = 32
PARITY_SAMPLE_ROWS = 10_000
SLICES_MAX = 3
"""Categorical features by which the report splits its metrics."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """Rows in time order: feature columns, labels float64 [n], times and sequences int64 [n]."""

    frame: FeatureFrame
    labels: Floats
    t_us: NDArray[np.int64]
    sequences: NDArray[np.int64]

    @property
    def digest(self) -> str:
        """Digest of the ordered rows: which events, when, with which label."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.sequences, self.t_us, self.labels):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()


def run(request: dict[str, Any], send: Send) -> dict[str, Any]:
    """Train as the job `request["job"]` says; returns lineage, metrics and file names.

    Raises ValidationError for data that can't be trained on (`no_rows`, `training_data`).
    """
    step = _Steps(send)
    out = Path(request["out"])
    with open_offline(request) as offline:
        job = offline.catalog.definitions.job(request["job"])
        closure = offline.catalog.closures[job.service]
        step("join")
        data = build_training_set(offline, job, closure)
    step("vectorize", rows=len(data.labels))
    parts = split_by_time(len(data.labels), job)
    vectorizer = Vectorizer.fit(_take(data.frame.columns, parts["train"]), job.categorical)
    vectors = vectorizer.vectorize(data.frame.columns, order="F")
    sets = {
        name: Dataset(np.asfortranarray(vectors[rows]), data.labels[rows], vectorizer.names)
        for name, rows in parts.items()
    }
    step("check")
    findings = check_data(
        sets["train"],
        sets["valid"],
        objective=job.objective,
        categorical=vectorizer.categorical,
    )
    raise_for_errors(findings)
    model = _train(job, sets, vectorizer, request, step)
    step("export")
    exported = export_model(model.model_text)
    session = _session(job, exported, vectorizer)
    scores = _score(session, np.ascontiguousarray(vectors), request["threads"])
    step("evaluate")
    evaluations = {
        name: _evaluate(job, data, vectorizer, scores, rows) for name, rows in parts.items()
    }
    step("parity")
    certificate = certify(
        model.model_text, parity_rows(model.model_text, vectors[-PARITY_SAMPLE_ROWS:]), session.run
    ).to_dict()
    step("profile")
    profile = _profile(vectorizer, vectors, scores, model, data, parts["train"])
    report = {
        "evaluation": {name: e.to_dict() for name, e in evaluations.items()},
        "findings": [finding.to_dict() for finding in findings],
        "importance": gain_importance(model.model_text),
        "history": {name: list(values) for name, values in model.history.items()},
        "best_iteration": model.best_iteration,
        "rows": {name: rows.stop - rows.start for name, rows in parts.items()},
        "from": format_time(int(data.t_us[0])),
        "to": format_time(int(data.t_us[-1])),
    }
    files = {
        "model.onnx": exported.onnx,
        "model.txt": model.model_text.encode(),
        "encoder.json": _json({**vectorizer.to_dict(), "link": dict(exported.link)}),
        "golden.msgpack": _golden(session, vectors),
        "parity.json": _json(certificate),
        "profile.json": _json(profile),
        "report.json": _json(report),
    }
    for name, body in files.items():
        (out / name).write_bytes(body)
    step("done")
    metrics = _headline(evaluations["test"])
    lineage = _lineage(offline, job, closure, data, model, exported, metrics, request)
    return {"files": sorted(files), "lineage": lineage, "metrics": metrics, "parity": certificate}


def build_training_set(offline: Offline, job: JobSpec, closure: Closure) -> TrainingSet:
    """Return the rows of `job`'s spine with features and labels, in time order."""
    source = offline.catalog.definitions.source(job.spine_source)
    frame = offline.frame(source, source.schema)
    columns = take_columns(frame, source.schema)
    stamps = stamps_of(frame)
    t_us = columns[job.spine_time].values
    label = parse_expression(job.label, source.schema, "label").evaluate(columns)
    keep = columns[job.spine_time].mask() & label.mask()
    if job.spine_filter is not None:
        kept = parse_expression(job.spine_filter, source.schema, "filter").evaluate(columns)
        keep &= kept.mask() & kept.values.astype(np.bool_)
    if job.start_us is not None:
        keep &= t_us >= job.start_us
    if job.end_us is not None:
        keep &= t_us < job.end_us
    order = np.flatnonzero(keep)
    order = order[np.lexsort((stamps.sequences[order], t_us[order]))]
    if not len(order):
        raise ValidationError(
            f"job {job.name!r} has no rows: source {source.name!r} holds {frame.height} events, "
            "none of which has a label within the job's bounds",
            code="no_rows",
            hint="Import events first, or widen the spine's start, end and filter.",
        )
    needed = [*closure.key_columns, *closure.service.request]
    given: Mapping[str, Column] = {name: columns[name].take(order) for name in needed}
    joined = join_history(
        offline.catalog, closure, Spine(given, t_us[order]), offline.events, mode=job.mode
    )
    labels = label.values[order].astype(np.float64)
    return TrainingSet(joined, labels, t_us[order], stamps.sequences[order])


def split_by_time(n: int, job: JobSpec) -> dict[str, slice]:
    """Return the rows of train, valid and test: the last shares of `n` rows in time order."""
    test = n - round(n * job.test_share)
    valid = test - round(n * job.valid_share)
    return {"train": slice(0, valid), "valid": slice(valid, test), "test": slice(test, n)}


class _Steps:
    """Tells the daemon how far the run is; a step also shows that the child lives."""

    names = ("join", "vectorize", "check", "train", "export", "evaluate", "parity", "profile")

    def __init__(self, send: Send) -> None:
        self._send = send

    def __call__(self, name: str, **details: Any) -> None:
        self._send({"kind": "progress", "step": name, **details})


def _train(
    job: JobSpec,
    sets: Mapping[str, Dataset],
    vectorizer: Vectorizer,
    request: Mapping[str, Any],
    step: _Steps,
) -> TrainedModel:
    def on_progress(progress: Progress) -> None:
        step(
            "train",
            round=progress.round,
            rounds=progress.rounds,
            metrics=dict(progress.metrics),
        )

    return train(
        sets["train"],
        sets["valid"],
        params={
            "objective": job.objective,
            "num_threads": request["threads"],
            **({"metric": "auc"} if job.objective == "binary" else {}),
            **job.params,
        },
        num_boost_round=job.num_boost_round,
        early_stopping_rounds=job.early_stopping_rounds,
        categorical=list(vectorizer.categorical),
        on_progress=on_progress,
        should_stop=lambda: False,
    )


def _session(job: JobSpec, exported: ExportedModel, vectorizer: Vectorizer) -> Session:
    return Session(
        ModelPackage(
            name=job.model,
            version=0,
            digest="",
            onnx=exported.onnx,
            signature=Signature.of_vectors(vectorizer, exported.outputs),
            link=exported.link,
        )
    )


def _score(session: Session, vectors: Floats, threads: int) -> Floats:
    """Return the scores of all rows, in parts side by side: a row's score knows no other row."""
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(session.run, np.array_split(vectors, min(threads, len(vectors)))))
    scores: Floats = session.score(np.concatenate(parts))[:, 0]
    return scores


def _evaluate(
    job: JobSpec, data: TrainingSet, vectorizer: Vectorizer, scores: Floats, rows: slice
) -> Evaluation:
    slices = {
        vectorizer.names[i]: data.frame.columns[vectorizer.names[i]].values[rows].astype(str)
        for i in vectorizer.categorical[:SLICES_MAX]
    }
    judge = evaluate_binary if job.objective == "binary" else evaluate_regression
    return judge(data.labels[rows], scores[rows], slices=slices)


def _profile(
    vectorizer: Vectorizer,
    vectors: Floats,
    scores: Floats,
    model: TrainedModel,
    data: TrainingSet,
    rows: slice,
) -> dict[str, Any]:
    gains = gain_importance(model.model_text)
    profile = build_reference(
        np.ascontiguousarray(vectors[rows]),
        names=vectorizer.names,
        kinds=[
            "categorical" if i in vectorizer.categorical else "numeric"
            for i in range(len(vectorizer.names))
        ],
        scores=scores[rows],
        gains=[gains[name] for name in vectorizer.names],
        windows=data.t_us[rows] // DAY_US,
    )
    return profile.to_dict()


def _golden(session: Session, vectors: Floats) -> bytes:
    """Return rows spread over the training set with their outputs, every bit kept."""
    index = np.linspace(0, len(vectors) - 1, GOLDEN_ROWS).astype(int)
    rows = np.ascontiguousarray(vectors[index])
    raw = session.run(rows)
    arrays = {"features": rows, "raw_score": raw, "score": session.score(raw)}
    packed: bytes = msgpack.packb({k: [list(a.shape), a.tobytes()] for k, a in arrays.items()})
    return packed


def _headline(evaluation: Evaluation) -> dict[str, float]:
    """Return the metrics' values alone, for lineage, gates and tables."""
    return {name: m.value for name, m in evaluation.metrics.items() if m is not None}


def _lineage(
    offline: Offline,
    job: JobSpec,
    closure: Closure,
    data: TrainingSet,
    model: TrainedModel,
    exported: ExportedModel,
    metrics: Mapping[str, float],
    request: Mapping[str, Any],
) -> dict[str, Any]:
    document = offline.catalog.document
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
        },
        "label": job.label,
        "mode": job.mode,
        "as_of_us": request["as_of_us"],
        "as_of_sequence": offline.through,
        "rows": len(data.labels),
        "row_set_digest": data.digest,
        "columns": list(closure.service.vector),
        "dtypes": {name: str(dtype) for name, dtype in closure.dtypes.items()},
        "categorical": list(job.categorical),
        "split": {"by": "time", "valid_share": job.valid_share, "test_share": job.test_share},
        "trainer": f"lightgbm {model.lightgbm_version}",
        "seed": int(model.params.get("seed", 0)),
        "params": dict(model.params),
        "best_iteration": model.best_iteration,
        "tree_digest": exported.tree_digest,
        "metrics": dict(metrics),
        "packages": {name: version(name) for name in ("lightgbm", "numpy", "onnxruntime", "polars")}
        | {"python": platform.python_version()},
        "cpu_flags": _cpu_flags(),
        "job": job.name,
        "run_id": request["run_id"],
    }


def _cpu_flags() -> list[str]:
    """Return the processor's vector extensions, which decide how floats are summed."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    flags = next((line.partition(":")[2].split() for line in lines if line[:5] == "flags"), [])
    return sorted(flag for flag in flags if flag.startswith(("avx", "sse", "fma")))


def _take(columns: Columns, rows: slice) -> Columns:
    return {name: column.take(rows) for name, column in columns.items()}


def _json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode()
