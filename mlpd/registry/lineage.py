"""Lineage: what a model version was made from, enough to make it again and compare the trees."""

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, cast

from mlpd.core.errors import TooLargeError, ValidationError
from mlpd.core.hashing import canonical_json
from mlpd.registry.json_values import is_json, is_text

MAX_LINEAGE_BYTES = 1 << 20
"""Upper bound of a lineage document; one with 1,000 features takes about 60 KB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """The lineage document of one version; JSON, canonical bytes, immutable.

    Made by `Lineage.parse`, which checks every field.  `definitions` is the declarative document of
    all that the service depends on.  `spine` holds source, time column, filter and time bounds.
    `columns` is the order of the vector, `dtypes` covers each of them.  `row_set_digest` identifies
    the ordered rows of the training set, `vectors_digest` every bit of their features.  `params`
    are all parameters after defaults, including `num_threads`; `tree_digest` identifies the trees
    apart from how the file was written, `calibration` the map behind them, by method and digest.
    `as_of_us` and `as_of_sequence` say what the daemon knew when the training set was read.
    """

    service: str
    service_hash: str
    definitions_hash: str
    definitions: Mapping[str, Any] | None = None
    spine: Mapping[str, Any]
    label: str
    mode: Literal["as_known", "as_corrected", "as_of_sequence"]
    as_of_us: int
    as_of_sequence: int
    rows: int
    row_set_digest: str
    columns: tuple[str, ...]
    dtypes: Mapping[str, str]
    categorical: tuple[str, ...] = ()
    split: Mapping[str, Any]
    trainer: str
    seed: int
    params: Mapping[str, Any]
    best_iteration: int
    tree_digest: str
    metrics: Mapping[str, Any]
    packages: Mapping[str, str]
    cpu_flags: tuple[str, ...] = ()
    parent: str | None = None
    git_commit: str | None = None
    git_diff: str | None = None
    job: str | None = None
    run_id: str | None = None
    vectors_digest: str | None = None
    calibration: Mapping[str, Any] | None = None

    @classmethod
    def parse(cls, document: object) -> "Lineage":
        """Return the lineage that a JSON-like mapping describes, independent of the mapping.

        Raises ValidationError(code="invalid_lineage") naming the first field that is unknown,
        missing or wrong, and TooLargeError(code="lineage_too_large").
        """
        if not isinstance(document, Mapping):
            raise _invalid("lineage", "a mapping", document)
        _check_names(document)
        for name, value in document.items():
            _check_field(name, value)
        lineage = cls(**{name: _frozen(value) for name, value in document.items()})
        lineage._check_columns()
        if len(lineage.encode()) > MAX_LINEAGE_BYTES:
            raise TooLargeError(
                f"the lineage document is over {MAX_LINEAGE_BYTES} bytes",
                code="lineage_too_large",
                hint="Store large values as files of the version and name their digest here.",
            )
        return lineage

    @classmethod
    def decode(cls, data: bytes) -> "Lineage":
        """Return the lineage that `encode` wrote; raises ValidationError for anything else."""
        try:
            document = json.loads(data)
        except ValueError:
            raise _invalid("lineage", "UTF-8 JSON", data[:60]) from None
        return cls.parse(document)

    def encode(self) -> bytes:
        """Return canonical JSON but for `definitions`: equal lineages give equal bytes.

        Their keys keep their order: that of request fields and of an entity's key columns means
        something.
        """
        parts = ((name, _encode(name, value)) for name, value in sorted(asdict(self).items()))
        return b"{" + b",".join(canonical_json(name) + b":" + text for name, text in parts) + b"}"

    def _check_columns(self) -> None:
        if set(self.columns) != self.dtypes.keys():
            raise _invalid("dtypes", "exactly the names in columns", sorted(self.dtypes))
        if not set(self.categorical) <= set(self.columns):
            raise _invalid("categorical", "names out of columns", self.categorical)
        if "num_threads" not in self.params:
            raise _invalid("params", "every parameter including num_threads", sorted(self.params))


def _text(value: object) -> bool:
    return is_text(value) and bool(value)


def _optional_text(value: object) -> bool:
    return value is None or _text(value)


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(value: object) -> bool:
    return _integer(value) and cast(int, value) >= 0


def _texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(map(_text, value))


def _distinct_texts(value: object) -> bool:
    return _texts(value) and len(set(cast(list[str], value))) == len(cast(list[str], value)) > 0


def _text_map(value: object) -> bool:
    return _json_map(value) and all(map(_text, cast(Mapping[str, Any], value).values()))


def _json_map(value: object) -> bool:
    return isinstance(value, Mapping) and is_json(value)


def _mode(value: object) -> bool:
    return value in ("as_known", "as_corrected", "as_of_sequence")


_Rule = tuple[Callable[[object], bool], str]
_TEXT: _Rule = (_text, "text that isn't empty")
_OPTIONAL: _Rule = (_optional_text, "text or null")
_INTEGER: _Rule = (_integer, "an integer")
_COUNT: _Rule = (_count, "an integer of at least 0")
_TEXTS: _Rule = (_texts, "a list of texts")
_COLUMNS: _Rule = (_distinct_texts, "a list of distinct texts, at least one")
_TEXT_MAP: _Rule = (_text_map, "a mapping of texts to texts")
_JSON_MAP: _Rule = (_json_map, "a JSON mapping with finite numbers")
_OPTIONAL_MAP: _Rule = (lambda value: value is None or _json_map(value), "a JSON mapping or null")

_RULES: Mapping[str, _Rule] = {
    "service": _TEXT,
    "service_hash": _TEXT,
    "definitions_hash": _TEXT,
    "definitions": _OPTIONAL_MAP,
    "spine": _JSON_MAP,
    "label": _TEXT,
    "mode": (_mode, "as_known, as_corrected or as_of_sequence"),
    "as_of_us": _INTEGER,
    "as_of_sequence": _COUNT,
    "rows": _COUNT,
    "row_set_digest": _TEXT,
    "columns": _COLUMNS,
    "dtypes": _TEXT_MAP,
    "categorical": _TEXTS,
    "split": _JSON_MAP,
    "trainer": _TEXT,
    "seed": _INTEGER,
    "params": _JSON_MAP,
    "best_iteration": _COUNT,
    "tree_digest": _TEXT,
    "metrics": _JSON_MAP,
    "packages": _TEXT_MAP,
    "cpu_flags": _TEXTS,
    "parent": _OPTIONAL,
    "git_commit": _OPTIONAL,
    "git_diff": _OPTIONAL,
    "job": _OPTIONAL,
    "run_id": _OPTIONAL,
    "vectors_digest": _OPTIONAL,
    "calibration": _OPTIONAL_MAP,
}


def _check_names(document: Mapping[Any, Any]) -> None:
    for name in document:
        if name not in _RULES:
            raise ValidationError(
                f"lineage has the unknown field {name!r}",
                code="invalid_lineage",
                hint=f"Known fields: {', '.join(_RULES)}.",
            )
    for field in fields(Lineage):
        if field.default is MISSING and field.name not in document:
            raise ValidationError(
                f"lineage lacks the field {field.name!r}",
                code="invalid_lineage",
                hint=f"{field.name} is {_RULES[field.name][1]}.",
            )


def _check_field(name: str, value: object) -> None:
    holds, expected = _RULES[name]
    if not holds(value):
        raise _invalid(name, expected, value)


def _encode(name: str, value: Any) -> bytes:
    if name != "definitions":
        return canonical_json(value)
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _frozen(value: Any) -> Any:
    """Return an own copy, keys in their order: through JSON for mappings, a tuple for a list."""
    if isinstance(value, Mapping):
        return json.loads(json.dumps(value))
    return tuple(value) if isinstance(value, list | tuple) else value


def _invalid(name: str, expected: str, value: object) -> ValidationError:
    return ValidationError(
        f"lineage field {name!r} takes {expected}, got {repr(value)[:60]}",
        code="invalid_lineage",
        hint="docs/formats/registry.md lists every field.",
        details={"field": name},
    )
