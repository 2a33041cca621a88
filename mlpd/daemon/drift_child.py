"""Child entry `drift`: what needs served vectors, not counts: other versions', and all at once."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpd.core.kernels import load_kernels
from mlpd.core.vector import Vectorizer
from mlpd.daemon.child import Send
from mlpd.daemon.served_sample import draw_served
from mlpd.monitoring.counting import CountLayout, Counts
from mlpd.monitoring.multivariate import Components, encode
from mlpd.monitoring.reference import ReferenceProfile
from mlpd.monitoring.thresholds import ROWS_MIN
from mlpd.training.domain import domain_auc

_COUNT_ROWS = 20_000
CLASSIFIER_ROWS_MAX = 5_000
WARN_AUC, ALERT_AUC = 0.55, 0.6
"""Of the lower end of the classifier's 99 % interval."""

Floats = NDArray[np.float64]


def run(request: dict[str, Any], send: Send) -> dict[str, Any]:
    """Do what `request["what"]` says: "recount" or "multivariate"."""
    del send
    profile = ReferenceProfile.from_dict(request["profile"])
    if request["what"] == "recount":
        return _recount(request, profile)
    return _multivariate(request, profile)


def _recount(request: Mapping[str, Any], profile: ReferenceProfile) -> dict[str, Any]:
    """Count another version's rows in the bins of this one's profile.

    `not_compared`: features that the other version doesn't have, or has of another kind.
    """
    ours = Vectorizer.from_dict(request["encoder"])
    theirs = Vectorizer.from_dict(request["other"]["encoder"])
    places, absent = _places(ours, theirs)
    counts = Counts(CountLayout(profile))
    kernels: Any = load_kernels("mlpd.monitoring.count_kernel")
    vectors, scores = draw_served(request, request["other"]["number"])
    for start in range(0, len(vectors), _COUNT_ROWS):
        part = vectors[start : start + _COUNT_ROWS]
        rows = np.full((len(part), len(profile.columns)), np.nan)
        for index, (place, codes) in places.items():
            values = part[:, place]
            rows[:, index] = values if codes is None else _recode(values, codes)
        if profile.score is not None:
            rows[:, -1] = scores[start : start + _COUNT_ROWS]
        counts.add_rows(rows, kernels=kernels)
    return {"counts": counts.to_bytes(), "not_compared": absent}


def _places(
    ours: Vectorizer, theirs: Vectorizer
) -> tuple[dict[int, tuple[int, Floats | None]], list[str]]:
    """Return by place of ours (place of theirs, their codes as ours or None); and who has none."""
    found: dict[int, tuple[int, Floats | None]] = {}
    absent = []
    for index, feature in enumerate(ours.features):
        place = theirs.names.index(feature.name) if feature.name in theirs.names else None
        other = None if place is None else theirs.features[place]
        if place is None or other is None or (other.encoder is None) != (feature.encoder is None):
            absent.append(feature.name)
        elif feature.encoder is None or other.encoder is None:
            found[index] = place, None
        else:
            known = set(feature.encoder.categories)
            codes = [
                feature.encoder.codes([c])[0] if c in known else math.nan
                for c in other.encoder.categories
            ]
            found[index] = place, np.array(codes)
    return found, absent


def _recode(values: Floats, codes: Floats) -> Floats:
    known = np.isfinite(values)
    found = np.full(len(values), np.nan)
    found[known] = codes[values[known].astype(np.int64)]
    return found


def _multivariate(request: Mapping[str, Any], profile: ReferenceProfile) -> dict[str, Any]:
    number, span = request["number"], request["reference"]
    live, _ = draw_served(request, number)
    before, _ = draw_served({**request, **span}, number)
    return {
        "rows": len(live),
        "reference_rows": len(before),
        "reconstruction": _reconstruction(request["components"], profile, live),
        "classifier": _classifier(before, live),
    }


def _reconstruction(
    document: Mapping[str, Any] | None, profile: ReferenceProfile, live: Floats
) -> dict[str, Any]:
    if document is None:
        return {"state": "no_reference", "error": None, "reference_error": None, "threshold": None}
    components = Components.from_dict(document)
    found = {"reference_error": components.error_mean, "threshold": components.threshold}
    if len(live) < ROWS_MIN:
        return {"state": "insufficient", "error": None, **found}
    error = float(components.errors(encode(profile, live)).mean())
    if components.threshold is None:
        return {"state": "uncalibrated", "error": error, **found}
    return {"state": "alert" if error > components.threshold else "ok", "error": error, **found}


def _classifier(before: Floats, live: Floats) -> dict[str, Any]:
    if len(before) < ROWS_MIN:
        return {"state": "no_reference", "auc": None}
    if len(live) < ROWS_MIN:
        return {"state": "insufficient", "auc": None}
    auc = domain_auc(before[:CLASSIFIER_ROWS_MAX], live[:CLASSIFIER_ROWS_MAX])  # by their lots
    if auc is None:
        return {"state": "insufficient", "auc": None}
    state = "alert" if auc.low >= ALERT_AUC else "warn" if auc.low >= WARN_AUC else "ok"
    return {"state": state, "auc": asdict(auc)}
