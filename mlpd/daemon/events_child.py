"""Child entry `events`: the history of a source in blocks, for building a view from the log."""

from typing import Any

from mlpd.core.columns import encode_columns
from mlpd.daemon.child import Send
from mlpd.daemon.offline import event_columns, open_offline
from mlpd.features.stamps import stamps_of


def run(request: dict[str, Any], send: Send) -> int:
    """Send the events of `source` in blocks of `rows`; returns how many there were.

    A block: the three stamps as int64 bytes and the encoded columns.
    """
    with open_offline(request) as offline:
        schema = offline.catalog.schemas[request["source"]]
        frame = offline.frame(request["source"], schema)
    for part in frame.iter_slices(request["rows"]):
        columns = event_columns(part, schema, schema)
        stamps = [stamp.tobytes() for stamp in stamps_of(part)]
        send({"kind": "block", "stamps": stamps, "columns": encode_columns(columns)})
    return frame.height
