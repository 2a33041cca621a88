"""Matchers: which labels they take, what they match."""

import pytest

from mlpd.core.errors import ValidationError
from mlpd.core.matchers import check_matchers, matches, parse_matchers

LABELS = {"alertname": "FeatureDrift", "model": "flight-risk", "feature": "weather.visib"}


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["model=flight-risk"], True),
        (["model=flight-*", "feature=weather.*"], True),
        (["model=flight-risk", "feature=carrier.*"], False),
        (["model=Flight-risk"], False),
        (["source=*"], False),  # a label that isn't there matches nothing
        (["feature=weather?visib"], True),
    ],
)
def test_all_labels_must_match(texts: list[str], expected: bool) -> None:
    assert matches(parse_matchers(texts), LABELS) is expected


def test_a_pattern_may_hold_an_equals_sign() -> None:
    assert parse_matchers(["feature=a=b"]) == {"feature": "a=b"}


@pytest.mark.parametrize("texts", [[], ["model"], ["=a"], ["model="], ["Model=a"], ["a b=c"]])
def test_malformed_ones_are_refused(texts: list[str]) -> None:
    with pytest.raises(ValidationError) as refused:
        parse_matchers(texts)
    assert refused.value.code == "invalid_matcher"


@pytest.mark.parametrize(
    "matchers",
    [{"model": 5}, {"model": "a" * 257}, {5: "a"}, {f"l{i}": "a" for i in range(17)}],
)
def test_objects_are_checked_likewise(matchers: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        check_matchers(matchers)
