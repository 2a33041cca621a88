"""Matchers: label=pattern pairs that choose alerts, for silences and for what an alert begins."""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from mlpd.core.errors import ValidationError

MATCHERS_MAX = 16
PATTERN_CHARS_MAX = 256

_LABEL = re.compile(r"[a-z][a-z0-9_]*")


def parse_matchers(texts: Iterable[str]) -> dict[str, str]:
    """Return pattern by label of texts like `model=flight-risk`; a pattern is a shell's.

    Raises ValidationError(code="invalid_matcher"): none, malformed, or too many.
    """
    return check_matchers(dict(_parse(text) for text in texts))


def check_matchers(matchers: Mapping[str, object]) -> dict[str, str]:
    """Return matchers that came as an object; raises as `parse_matchers`."""
    if not 0 < len(matchers) <= MATCHERS_MAX:
        raise _invalid(f"there are {len(matchers)} matchers, not 1 to {MATCHERS_MAX}")
    found = {}
    for label, pattern in matchers.items():
        if not isinstance(label, str) or not _LABEL.fullmatch(label):
            raise _invalid(f"{str(label)[:60]!r} is no label")
        if not isinstance(pattern, str) or not 0 < len(pattern) <= PATTERN_CHARS_MAX:
            raise _invalid(f"the pattern of {label!r} has not 1 to {PATTERN_CHARS_MAX} characters")
        found[label] = pattern
    return found


def matches(matchers: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether every matcher's label is there with a value of its pattern."""
    return all(
        label in labels and fnmatchcase(labels[label], pattern)
        for label, pattern in matchers.items()
    )


def _parse(text: str) -> tuple[str, str]:
    label, equals, pattern = text.partition("=")
    if not equals:
        raise _invalid(f"{text[:60]!r} is not LABEL=PATTERN")
    return label, pattern


def _invalid(problem: str) -> ValidationError:
    return ValidationError(
        problem,
        code="invalid_matcher",
        hint="For example model=flight-risk or feature=carrier_*; mlpd alerts list shows labels.",
    )
