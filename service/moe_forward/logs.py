"""Logging of a process: standard library records, one line of text or one JSON object each, extra fields kept."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import lru_cache
from itertools import islice
from typing import Any, Literal, TextIO

REST_SECONDS = 0.02
"""How late the line of a request may be written; a process that is killed loses those of so long."""
MOST_WAITING = 256

_BORN_WITH = len(logging.makeLogRecord({}).__dict__)
"""How many attributes every record is made with; what it was given came after them."""

STANDARD_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}
"""What every record carries; anything else was given as `extra` (uvicorn adds a coloured copy of its message)."""

_PLAIN = re.compile(r"[!#-<>-~]+")
"""Printable ASCII without a space, a quote or an equals sign."""


def extra_fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return what the caller passed as `extra`, without fields that are None or private (Ray adds one)."""
    return {
        name: value
        for name, value in islice(record.__dict__.items(), _BORN_WITH, None)
        if value is not None and name not in STANDARD_FIELDS and name[0] != "_"
    }


def _timestamp(record: logging.LogRecord) -> str:
    seconds = int(record.created)
    return f"{_second(seconds)}.{int((record.created - seconds) * 1000):03d}Z"


@lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, tz=timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")


def _one_line(text: str) -> str:
    return text.replace("\r", "\\r").replace("\n", "\\n")


def _text_value(value: Any) -> str:
    """Bare where that is unambiguous, else as JSON: a value can never look like another field or another line."""
    kind = type(value)
    if kind is float:
        return f"{value:.6g}"
    text = str(value)
    if kind is int:
        return text
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


class TextFormatter(logging.Formatter):
    """`time LEVEL logger: message key=value ...`, then the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        fields = "".join(f" {name}={_text_value(value)}" for name, value in extra_fields(record).items())
        line = f"{_timestamp(record)} {record.levelname} {record.name}: {_one_line(record.getMessage())}{fields}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the extra fields, and exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON; a value JSON has no form for is written as its text."""
        fields: dict[str, Any] = {
            **extra_fields(record),
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


class _Together(logging.StreamHandler[TextIO]):
    """Writes lines of finished requests together, `REST_SECONDS` after the first of them; others at once, behind them.

    Formatted one by one, each between two requests, a line takes four times as long: its code has left the caches.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._waiting: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or keep it for a moment."""
        self._waiting.append(record)
        if not getattr(record, "_may_wait", False) or len(self._waiting) == MOST_WAITING:
            self._write_waiting()
        elif len(self._waiting) == 1:
            try:
                asyncio.get_running_loop().call_later(REST_SECONDS, self.flush)
            except RuntimeError:  # no loop that could come back to it
                self._write_waiting()

    def flush(self) -> None:
        """Write what waits; also called when the process ends."""
        self.acquire()
        try:
            self._write_waiting()
        finally:
            self.release()

    def _write_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        try:
            self.stream.write("".join(f"{self.format(record)}{self.terminator}" for record in waiting))
            super().flush()
        except Exception:  # as every handler does: a log that cannot be written must not end what it tells of
            self.handleError(waiting[-1])


class _Always(logging.Filter):
    """Adds the same extra fields to every record; what a record brings itself stays."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self._fields = dict(fields)

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass."""
        record.__dict__.update({**self._fields, **extra_fields(record)})
        return True


def configure(
    level: str,
    format: Literal["text", "json"],
    stream: TextIO | None = None,
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Send the whole process' log through one handler; calling it again replaces what an earlier call set.

    level: debug, info, warning or error. stream: default standard error.
    fields: which every record of this process has, such as the number of a front end.
    """
    # No line says these, and to ask for them is half of what a record costs.
    for name in ("logThreads", "logProcesses", "logMultiprocessing", "logAsyncioTasks"):  # the last one since 3.12
        setattr(logging, name, False)
    handler = _Together(stream or sys.stderr)
    if fields:
        handler.addFilter(_Always(fields))
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):  # they bring handlers of their own
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    # one line per request is ours, with the fields an operator needs; a second one from uvicorn is noise
    logging.getLogger("uvicorn.access").disabled = True


def log_request(log: logging.Logger, level: int, fields: Mapping[str, Any]) -> None:
    """Write the one line of a finished request; `fields` must not hold anything a client sent as tensor data."""
    if not log.isEnabledFor(level):
        return
    # What `log.log` does, without looking through the stack for a line of code that is always the same.
    record = logging.getLogRecordFactory()(log.name, level, __file__, 0, "request", (), None, "log_request")
    record.__dict__.update(fields)
    if level <= logging.INFO:
        record.__dict__["_may_wait"] = True
    log.handle(record)
