"""Child entry `erase`: segments written anew without the rows of an order's keys."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpd.core.columns import DType
from mlpd.daemon.child import Send
from mlpd.features.event_ids import encode_ids
from mlpd.storage.environment import Environment
from mlpd.storage.files import DataDirectory
from mlpd.storage.frames import from_series
from mlpd.storage.rewrite import Doomed, rewrite_without, rewriting

if TYPE_CHECKING:
    import polars as pl


def run(request: Mapping[str, Any], _: Send) -> dict[str, Any]:
    """Write the files; return the new `manifests`, encoded, and the rows' `event_ids` by source.

    `columns`: the key columns with their types, in order; `keys`: as many values each; `through`,
    `cause`; `event_ids`: the column of the sources that declare one, and its type.
    """
    hint = "Free space or mend the disk; the erasure goes on by itself."
    with rewriting(Path(request["directory"]), hint=hint) as (environment, data):
        return rewrite(environment, data, request)


def rewrite(
    environment: Environment, data: DataDirectory, request: Mapping[str, Any]
) -> dict[str, Any]:
    """Do it in this process; raises OSError."""
    event_ids: dict[str, list[bytes]] = {}

    def note(source: str, rows: "pl.DataFrame") -> None:
        declared = request["event_ids"].get(source)
        if declared is not None and declared[0] in rows.columns:
            column = from_series(rows[declared[0]].drop_nulls(), DType(declared[1]))
            event_ids.setdefault(source, []).extend(filter(None, encode_ids(column)))

    doomed = Doomed(
        {name: DType(dtype) for name, dtype in request["columns"]},
        [tuple(key) for key in request["keys"]],
        request["through"],
        request["cause"],
    )
    manifests = rewrite_without(environment, data.segments, doomed, note)
    return {"manifests": [m.encode() for m in manifests], "event_ids": event_ids}
