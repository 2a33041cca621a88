"""Child entry `events`: the history of a source in blocks, for building a view from the log."""

from typing import Any

from mlpd.core.columns import encode_columns
from mlpd.daemon.child import Send
from mlpd.daemon.offline import open_offline


def run(request: dict[str, Any], send: Send) -> int:
    """Send the events of `source` in blocks of `rows`; returns how many there were.

    A block: the three stamps as int64 bytes and the encoded columns.
    """
    with open_offline(request) as offline:
        schema = offline.catalog.definitions.source(request["source"]).schema
        events = offline.events(request["source"], tuple(schema))
    total = len(events.stamps.sequences)
    for start in range(0, total, request["rows"]):
        part = slice(start, start + request["rows"])
        columns = {name: column.take(part) for name, column in events.columns.items()}
        stamps = [stamp[part].tobytes() for stamp in events.stamps]
        send({"kind": "block", "stamps": stamps, "columns": encode_columns(columns)})
    return total
