"""Reads an experiment from its document (JSON or msgpack types), naming every wrong key."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import msgpack

from mlpd.core.errors import DefinitionError
from mlpd.experiments.bandit import Bandit
from mlpd.experiments.guardrails import Guardrail
from mlpd.experiments.metric import Metric
from mlpd.experiments.promotion import Promotion
from mlpd.experiments.spec import Arm, ExperimentSpec, Namespace, Rule


def spec_from_dict(document: Any) -> ExperimentSpec:
    """Return the spec of a document as `ExperimentSpec.to_dict` writes it; defaults may be absent.

    Keys that are unknown or missing raise DefinitionError naming them.
    """
    name = document.get("name") if isinstance(document, Mapping) else None
    what = f"experiment {name!r}"
    values = _checked_keys(ExperimentSpec, document, what)
    values["arms"] = _arms(values["arms"], what)
    values["metrics"] = _build_all(Metric, values["metrics"], f"{what}: metrics")
    values["rules"] = _build_all(Rule, values.get("rules", ()), f"{what}: rules")
    guardrails = values.get("guardrails", ())
    values["guardrails"] = _build_all(Guardrail, guardrails, f"{what}: guardrails")
    if values.get("promotion") is not None:
        values["promotion"] = _build(Promotion, values["promotion"], f"{what}: promotion")
    if values.get("bandit") is not None:
        values["bandit"] = _build(Bandit, values["bandit"], f"{what}: bandit")
    if values.get("namespace") is not None:
        values["namespace"] = _build(Namespace, values["namespace"], f"{what}: namespace")
    spec = ExperimentSpec(**values)
    try:
        msgpack.packb(spec.to_dict())
    except OverflowError:
        raise _malformed(f"{what}: an integer has more than 64 bits") from None
    return spec


def _arms(document: Any, what: str) -> tuple[Arm, ...]:
    if not isinstance(document, Mapping):
        raise _malformed(f"{what}: arms are {document!r}, expected a mapping of arm to weight")
    return tuple(Arm(name, weight) for name, weight in document.items())


def _build_all(cls: type[Any], documents: Any, what: str) -> tuple[Any, ...]:
    if not isinstance(documents, list | tuple):
        raise _malformed(f"{what} are {documents!r}, expected a list")
    return tuple(_build(cls, document, what) for document in documents)


def _build(cls: type[Any], document: Any, what: str) -> Any:
    values = _checked_keys(cls, document, what)
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _checked_keys(cls: type[Any], document: Any, what: str) -> dict[str, Any]:
    if not isinstance(document, Mapping):
        raise _malformed(f"{what}: {document!r} should be a mapping of {_keys_of(cls)}")
    known = {f.name: f for f in fields(cls)}
    for key in document:
        if key not in known:
            raise _malformed(f"{what}: unknown key {key!r}; known keys: {_keys_of(cls)}")
    for key, spec in known.items():
        has_default = spec.default is not MISSING or spec.default_factory is not MISSING
        if key not in document and not has_default:
            raise _malformed(f"{what}: key {key!r} is missing")
    return dict(document)


def _keys_of(cls: type[Any]) -> str:
    return ", ".join(f.name for f in fields(cls))


def _malformed(message: str) -> DefinitionError:
    return DefinitionError(
        message,
        code="invalid_experiment",
        hint="Correct the experiment's definition and send it again.",
    )
