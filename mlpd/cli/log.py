"""The daemon's log: one JSON object a line on stderr, control characters escaped."""

import json
import logging
import sys
from datetime import UTC, datetime

_MESSAGE_CHARS_MAX = 4_000


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON: time, level, logger, message, and an error if any."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; json escapes whatever could forge another one."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:_MESSAGE_CHARS_MAX],
        }
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
