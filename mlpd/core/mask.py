"""Values as they may be kept: their shape without their content, for samples of what was refused.

>>> mask("2013-10-01 10:05")
'9999-99-99 99:99'
>>> mask("Jane.Doe@example.org")
'Aaaa.Aaa@aaaaaaa.aaa'
>>> mask(-12.5), mask(None), mask(True)
('float -99.9', 'null', 'bool')
"""

from typing import Any

SHOWN_CHARS = 40


def mask(value: Any) -> str:
    """Return a short text that tells a value's type and form: letters are a, digits 9.

    What is no number, text or null is its type and, where it has one, its length.
    """
    if value is None:
        return "null"
    if isinstance(value, str):
        return _mask_text(value)
    kind = type(value).__name__
    if isinstance(value, int | float) and not isinstance(value, bool):
        # A huge integer has more digits than Python writes; its first ones say nothing anyway.
        big = isinstance(value, int) and value.bit_length() > 128  # noqa: PLR2004
        return f"{kind} {'9' * SHOWN_CHARS if big else _mask_text(repr(value))}"
    return f"{kind} of {len(value)}" if hasattr(value, "__len__") else kind


def _mask_text(text: str) -> str:
    shown = "".join(map(_mask_character, text[:SHOWN_CHARS]))
    return shown if len(text) <= SHOWN_CHARS else f"{shown}... ({len(text)})"


def _mask_character(character: str) -> str:
    if character.isdigit():
        return "9"
    if character.isalpha():
        return "A" if character.isupper() else "a"
    return character if character.isprintable() and character.isascii() else "?"
