"""The naming rules of our metrics as a function, for tests: one complaint per broken rule.

After https://prometheus.io/docs/practices/naming/ and promtool's `check metrics`.
"""

import re
from collections.abc import Iterable
from typing import Final

from mlpd.monitoring.instruments import Descriptor
from mlpd.monitoring.metrics import Registry

MIRRORED_PREFIX: Final = "nv_"
"""Names that Triton's users have dashboards for; they keep Triton's own conventions."""
ALLOWED_LABELS: Final = frozenset({
    "alertname", "arm", "cause", "code", "collector", "family", "feature", "folder", "follower",
    "job", "kind", "method", "model", "operation", "phase", "quantile", "reason", "result", "role",
    "route", "shard", "sink", "source", "stage", "state", "status", "version", "view",
})  # fmt: skip
"""Bounded dimensions.  An entity key, unit or prediction id is never a label."""

_BASE_UNITS: Final = frozenset({"", "seconds", "bytes", "ratio", "celsius", "volts"})
_SCALED = re.compile(
    r"_(ms|us|ns|milliseconds|microseconds|minutes|hours|days|kb|mb|gb|percent)(_|$)"
)
_RESERVED = ("_count", "_sum", "_bucket", "_created")


def lint(registry: Registry) -> list[str]:
    """Return the complaints about every family and collected metric of a registry."""
    declared = [family.descriptor for family in registry.families()]
    return lint_descriptors([*declared, *(item.descriptor for item in registry.collect())])


def lint_descriptors(descriptors: Iterable[Descriptor]) -> list[str]:
    """Return one line per broken rule, in order; empty when every name is as it should be."""
    return [
        f"{descriptor.name}: {complaint}"
        for descriptor in descriptors
        if not descriptor.name.startswith(MIRRORED_PREFIX)
        for complaint in _complaints(descriptor)
    ]


def _complaints(descriptor: Descriptor) -> list[str]:
    name = descriptor.base_name
    bad_labels = sorted(set(descriptor.labels) - ALLOWED_LABELS)
    is_info = descriptor.kind == "info"
    rules = {
        "must start with mlpd_": not name.startswith("mlpd_"),
        "must be lower_snake_case": name != name.lower() or "__" in name,
        "must use a base unit (seconds, bytes, ratio)": bool(_SCALED.search(name)),
        f"unit {descriptor.unit!r} is not a base unit": descriptor.unit not in _BASE_UNITS,
        "must declare the unit that its name ends with": _missing_unit(descriptor),
        "only a counter ends with _total": name.endswith("_total"),
        f"must not end with one of {_RESERVED}": name.endswith(_RESERVED),
        "needs a help text that ends with a full stop": not descriptor.help.endswith("."),
        f"labels {bad_labels} are not bounded dimensions": bool(bad_labels) and not is_info,
    }
    return [complaint for complaint, broken in rules.items() if broken]


def _missing_unit(descriptor: Descriptor) -> bool:
    last = descriptor.base_name.rpartition("_")[2]
    return last in _BASE_UNITS and last != descriptor.unit
