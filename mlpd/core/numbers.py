"""Numbers from outside: JSON's integers have any size, and its floats may be infinite."""

import sys
from typing import Final, TypeGuard

FLOAT_MAX: Final = sys.float_info.max


def is_finite(value: object) -> TypeGuard[float]:
    """Tell whether a value is a number that float64 can hold, or a bool.

    >>> [is_finite(value) for value in (1.5, True, 10**400, float("nan"), "1")]
    [True, True, False, False, False]
    """
    return isinstance(value, int | float) and -FLOAT_MAX <= value <= FLOAT_MAX


def is_number(value: object) -> TypeGuard[float]:
    """Tell whether a value is a number that float64 can hold; true and false aren't numbers."""
    return is_finite(value) and not isinstance(value, bool)
