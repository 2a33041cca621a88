"""A new model against the champion on the same test rows, in the child that trained it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.columns import Columns
from mlpd.core.errors import MlpdError, ValidationError
from mlpd.core.specs import JobSpec
from mlpd.core.vector import Vectorizer
from mlpd.daemon.fit import Fitted
from mlpd.daemon.latency import golden_rows
from mlpd.daemon.offline import Offline
from mlpd.daemon.training_set import TrainingSet, Vectors, build_training_set
from mlpd.serving.package import ModelPackage, Signature
from mlpd.serving.sessions import Session
from mlpd.training.compare import gains

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Champion:
    """The champion's files as the daemon sent them, and what it reads of each row, or `why` not."""

    sent: Mapping[str, Any]
    columns: Columns | None = None
    why: str = ""


def read_champion(
    sent: Mapping[str, Any] | None, offline: Offline, job: JobSpec, data: TrainingSet
) -> Champion | None:
    """Return the champion with the features of all rows; `sent` is what `Publisher.champion` gave.

    It reads the features of its own definitions: where they are others by now, the rows are joined
    anew.
    """
    if sent is None:
        return None
    if "why" in sent:
        return Champion(sent, why=sent["why"])
    closure = offline.catalog.closures[job.service]
    if (sent["service"], sent["service_hash"]) == (job.service, closure.hash):
        return Champion(sent, data.frame.columns)
    try:
        return Champion(sent, _join_again(sent, offline, job, data).frame.columns)
    except MlpdError as error:
        return Champion(sent, why=f"the champion can't read these rows: {error.message}")


def compare_with_champion(
    champion: Champion | None, job: JobSpec, data: TrainingSet, vectors: Vectors, fitted: Fitted
) -> dict[str, Any] | None:
    """Return `version` and `gains` by metric, or `why` there are none; None without a champion.

    A champion that learned from rows of this test has an advantage.
    """
    if champion is None:
        return None
    rows = vectors.parts["test"]
    version, scores = champion.sent["version"], fitted.scores.score[rows]
    theirs = _score(champion, rows)
    if theirs is None:
        return {"version": version, "why": champion.why}
    if theirs.shape != scores.shape:
        return {"version": version, "why": "the champion has another number of outputs"}
    groups = None if data.groups is None else data.groups[rows]
    found = gains(job.objective, data.labels[rows], scores, theirs, groups)
    return {"version": version, "gains": {name: g and g.to_dict() for name, g in found.items()}}


def load_champion(champion: Champion | None) -> tuple[Session, Floats] | None:
    """Return the champion's session and the vectors of its golden rows; None without one."""
    if champion is None or "onnx" not in champion.sent:
        return None
    encoder = json.loads(champion.sent["encoder"])
    return _load(champion.sent, encoder), golden_rows(champion.sent["golden"])


def _score(champion: Champion, rows: slice) -> Floats | None:
    if champion.columns is None:
        return None
    encoder = json.loads(champion.sent["encoder"])
    vectorizer = Vectorizer.from_dict(encoder)
    taken = {name: champion.columns[name].take(rows) for name in vectorizer.names}
    session = _load(champion.sent, encoder)
    return session.score(session.run(np.ascontiguousarray(vectorizer.vectorize(taken))))


def _load(sent: Mapping[str, Any], encoder: Mapping[str, Any]) -> Session:
    return Session(
        ModelPackage(
            name=sent["name"],
            version=sent["version"],
            digest="",
            onnx=sent["onnx"],
            signature=Signature.of_vectors(Vectorizer.from_dict(encoder), sent["outputs"]),
            link=encoder["link"],
        )
    )


def _join_again(
    sent: Mapping[str, Any], offline: Offline, job: JobSpec, data: TrainingSet
) -> TrainingSet:
    then = offline.with_definitions(sent["definitions"])
    closure = then.catalog.closures[sent["service"]]
    if closure.hash != sent["service_hash"]:
        raise ValidationError("its definitions make another service", code="other_service")
    found = build_training_set(then, replace(job, service=sent["service"]), closure)
    if found.digest != data.digest:
        raise ValidationError("its definitions give other rows", code="other_rows")
    return found
