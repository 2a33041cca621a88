"""Diff: what two versions have in common and what not: lineage, parameters, features, trees."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from mlpd.registry.lineage import Lineage
from mlpd.registry.versions import LoadedVersion

TEXT_FILE, REPORT_FILE = "model.txt", "report.json"

_APART = ("params", "metrics", "columns", "dtypes", "packages", "definitions", "tree_digest")
"""Fields of the lineage that have a part of their own, or are too long to show."""

_TREE = re.compile(rb"^Tree=\d+\n(.*?)(?=^Tree=|^end of trees)", re.MULTILINE | re.DOTALL)
_LEAVES = re.compile(rb"^num_leaves=(\d+)$", re.MULTILINE)


def diff_versions(old: LoadedVersion, new: LoadedVersion) -> dict[str, Any]:
    """Return what changes from `old` to `new`; about 1 ms per MB of `model.txt`.

    Lists hold `{"name", "from", "to"}` of what differs alone, null where a side has none.
    `metrics` hold all, with `difference`.  `features` has `added`, `removed`, `retyped`,
    `reordered` and `gain`: each feature's share of the gain, the largest change first.  `trees` is
    null unless both are ensembles: how many, their leaves, how many from the first on are equal.
    """
    left, right = asdict(old.lineage), asdict(new.lineage)
    return {
        "from": old.version.reference,
        "to": new.version.reference,
        "same": old.version.digest == new.version.digest,
        "lineage": _changes(_without(left), _without(right)),
        "parameters": _changes(left.get("params", {}), right.get("params", {})),
        "metrics": _metrics(left.get("metrics", {}), right.get("metrics", {})),
        "features": _features(old, new),
        "trees": _trees(old.files.get(TEXT_FILE), new.files.get(TEXT_FILE)),
        "packages": _changes(left["packages"], right["packages"]),
        "files": _changes(_digests(old), _digests(new)),
    }


def _changes(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": name, "from": left.get(name), "to": right.get(name)}
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    ]


def _without(lineage: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in lineage.items() if name not in _APART}


def _metrics(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for name in sorted(left.keys() | right.keys()):
        before, after = left.get(name), right.get(name)
        numbers = all(isinstance(value, int | float) for value in (before, after))
        difference = after - before if numbers else None  # type: ignore[operator]  # both are
        found.append({"name": name, "from": before, "to": after, "difference": difference})
    return found


def _features(old: LoadedVersion, new: LoadedVersion) -> dict[str, Any]:
    left, right = _types(old), _types(new)
    common = [name for name in left if name in right]
    return {
        "added": [name for name in right if name not in left],
        "removed": [name for name in left if name not in right],
        "retyped": _changes({n: left[n] for n in common}, {n: right[n] for n in common}),
        "reordered": common != [name for name in right if name in left],
        "gain": _gains(old, new),
    }


def _types(version: LoadedVersion) -> dict[str, str]:
    """Return the columns with their types, in the order of the vector."""
    lineage = version.lineage
    if isinstance(lineage, Lineage):
        return {name: lineage.dtypes[name] for name in lineage.columns}
    inputs = json.loads(version.files["signature.json"])["inputs"]
    return {spec["name"]: f"{spec['datatype']} {spec['shape']}" for spec in inputs}


def _gains(old: LoadedVersion, new: LoadedVersion) -> list[dict[str, Any]]:
    left, right = _shares(old), _shares(new)
    pairs = {n: (left.get(n, 0.0), right.get(n, 0.0)) for n in left.keys() | right.keys()}
    ranked = sorted(pairs, key=lambda name: (-abs(pairs[name][1] - pairs[name][0]), name))
    return [{"name": name, "from": pairs[name][0], "to": pairs[name][1]} for name in ranked]


def _shares(version: LoadedVersion) -> dict[str, float]:
    report = json.loads(version.files.get(REPORT_FILE, b"{}"))
    gains: dict[str, float] = report.get("importance") or {}
    total = sum(gains.values())
    return {name: gain / total for name, gain in gains.items()} if total > 0 else {}


def _trees(left: bytes | None, right: bytes | None) -> dict[str, Any] | None:
    if left is None or right is None:
        return None
    before, after = [*_blocks(left)], [*_blocks(right)]
    pairs = zip(before, after, strict=False)
    differing = (index for index, (a, b) in enumerate(pairs) if a != b)
    equal = next(differing, min(len(before), len(after)))
    return {
        "from": len(before),
        "to": len(after),
        "leaves_from": sum(map(_leaves, before)),
        "leaves_to": sum(map(_leaves, after)),
        "equal": equal,
        "same": before == after,
    }


def _blocks(text: bytes) -> Iterator[bytes]:
    """Yield the trees of LightGBM's text: equal text is an equal tree, to the bit."""
    return (match[1].strip() for match in _TREE.finditer(text))


def _leaves(tree: bytes) -> int:
    found = _LEAVES.search(tree)
    return int(found[1]) if found else 0


def _digests(version: LoadedVersion) -> dict[str, str]:
    return {name: pointer.digest for name, pointer in version.manifest.files.items()}
