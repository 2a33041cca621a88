"""The daemon's log: one JSON object a line on stderr, control characters escaped.

A line written on behalf of a request that came in a trace carries the trace's and span's ids; what
a caller hands over as `extra={"fields": {...}}` stands beside the message.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from mlpd.core.trace import get_span

_MESSAGE_CHARS_MAX = 4_000


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON: time, level, logger, message, and an error if any."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; json escapes whatever could forge another one."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:_MESSAGE_CHARS_MAX],
        }
        span = get_span()
        if span is not None and span.trace_id:
            line |= {"trace_id": span.trace_id, "span_id": span.span_id}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)[-_MESSAGE_CHARS_MAX:]
        return json.dumps(line)


def set_up_logging(*, verbose: bool) -> None:
    """Send all logs of this process to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("apscheduler").setLevel(logging.WARNING)
