"""Which error a reply stands for."""

from __future__ import annotations

import email.utils
import json
import pickle
import time

import httpx
import pytest

from moe_forward.client.errors import (
    DeadlineExceeded,
    MoEForwardClientError,
    RequestRefused,
    ServerFailed,
    TransportFailed,
    Unavailable,
)
from moe_forward.client.replies import Reply, json_object, parse_retry_after, reply_error
from moe_forward.errors import MoEForwardError


def refused(status: int, **headers: str) -> Reply:
    body = json.dumps({"error": f"sentence {status}", "code": "some_code", "request_id": "r-1"}).encode()
    return Reply(status, httpx.Headers(headers), body)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((status, RequestRefused) for status in (400, 401, 403, 404, 405, 411, 413, 415, 422, 499)),
        *((status, Unavailable) for status in (429, 503)),
        *((status, DeadlineExceeded) for status in (408, 504)),
        *((status, ServerFailed) for status in (500, 502)),
        *((status, TransportFailed) for status in (204, 307)),
    ],
)
def test_a_status_becomes_its_error_with_the_servers_sentence(status: int, kind: type[MoEForwardClientError]) -> None:
    error = reply_error(refused(status), "mine")
    assert type(error) is kind
    assert isinstance(error, MoEForwardError)
    assert str(error) == error.message == f"sentence {status}"
    assert (error.status, error.code, error.request_id) == (status, "some_code", "r-1")


@pytest.mark.parametrize("body", [b"<html>bad gateway</html>", b"[1]", b'{"detail": "x"}', b'{"error": 5}'])
def test_a_page_of_a_proxy_is_quoted(body: bytes) -> None:
    error = reply_error(Reply(502, httpx.Headers(), body), "mine")
    assert str(error) == f"the server answered 502 with {body.decode()!r}"
    assert (error.code, error.request_id) == ("", "mine")


def test_a_long_page_is_cut_and_an_empty_one_named() -> None:
    assert len(str(reply_error(Reply(500, httpx.Headers(), b"x" * 10_000), "mine"))) < 300
    assert str(reply_error(Reply(500, httpx.Headers(), b""), "mine")) == "the server answered 500, empty"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3", 3.0), ("0.25", 0.25), ("-1", 0.0), ("inf", None), ("nan", None), ("soon", None), ("", None), (None, None)],
)
def test_retry_after_in_seconds(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value) == seconds


def test_retry_after_as_a_date() -> None:
    ahead = parse_retry_after(email.utils.formatdate(time.time() + 3600, usegmt=True))
    assert ahead is not None
    assert 3000 < ahead <= 3600
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


def test_unavailable_carries_retry_after() -> None:
    error = reply_error(refused(503, **{"Retry-After": "4"}), "mine")
    assert isinstance(error, Unavailable)
    assert error.retry_after_seconds == 4.0
    silent = reply_error(refused(429), "mine")
    assert isinstance(silent, Unavailable)
    assert silent.retry_after_seconds is None


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(reply_error(refused(503, **{"Retry-After": "4"}), "mine")))
    assert (type(error), str(error), error.status, error.retry_after_seconds) == (Unavailable, "sentence 503", 503, 4.0)


@pytest.mark.parametrize("body", [b"{", b"[]", b"7", b"\xff"])
def test_a_reply_that_is_no_json_object_is_refused(body: bytes) -> None:
    assert json_object(Reply(200, httpx.Headers(), b"")) == {}
    with pytest.raises(TransportFailed, match="the reply must be"):
        json_object(Reply(200, httpx.Headers(), body))
