"""Deterministic draws: a unit's number in [0, 1), and its arm by weighted rendezvous hashing."""

import math
from collections.abc import Mapping
from hashlib import blake2b

from mlpd.core.errors import DefinitionError

SEPARATOR = "\x1f"
"""ASCII unit separator between hashed parts; names can't contain it, and the unit comes last."""

_SCALE = 2.0**-53
_NEAR_ZERO = 2.0**-54  # stands in for a draw of exactly 0, whose logarithm doesn't exist


def salt(*parts: str) -> bytes:
    r"""Return the bytes hashed before a unit: every part in UTF-8, each followed by the separator.

    >>> salt("exposure", "checkout")
    b'exposure\x1fcheckout\x1f'
    """
    return "".join(part + SEPARATOR for part in parts).encode()


def unit_bytes(unit: str) -> bytes:
    """Return a unit as hashed: UTF-8, lone surrogates (JSON can carry them) kept as they are."""
    return unit.encode("utf-8", "surrogatepass")


def draw(salted: bytes, unit: bytes) -> float:
    """Return u in [0, 1), a multiple of 2^-53: the same on every machine and for ever.

    u = (BLAKE2b-64(salted + unit), read as a big-endian integer, >> 11) / 2^53, where BLAKE2b-64
    is BLAKE2b with an 8-byte digest and no key.  Different salts give independent draws.
    Test vectors: tests/experiments/golden_draws.json.  Costs about 1.3 us.
    """
    digest = blake2b(salted + unit, digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * _SCALE


class Rendezvous:
    """Weighted choice among arms by highest random weight, deterministic in the unit.

    Arm a has its own draw u_a, from the parts (*salt_parts, a, unit), and the score -w_a / ln u_a:
    the largest score wins, which happens with probability w_a / sum(w).  As an arm's score depends
    on its own weight alone, raising one weight moves units only to that arm, and no unit between
    two others: the fewest possible.  Arms of weight 0 never win.  Ties go to the arm listed first.

    Parameters: `salt_parts` name the use, for example `("exposure", experiment)` or
    `("route", route)`; `weights` maps arm to weight, finite, >= 0, at least one > 0, on any scale.
    Reference: Schindelhauer & Schomaker, "Weighted distributed hash tables" (SPAA 2005).

    >>> Rendezvous(("route", "flight-risk"), {"v1": 1, "v2": 0}).choose("N14228")
    'v1'
    """

    __slots__ = ("_contenders", "propensities")

    def __init__(self, salt_parts: tuple[str, ...], weights: Mapping[str, float]) -> None:
        total = checked_total(weights)
        self.propensities: dict[str, float] = {a: w / total for a, w in weights.items()}
        """Probability of each arm over the randomisation, zero-weight arms included."""
        self._contenders = tuple(
            (arm, weight, salt(*salt_parts, arm)) for arm, weight in weights.items() if weight > 0
        )

    def choose(self, unit: str) -> str:
        """Return the arm of `unit`.  Costs about 1.9 us per arm of positive weight."""
        data = unit_bytes(unit)
        best, best_score = self._contenders[0][0], -1.0
        for arm, weight, salted in self._contenders:
            score = -weight / math.log(draw(salted, data) or _NEAR_ZERO)
            if score > best_score:
                best, best_score = arm, score
        return best


def checked_total(weights: Mapping[str, float]) -> float:
    """Return the sum of the weights, or raise DefinitionError if they can't share traffic."""
    for arm, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise DefinitionError(
                f"weight of arm {arm!r} is {weight!r}, expected a finite number >= 0",
                code="invalid_weights",
                hint="Weights are relative: {'v1': 99, 'v2': 1} sends 1 % to v2.",
            )
    total = math.fsum(weights.values())
    if not 0 < total < math.inf:
        raise DefinitionError(
            f"weights of arms {', '.join(weights) or '(none)'} sum to {total:g}",
            code="invalid_weights",
            hint="Give at least one arm a weight above 0.",
        )
    return total
