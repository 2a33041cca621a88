"""Which rows of a spine lie before the horizon: what they would have to see is no longer kept."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mlpd.core.errors import ValidationError
from mlpd.core.specs import Closure, ViewSpec
from mlpd.core.time import format_duration, format_time
from mlpd.features.catalog import Catalog
from mlpd.features.winners import Mode
from mlpd.storage.horizons import Horizon

Horizons = Mapping[str, Horizon]
"""By source; see `load_horizons`."""
Bools = NDArray[np.bool_]


def find_gone(
    catalog: Catalog,
    closure: Closure,
    horizons: Horizons,
    t_us: NDArray[np.int64],
    sequences: NDArray[np.int64] | None = None,
) -> dict[str, Bools]:
    """Return, by view, which rows lie before its horizon, bool [n]; views without such are omitted.

    `sequences`: of reads `as_of_sequence`, the last that each row saw; None for other modes.
    """
    found = {}
    for view in _views(catalog, closure):
        horizon = horizons.get(view.source)
        if horizon is None:
            continue
        gone = t_us < first_moment(view, horizon)
        if sequences is not None and view.kind == "latest":
            gone |= sequences < horizon.sequence
        if gone.any():
            found[view.name] = gone
    return found


def find_kept(
    catalog: Catalog,
    closure: Closure,
    horizons: Horizons,
    t_us: NDArray[np.int64],
    sequences: NDArray[np.int64] | None = None,
) -> Bools:
    """Return of which rows all that they see is still kept, bool [n]; see `find_gone`."""
    kept = np.ones(len(t_us), np.bool_)
    for gone in find_gone(catalog, closure, horizons, t_us, sequences).values():
        kept &= ~gone
    return kept


def first_moment(view: ViewSpec, horizon: Horizon) -> int:
    """Return the first t at which a read of the view needs nothing that is gone."""
    return horizon.before_us + view.reach_us


def check_kept(
    catalog: Catalog,
    closure: Closure,
    horizons: Horizons,
    t_us: NDArray[np.int64],
    sequences: NDArray[np.int64] | None,
    mode: Mode,
) -> None:
    """Raise ValidationError(code="history_gone") if a row lies before the horizon of a view."""
    asked = sequences if mode == "as_of_sequence" else None
    for name, gone in find_gone(catalog, closure, horizons, t_us, asked).items():
        view = next(view for view in _views(catalog, closure) if view.name == name)
        raise _history_gone(view, horizons[view.source], gone, t_us, asked)


def _views(catalog: Catalog, closure: Closure) -> list[ViewSpec]:
    layout = catalog.layout(closure)
    return [part.view.view for part in (*layout.latest, *layout.windows)]


def _history_gone(
    view: ViewSpec,
    horizon: Horizon,
    gone: Bools,
    t_us: NDArray[np.int64],
    sequences: NDArray[np.int64] | None,
) -> ValidationError:
    first_us, row = first_moment(view, horizon), int(np.flatnonzero(gone)[0])
    asked = format_time(int(t_us[row]))
    if sequences is not None and t_us[row] >= first_us:
        asked, possible = f"sequence {sequences[row]}", f"sequence {horizon.sequence}"
    else:
        possible = format_time(first_us)
    reach = f", and its windows look back {format_duration(view.reach_us)}" if view.reach_us else ""
    return ValidationError(
        f"{int(gone.sum())} of {len(gone)} rows lie before the horizon of view {view.name!r}, row "
        f"{row} at {asked}: source {view.source!r} has its history from "
        f"{format_time(horizon.before_us)} on{reach}",
        code="history_gone",
        hint=f"Begin at {possible}, or leave the view out. A longer 'retention' of the source "
        "keeps more from now on.",
        details={"view": view.name, "source": view.source, "first_us": first_us},
    )
