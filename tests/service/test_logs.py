from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_forward.errors import ErrorCode
from moe_forward.logs import (
    MOST_WAITING,
    REST_SECONDS,
    STANDARD_FIELDS,
    Always,
    JsonFormatter,
    RequestLine,
    TextFormatter,
    configure,
    extra_fields,
    log_request,
)

log = logging.getLogger("moe_forward.test")


def request(level: int, **fields: int) -> None:
    log_request(log, level, lambda: fields)


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Somewhere to log; the logging of the process is as before afterwards."""
    root, access = logging.getLogger(), logging.getLogger("uvicorn.access")
    before = list(root.handlers), root.level, access.disabled
    yield io.StringIO()
    root.handlers[:], access.disabled = before[0], before[2]
    root.setLevel(before[1])


def test_json_is_one_object_a_line_with_extra_fields(stream: io.StringIO) -> None:
    configure("info", "json", stream)
    log.info("two\nlines %d", 7, extra={"layer": 3, "note": None, "ratio": 0.5})
    (line,) = stream.getvalue().splitlines()
    fields = json.loads(line)
    assert fields.pop("time").endswith("Z")
    assert fields == {
        "level": "info",
        "logger": "moe_forward.test",
        "message": "two\nlines 7",
        "layer": 3,
        "ratio": 0.5,
    }


def test_json_keeps_the_traceback_and_values_without_a_json_form(stream: io.StringIO) -> None:
    configure("info", "json", stream)
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("failed", extra={"where": {1}})
    fields = json.loads(stream.getvalue())
    assert "ValueError: why" in fields["exception"]
    assert fields["where"] == "{1}"


def test_an_extra_field_cannot_replace_the_records_own(stream: io.StringIO) -> None:
    configure("info", "json", stream)
    log.info("real", extra={"level": "forged", "time": "forged", "logger": "forged"})
    fields = json.loads(stream.getvalue())
    assert (fields["level"], fields["logger"], fields["message"]) == ("info", "moe_forward.test", "real")


def test_text_is_one_line_with_key_value_pairs(stream: io.StringIO) -> None:
    configure("info", "text", stream)
    log.warning("slow", extra={"layer": 3, "seconds": 0.123456789, "name_of": "a b", "empty": ""})
    line = stream.getvalue()
    assert line.endswith('WARNING moe_forward.test: slow layer=3 seconds=0.123457 name_of="a b" empty=""\n')


@pytest.mark.parametrize("evil", ["a\nINFO forged: line", "x=1 code=200", 'q"uote', "é\u2028"])
def test_text_values_cannot_forge_a_line_or_a_field(stream: io.StringIO, evil: str) -> None:
    configure("info", "text", stream)
    log.info("request", extra={"request_id": evil})
    (line,) = stream.getvalue().splitlines()
    assert line.endswith(f"request request_id={json.dumps(evil)}")


def test_text_message_stays_on_one_line_and_traceback_follows(stream: io.StringIO) -> None:
    configure("info", "text", stream)
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("a\r\nb")
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("a\\r\\nb")
    assert rest[-1] == "ValueError: why"


def test_level_filters_and_a_second_call_replaces_the_first(stream: io.StringIO) -> None:
    configure("debug", "text", stream)
    configure("warning", "text", stream)
    log.info("hidden")
    log.warning("shown")
    assert stream.getvalue().count("\n") == 1


def test_uvicorns_own_records_come_through_once_and_its_access_log_not(stream: io.StringIO) -> None:
    configure("info", "json", stream)
    logging.getLogger("uvicorn.error").info("started", extra={"color_message": "\x1b[1mstarted"})
    logging.getLogger("uvicorn.access").info("GET /")
    (line,) = stream.getvalue().splitlines()
    assert "color_message" not in json.loads(line)


def test_request_lines_carry_their_fields_and_obey_the_level(stream: io.StringIO) -> None:
    configure("warning", "json", stream)
    request(logging.INFO, status=200)
    request(logging.ERROR, status=500)
    assert json.loads(stream.getvalue())["status"] == 500


async def test_request_lines_are_written_together_soon_after_the_first(stream: io.StringIO) -> None:
    configure("info", "json", stream)
    for number in range(3):
        request(logging.INFO, number=number)
    assert stream.getvalue() == ""
    while not stream.getvalue():
        await asyncio.sleep(REST_SECONDS)
    assert numbers(stream) == [0, 1, 2]


async def test_other_lines_are_written_at_once_and_behind_those_of_earlier_requests(stream: io.StringIO) -> None:
    configure("info", "json", stream)
    request(logging.INFO, number=0)
    log.info("told", extra={"number": 1})
    assert numbers(stream) == [0, 1]
    request(logging.INFO, number=2)
    request(logging.ERROR, number=3)
    assert numbers(stream) == [0, 1, 2, 3]


async def test_many_request_lines_do_not_wait_for_each_other(stream: io.StringIO) -> None:
    configure("info", "json", stream)
    for number in range(MOST_WAITING + 1):
        request(logging.INFO, number=number)
    assert numbers(stream) == list(range(MOST_WAITING))


async def test_what_waits_is_written_when_logging_ends(stream: io.StringIO) -> None:
    configure("info", "json", stream)
    request(logging.INFO, number=0)
    for handler in logging.getLogger().handlers:
        handler.flush()  # as logging.shutdown does when the process ends
    assert numbers(stream) == [0]


async def test_a_log_that_cannot_be_written_ends_no_request(
    stream: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    configure("info", "text", stream)
    request(logging.INFO, number=0)
    stream.close()
    log.warning("also lost")
    assert "I/O operation on closed file" in capsys.readouterr().err


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(ErrorCode),
    st.just((1, "a b")),
)
FIELDS = st.dictionaries(st.sampled_from(["a", "b", "_c", "100%", "name", "thread", "status", "id"]), VALUES)


@settings(max_examples=200, deadline=None)
@given(FIELDS, st.dictionaries(st.sampled_from(["front", "a"]), st.integers(), max_size=2))
def test_a_request_line_says_what_any_record_with_its_fields_says(
    given_fields: dict[str, Any], always: dict[str, Any]
) -> None:
    plain = logging.LogRecord("moe", logging.INFO, __file__, 0, "request", (), None)
    line = RequestLine("moe", logging.INFO, partial(dict, given_fields))
    plain.__dict__.update({name: value for name, value in given_fields.items() if name not in STANDARD_FIELDS})
    line.created = plain.created
    for record in (plain, line):
        Always(always).filter(record)
    assert extra_fields(line) == extra_fields(plain)
    for formatter in (TextFormatter(), JsonFormatter()):
        assert formatter.format(line) == formatter.format(plain)
    words = "".join(f" {name}={in_text(value)}" for name, value in extra_fields(plain).items())
    assert TextFormatter().format(line).partition("moe: ")[2] == f"request{words}"


def in_text(value: Any) -> str:
    """What a value looks like in a text line, as plainly as it can be said."""
    if type(value) is float:
        return f"{value:.6g}"
    text = str(value)
    plain = bool(text) and all("!" <= character <= "~" and character not in '"=' for character in text)
    return text if plain or type(value) is int else json.dumps(text)


def test_other_handlers_can_write_a_request_line() -> None:
    line = RequestLine("moe", logging.INFO, lambda: {"levelname": "forged"})
    formatter = logging.Formatter("%(levelname)s %(name)s %(message)s %(process)s %(module)s")
    assert formatter.format(line) == "INFO moe request None logs"
    assert formatter.formatTime(line)


def test_what_a_request_line_says_is_asked_for_only_where_it_is_written(stream: io.StringIO) -> None:
    def fail() -> dict[str, Any]:
        raise AssertionError

    configure("warning", "text", stream)
    log_request(log, logging.INFO, fail)
    assert stream.getvalue() == ""


def numbers(stream: io.StringIO) -> list[int]:
    return [json.loads(line)["number"] for line in stream.getvalue().splitlines()]
