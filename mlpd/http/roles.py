"""What a daemon answers that isn't an open owner: reads, as far as its role allows."""

from collections.abc import Mapping
from typing import Any

from aiohttp import web

from mlpd.core.errors import ValidationError
from mlpd.core.routing import MAX_STALENESS_HEADER, STALENESS_HEADER
from mlpd.daemon.app import Daemon
from mlpd.daemon.roles import elsewhere, refusal
from mlpd.http.routes import Route

_DIGITS_MAX = 12


def check_role(daemon: Daemon, route: Route) -> None:
    """Raise for a route that a daemon of this role doesn't answer.

    UnavailableError(code="promoting"), MisdirectedError(code="follower" or "fenced").
    """
    roles = daemon.roles
    if roles.is_open or route.anywhere or route.scope == "public":
        return
    role = roles.role
    if role.name in ("owner", "paused"):
        if route.scope == "read":
            return
        raise refusal(role)
    if not (role.follows and route.load == "features"):
        raise elsewhere(role, daemon.ownership.member)


def check_staleness(
    request: web.Request, daemon: Daemon, fields: Mapping[str, Any]
) -> dict[str, str]:
    """Return the header that says how stale a follower's answer may be, none for an owner.

    Raises UnavailableError(code="replica_behind") where that is more than the reader accepts, and
    the follower doesn't have `min_sequence`, which was waited for.
    """
    tailing, role = daemon.tailing, daemon.roles.role
    if not role.follows:
        return {}
    if fields.get("route") is not None:  # routes are for those that serve them
        raise elsewhere(role, daemon.ownership.member)
    accepted_s = _accepted_s(request, daemon.config.replica.max_staleness_us / 1e6)
    wanted = fields["min_sequence"] or 0
    if not 0 < wanted <= tailing.head.sequence:
        tailing.check_fresh(accepted_s)
    found_s = tailing.staleness_s
    return {STALENESS_HEADER: "unknown" if found_s == float("inf") else f"{found_s * 1e3:.0f}"}


def _accepted_s(request: web.Request, default_s: float) -> float:
    text = request.headers.get(MAX_STALENESS_HEADER)
    if text is None:
        return default_s
    if not (text.isascii() and text.isdecimal() and len(text) <= _DIGITS_MAX):
        raise ValidationError(
            f"{MAX_STALENESS_HEADER} is {text[:40]!r}, not a number of milliseconds",
            code="invalid_staleness",
        )
    return int(text) / 1e3
