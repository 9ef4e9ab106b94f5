"""Logging of a process: standard library records, one line of text or one JSON object each, extra fields kept."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from functools import lru_cache
from itertools import islice
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TextIO

REST_SECONDS = 0.02
"""How late the line of a request may be written; a process that is killed loses those of so long."""
MOST_WAITING = 32
"""Lines; to format more of them at a time would be a pause that requests notice."""

_BORN_WITH = len(logging.makeLogRecord({}).__dict__)
"""How many attributes every record is made with; what it was given came after them."""

STANDARD_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}
"""What every record carries; anything else was given as `extra` (uvicorn adds a coloured copy of its message)."""

_is_plain = re.compile(r"[!#-<>-~]+").fullmatch
"""Printable ASCII without a space, a quote or an equals sign."""

_ALIKE = {
    **logging.LogRecord("", 0, __file__, 0, "request", (), None, "log_request").__dict__,
    **dict.fromkeys(("thread", "threadName", "process", "processName")),
}
"""What all lines of requests have."""


class RequestLine(logging.LogRecord):
    """The record of a finished request, of which little is made before it is written.

    Handlers that know nothing of this class see what every record has, without the fields.

    tell: returns what it says, in order; fields that are None are left out.
    always: further fields, see `Always`.
    """

    always: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, name: str, level: int, tell: Callable[[], dict[str, Any]]) -> None:
        # what all of them have alike is known: to find it out is half of what a line costs
        self.__dict__.update(_ALIKE)
        self.name = name
        self.levelno = level
        self.levelname = logging.getLevelName(level)
        self.created = time.time()
        self.msecs = int(self.created % 1 * 1000) + 0.0  # as LogRecord does
        self._tell = tell

    def fields(self) -> dict[str, Any]:
        """Return what the line says."""
        fields = self._tell()
        for name, value in self.always.items():
            if fields.get(name) is None:
                fields[name] = value
        return fields

    @property
    def may_wait(self) -> bool:
        """Whether the line may be written a little later, with others."""
        return self.levelno <= logging.INFO


def _given(record: logging.LogRecord) -> Iterable[tuple[str, Any]]:
    if isinstance(record, RequestLine):
        return record.fields().items()
    return islice(record.__dict__.items(), _BORN_WITH, None)


def extra_fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return what the caller passed as `extra`, without fields that are None or private (Ray adds one)."""
    return {
        name: value
        for name, value in _given(record)
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


class _Template(NamedTuple):
    """How fields of certain names and types are written.

    pattern: for `%`. names: told ones. texts: places of those that are written as text.
    """

    pattern: str
    names: tuple[str, ...]
    texts: tuple[int, ...]


_PATTERNS = {int: "%d", float: "%.6g"}


@lru_cache(maxsize=256)
def _template(names: tuple[str, ...], kinds: tuple[type, ...]) -> _Template:
    told = [
        (name, kind)
        for name, kind in zip(names, kinds, strict=True)
        if kind is not type(None) and name not in STANDARD_FIELDS and name[0] != "_"
    ]
    pattern = "".join(f" {name.replace('%', '%%')}={_PATTERNS.get(kind, '%s')}" for name, kind in told)
    texts = tuple(place for place, (_, kind) in enumerate(told) if kind not in _PATTERNS)
    return _Template(pattern, tuple(name for name, _ in told), texts)


def _fields_text(fields: Mapping[str, Any]) -> str:
    """Return ` name=value` of each, by one pattern: requests have the same ones again and again.

    A text is bare where that is unambiguous, else JSON: it can never look like another field or another line.
    """
    pattern, names, texts = _template(tuple(fields), tuple(map(type, fields.values())))
    values = list(map(fields.__getitem__, names))
    for place in texts:
        text = values[place] = str(values[place])
        if not _is_plain(text):
            values[place] = json.dumps(text)
    return pattern % tuple(values)


class TextFormatter(logging.Formatter):
    """`time LEVEL logger: message key=value ...`, then the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        fields = _fields_text(record.fields() if isinstance(record, RequestLine) else extra_fields(record))
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
        if not (isinstance(record, RequestLine) and record.may_wait) or len(self._waiting) == MOST_WAITING:
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


class Always(logging.Filter):
    """Adds the same extra fields to every record; what a record brings itself stays."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self._fields = dict(fields)

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass."""
        if isinstance(record, RequestLine):
            record.always = self._fields
        else:
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
        handler.addFilter(Always(fields))
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


def log_request(log: logging.Logger, level: int, tell: Callable[[], dict[str, Any]]) -> None:
    """Write the one line of a finished request, soon.

    tell: returns its fields, nothing of which a client sent as tensor data; they must not change any more.
    """
    if log.isEnabledFor(level):
        log.handle(RequestLine(log.name, level, tell))
