from __future__ import annotations

import json

import pytest

from moe_forward.api.errors import FRAMEWORK_CODES, STATUS, render, retry_after
from moe_forward.errors import ErrorCode, ForwardError


def test_every_code_has_a_status() -> None:
    assert set(STATUS) == set(ErrorCode)
    assert all(400 <= status <= 504 for status in STATUS.values())


def test_framework_codes_agree_with_the_table() -> None:
    assert {code: STATUS[code] for code in FRAMEWORK_CODES.values()} == {v: k for k, v in FRAMEWORK_CODES.items()}


def test_body_has_sentence_slug_and_request_id() -> None:
    reply = render(ForwardError(ErrorCode.WRONG_SHAPE, 'x: expected "2-D"'), "id-1")
    assert reply.status == 400
    assert ("content-type", "application/json") in reply.headers
    assert json.loads(reply.body) == {"error": 'x: expected "2-D"', "code": "wrong_shape", "request_id": "id-1"}


@pytest.mark.parametrize(("seconds", "header"), [(0.0, "1"), (0.2, "1"), (1.0, "1"), (1.01, "2"), (30.0, "30")])
def test_retry_after_is_whole_seconds_rounded_up_and_at_least_one(seconds: float, header: str) -> None:
    assert retry_after(ForwardError(ErrorCode.QUEUE_FULL, "", seconds)) == header


@pytest.mark.parametrize("code", list(ErrorCode))
def test_retry_after_comes_with_429_and_503_and_nothing_else(code: ErrorCode) -> None:
    names = [name for name, _ in render(ForwardError(code, ""), "").headers]
    assert ("retry-after" in names) == (STATUS[code] in (429, 503))


def test_unauthorized_names_the_scheme_and_timeout_closes() -> None:
    assert ("www-authenticate", "Bearer") in render(ForwardError(ErrorCode.UNAUTHORIZED, ""), "").headers
    assert ("connection", "close") in render(ForwardError(ErrorCode.BODY_TIMEOUT, ""), "").headers
