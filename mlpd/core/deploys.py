"""Deploy steps of jobs: what a version that passes its gate becomes."""

import re

from mlpd.core.errors import ValidationError

NONE, SHADOW, CHAMPION = "none", "shadow", "champion"
_CANARY = re.compile(r"canary ([0-9]{1,2}(?:\.[0-9]{1,4})?)%")


def check_deploy(step: object) -> str:
    """Return a deploy step: `none`, `shadow`, `canary 5%` (of the rows) or `champion`.

    Raises ValidationError(code="invalid_deploy") for anything else.

    >>> check_deploy("canary 2.5%")
    'canary 2.5%'
    """
    if step in (NONE, SHADOW, CHAMPION) or canary_share(step):
        return str(step)
    raise ValidationError(
        f"{step!r:.60} is no deploy step",
        code="invalid_deploy",
        hint="It is one of none, shadow, champion, or a canary's share such as 'canary 5%'.",
    )


def canary_share(step: object) -> float | None:
    """Return which share of the rows a canary step asks for, in (0, 1); None for another step."""
    match = _CANARY.fullmatch(step) if isinstance(step, str) else None
    return float(match[1]) / 100 or None if match else None
