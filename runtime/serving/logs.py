"""Logs: one JSON object a line, without what was asked and answered unless that is wanted."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

NAME = "runtime.serving"


class JsonLines(logging.Formatter):
    """Writes a record as one line of JSON: time, level, event, and the `fields` that it was given."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told: dict[str, Any] = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            told["trace"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


def configure(level: str) -> None:
    """Write the logs of the server, of the runtime and of uvicorn to stderr, from `level` on, and errors of asyncio."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    # Below errors asyncio tells of clients that have left, which is no news.
    for name, lowest in (("runtime", level.upper()), ("uvicorn", level.upper()), ("asyncio", "ERROR")):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(lowest)
        logger.propagate = False
