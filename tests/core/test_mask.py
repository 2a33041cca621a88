"""Masks show a value's form and nothing of its content."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.mask import SHOWN_CHARS, mask


@pytest.mark.parametrize(
    ("value", "masked"),
    [
        ("2013-10-01 10:05", "9999-99-99 99:99"),
        ("Jane.Doe@example.org", "Aaaa.Aaa@aaaaaaa.aaa"),
        ("", ""),
        ("x" * 41, "a" * 40 + "... (41)"),
        ("a\nb\x1b[2J", "a?a?[9A"),
        ("\u00e4\u0416\u0661", "aA9"),
        ("\U0001f600", "?"),
        (-12.5, "float -99.9"),
        (7, "int 9"),
        (float("nan"), "float aaa"),
        (None, "null"),
        (True, "bool"),
        (b"secret", "bytes of 6"),
        ([1, 2], "list of 2"),
        ({"a": 1}, "dict of 1"),
    ],
)
def test_the_form_is_shown(value: Any, masked: str) -> None:
    assert mask(value) == masked


def test_a_number_that_python_refuses_to_write_has_a_form_too() -> None:
    assert mask(10**5000) == "int " + "9" * 40


@given(st.text())
def test_no_letter_or_digit_of_a_text_remains(text: str) -> None:
    masked = mask(text)
    assert len(masked) <= SHOWN_CHARS + 30
    assert set(masked[:SHOWN_CHARS]) - set("aA9?") <= {c for c in text if not c.isalnum()} | {"."}
    assert masked.isascii()
    assert masked.isprintable()
