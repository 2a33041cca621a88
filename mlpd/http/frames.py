"""Spines in rows, and the form that a joined frame is asked for in."""

from mlpd.core.columns import Columns
from mlpd.core.convert import column_of
from mlpd.core.errors import InvalidRequestError
from mlpd.core.media import ARROW, FRAME_FORMATS
from mlpd.core.specs import Closure
from mlpd.daemon.spines import check_names, spine_types
from mlpd.http.shapes import Rows


def read_spine(closure: Closure, rows: Rows) -> Columns:
    """Return the typed columns of a spine's rows; null is allowed, absence is not."""
    types = spine_types(closure)
    names = dict.fromkeys(name for row in rows for name in row) if rows else types
    check_names(closure, names)
    return {name: column_of(types[name], [row.get(name) for row in rows], name) for name in names}


def choose_frame_format(accept: str, name: str | None) -> str:
    """Return the media type by its short name, else by an Accept header; Arrow if neither says.

    Raises InvalidRequestError(code="not_acceptable").
    """
    if name is not None:
        return FRAME_FORMATS[name]
    kinds = tuple(FRAME_FORMATS.values())
    wanted = [part.partition(";")[0].strip() for part in accept.split(",")]
    for kind in wanted:
        if kind in kinds:
            return kind
    if accept and not {"*/*", "application/*"} & set(wanted):
        raise InvalidRequestError(
            f"frames don't come as {accept[:100]!r}",
            code="not_acceptable",
            hint=f"Accept one of {', '.join(kinds)}, or name a format: {', '.join(FRAME_FORMATS)}.",
        )
    return ARROW
