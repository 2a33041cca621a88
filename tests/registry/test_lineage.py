import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.errors import TooLargeError, ValidationError
from mlpd.registry.json_values import is_json
from mlpd.registry.lineage import MAX_LINEAGE_BYTES, Lineage


def test_bytes_are_equal_whatever_the_order_of_the_mapping(lineage: dict[str, Any]) -> None:
    turned = dict(reversed(lineage.items()))
    turned["params"] = dict(reversed(lineage["params"].items()))
    assert Lineage.parse(turned).encode() == Lineage.parse(lineage).encode()


def test_decode_gives_back_what_was_encoded(lineage: dict[str, Any]) -> None:
    parsed = Lineage.parse(lineage)
    assert Lineage.decode(parsed.encode()) == parsed
    assert parsed.columns == ("carrier", "distance")
    assert parsed.parent is None


def test_the_order_of_request_fields_and_key_columns_is_kept(lineage: dict[str, Any]) -> None:
    request = {"z": "float64", "a": "float64"}
    lineage["definitions"] = {"services": {"s": {"request": request}}}
    decoded = Lineage.decode(Lineage.parse(lineage).encode())
    assert decoded.definitions is not None
    assert list(decoded.definitions["services"]["s"]["request"]) == ["z", "a"]


def test_later_changes_of_the_mapping_do_not_reach_the_lineage(lineage: dict[str, Any]) -> None:
    parsed = Lineage.parse(lineage)
    lineage["params"]["seed"] = 1
    lineage["columns"].append("x")
    assert "seed" not in parsed.params
    assert parsed.columns == ("carrier", "distance")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("service", ""),
        ("service", 3),
        ("label", "\ud800"),
        ("mode", "whenever"),
        ("as_of_sequence", -1),
        ("as_of_us", 1.5),
        ("rows", True),
        ("columns", []),
        ("columns", ["carrier", "carrier"]),
        ("columns", ["carrier"]),
        ("dtypes", {"carrier": "string"}),
        ("dtypes", {"carrier": 1, "distance": "float64"}),
        ("categorical", ["origin"]),
        ("params", {"learning_rate": 0.1}),
        ("params", {"num_threads": float("nan")}),
        ("metrics", {"auc": float("inf")}),
        ("metrics", {1: 0.5}),
        ("spine", []),
        ("packages", None),
        ("definitions", "text"),
        ("parent", ""),
        ("colour", "red"),
    ],
)
def test_a_wrong_field_is_named(lineage: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        Lineage.parse(lineage | {field: value})
    assert caught.value.code == "invalid_lineage"
    assert caught.value.hint


def test_every_required_field_is_required(lineage: dict[str, Any]) -> None:
    for field in lineage.keys() - {"categorical"}:
        with pytest.raises(ValidationError, match=field):
            Lineage.parse({name: v for name, v in lineage.items() if name != field})


@pytest.mark.parametrize("document", [None, [], "text", 5])
def test_what_is_no_mapping_is_refused(document: object) -> None:
    with pytest.raises(ValidationError):
        Lineage.parse(document)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]"])
def test_bytes_that_are_no_lineage_are_refused(data: bytes) -> None:
    with pytest.raises(ValidationError):
        Lineage.decode(data)


def test_a_document_over_the_limit_is_refused(lineage: dict[str, Any]) -> None:
    lineage["definitions"] = {"text": "x" * MAX_LINEAGE_BYTES}
    with pytest.raises(TooLargeError):
        Lineage.parse(lineage)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(_JSON)
def test_all_json_is_json_and_survives_its_bytes(value: object) -> None:
    assert is_json(value)
    assert json.loads(json.dumps(value, allow_nan=False)) == value


def test_nesting_is_bounded() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    assert not is_json(value)
