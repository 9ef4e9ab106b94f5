"""Each test runs with the blocking and with the asyncio client: what they send, give and raise."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.numpy import load

from moe_forward.client import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    MoEForwardClientError,
    RequestRefused,
    TransportFailed,
    Unavailable,
)

Answer = httpx.Response


def test_a_forward_sends_the_tensors_and_gives_the_output(
    run: Any, script: Any, hidden: Any, output_reply: Any
) -> None:
    handler = script(output_reply)
    output = run(handler, lambda client: client.forward(hidden, layer=3, request_id="mine", timeout_seconds=9.0))
    assert np.array_equal(output, hidden * 2)
    (request,) = handler.requests
    assert (request.method, request.url.path) == ("POST", "/v1/moe/forward")
    assert request.headers["content-type"] == request.headers["accept"] == "application/vnd.safetensors"
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["x-request-id"] == "mine"
    assert request.headers["content-length"] == str(len(request.content))
    assert "authorization" not in request.headers
    parameters = dict(request.url.params)
    assert 8000 < int(parameters.pop("timeout_ms")) <= 9000
    assert parameters == {"layer": "3", "shared_experts": "true"}
    assert np.array_equal(load(request.content)["hidden_states"], hidden)


def test_options_of_a_forward_reach_the_server(run: Any, script: Any, hidden: Any, output_reply: Any) -> None:
    handler = script(output_reply)
    ids, weights = np.array([[1, 2], [0, 3]]), np.full((2, 2), 0.5, np.float32)

    def use(client: Any) -> Any:
        return client.forward(hidden, layer=0, topk_ids=ids, topk_weights=weights, shared_experts=False)

    run(handler, use, api_key="secret", timeout_seconds=2.0)
    (request,) = handler.requests
    assert request.headers["authorization"] == "Bearer secret"
    assert request.url.params["shared_experts"] == "false"
    assert 1000 < int(request.url.params["timeout_ms"]) <= 2000
    sent = load(request.content)
    assert np.array_equal(sent["topk_ids"], ids)
    assert np.array_equal(sent["topk_weights"], weights)


def test_torch_in_means_torch_out(run: Any, script: Any, hidden: Any, output_reply: Any) -> None:
    output = run(script(output_reply), lambda client: client.forward(torch.from_numpy(hidden), layer=3))
    assert isinstance(output, torch.Tensor)
    assert torch.equal(output, torch.from_numpy(hidden * 2))


@pytest.mark.parametrize("hindrance", [Answer(503), Answer(429), httpx.ConnectError("refused")], ids=repr)
def test_a_forward_is_sent_again_under_the_same_request_id(
    run: Any, script: Any, hidden: Any, output_reply: Any, hindrance: Any
) -> None:
    handler = script(hindrance, hindrance, output_reply)
    output = run(handler, lambda client: client.forward(hidden, layer=3))
    assert np.array_equal(output, hidden * 2)
    assert len(handler.requests) == 3
    assert len({request.headers["x-request-id"] for request in handler.requests}) == 1
    assert len({request.content for request in handler.requests}) == 1
    left = [int(request.url.params["timeout_ms"]) for request in handler.requests]
    assert left == sorted(left, reverse=True)


def test_retry_after_is_honoured(
    run: Any, script: Any, hidden: Any, output_reply: Any, refusal: Callable[..., Answer]
) -> None:
    handler = script(refusal(429, "queue_full", "full", **{"Retry-After": "0.3"}), output_reply)
    run(handler, lambda client: client.forward(hidden, layer=3, timeout_seconds=20.0))
    first, second = (int(request.url.params["timeout_ms"]) for request in handler.requests)
    assert first - second >= 299


@pytest.mark.parametrize(
    ("status", "kind", "attempts"),
    [(400, RequestRefused, 1), (422, RequestRefused, 1), (504, DeadlineExceeded, 1), (503, Unavailable, 3)],
)
def test_a_refusal_raises_its_error_with_the_servers_words(
    run: Any, script: Any, hidden: Any, refusal: Any, status: int, kind: type[Exception], attempts: int
) -> None:
    handler = script(refusal(status, "the_code", "hidden_states: expected that, got this"))
    with pytest.raises(kind, match=r"^hidden_states: expected that, got this$") as raised:
        run(handler, lambda client: client.forward(hidden, layer=3))
    assert isinstance(raised.value, MoEForwardClientError)
    assert (raised.value.status, raised.value.code, raised.value.request_id) == (status, "the_code", "r-1")
    assert len(handler.requests) == attempts


@pytest.mark.parametrize("answer", [Answer(503), httpx.ReadError("reset")], ids=repr)
def test_retries_can_be_turned_off(run: Any, script: Any, hidden: Any, answer: Any) -> None:
    handler = script(answer)
    with pytest.raises((Unavailable, TransportFailed)):
        run(handler, lambda client: client.forward(hidden, layer=3), retries=0)
    assert len(handler.requests) == 1


def test_a_timeout_of_the_client_is_a_deadline(run: Any, script: Any, hidden: Any) -> None:
    with pytest.raises(DeadlineExceeded, match=r"POST /v1/moe/forward did not end within 7 s") as raised:
        run(script(httpx.ReadTimeout("slow")), lambda client: client.forward(hidden, layer=3, timeout_seconds=7.0))
    assert raised.value.status is None


@pytest.mark.parametrize(
    ("headers", "content", "message"),
    [
        ({"content-type": "application/vnd.safetensors"}, b"not safetensors", "not safetensors"),
        ({"content-type": "application/json"}, None, "the reply must be application/vnd.safetensors, it is .*json"),
        ({}, None, "it is without a content type"),
    ],
)
def test_a_lying_reply_is_never_given(
    run: Any, script: Any, hidden: Any, output_reply: Answer, headers: dict[str, str], content: Any, message: str
) -> None:
    handler = script(Answer(200, headers=headers, content=content or output_reply.content))
    with pytest.raises(TransportFailed, match=message):
        run(handler, lambda client: client.forward(hidden, layer=3))
    assert len(handler.requests) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": "3"}, TypeError, "layer must be an int, got '3'"),
        ({"layer": True}, TypeError, "layer must be an int, got True"),
        ({"layer": 3, "timeout_seconds": 0}, ValueError, "timeout_seconds must be positive and finite, got 0"),
        ({"layer": 3, "timeout_seconds": float("inf")}, ValueError, "timeout_seconds must be positive and finite"),
        ({"layer": 3, "request_id": "a\r\nb"}, ValueError, "request_id must be 1 to 128 printable ASCII characters"),
        ({"layer": 3, "request_id": "x" * 129}, ValueError, "request_id must be 1 to 128"),
        ({"layer": 3, "topk_ids": np.zeros((2, 1), np.int32)}, ValueError, "got no topk_weights"),
    ],
)
def test_wrong_arguments_send_nothing(
    run: Any, script: Any, hidden: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    handler = script(Answer(200))
    with pytest.raises(error, match=message):
        run(handler, lambda client: client.forward(hidden, **options))
    assert handler.requests == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "moe.test:8000"}, "base_url must be http"),
        ({"base_url": "ftp://moe.test"}, "base_url must be http"),
        ({"base_url": "http://"}, "base_url must be http"),
        ({"timeout_seconds": -1.0}, "timeout_seconds must be positive"),
        ({"retries": -1}, "retries must be 0 or more, got -1"),
        ({"api_key": "two words"}, "api_key must be printable ASCII without spaces"),
        ({"api_key": ""}, "api_key must be"),
    ],
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_client_with_wrong_settings_cannot_be_made(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        kind(**options)
    assert "two words" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "arguments", "path"),
    [
        ("placement", (), "/v1/placement"),
        ("ranks", (), "/v1/ranks"),
        ("metadata", (), "/v2"),
        ("metadata", ("deep/seek r1",), "/v2/models/deep%2Fseek%20r1"),
    ],
)
def test_questions_give_the_document(run: Any, script: Any, name: str, arguments: tuple[str, ...], path: str) -> None:
    handler = script(Answer(503), Answer(200, json={"layers": [3, 4]}))
    assert run(handler, lambda client: getattr(client, name)(*arguments)) == {"layers": [3, 4]}
    assert {(request.method, request.url.raw_path.decode()) for request in handler.requests} == {("GET", path)}
    assert len(handler.requests) == 2


@pytest.mark.parametrize(("status", "ready"), [(200, True), (503, False)])
def test_ready_is_the_answer_of_one_question(run: Any, script: Any, status: int, ready: bool) -> None:
    handler = script(Answer(status))
    assert run(handler, lambda client: client.ready()) is ready
    assert [request.url.path for request in handler.requests] == ["/v2/health/ready"]


def test_ready_does_not_hide_that_nothing_answers_or_another_server_does(run: Any, script: Any) -> None:
    nobody = script(httpx.ConnectError("refused"))
    with pytest.raises(TransportFailed):
        run(nobody, lambda client: client.ready())
    assert len(nobody.requests) == 1
    with pytest.raises(RequestRefused):
        run(script(Answer(404)), lambda client: client.ready())


def test_drain_sends_the_admin_token_once(run: Any, script: Any, refusal: Any) -> None:
    handler = script(Answer(200, json={"inflight_requests": 2}))
    assert run(handler, lambda client: client.drain("admin"), api_key="user") == {"inflight_requests": 2}
    assert handler.requests[0].headers["authorization"] == "Bearer admin"
    wrong = script(refusal(401, "unauthorized", "Authorization: expected the admin token, got another one"))
    with pytest.raises(RequestRefused, match="admin token") as raised:
        run(wrong, lambda client: client.drain("wrong"))
    assert (raised.value.status, raised.value.code) == (401, "unauthorized")
    gone = script(httpx.ConnectError("refused"))
    with pytest.raises(TransportFailed):
        run(gone, lambda client: client.drain("admin"))
    assert len(gone.requests) == 1
    with pytest.raises(ValueError, match="admin_token must be"):
        run(gone, lambda client: client.drain("a\nb"))


def test_both_clients_have_the_same_calls_and_arguments() -> None:
    def surface(kind: type) -> dict[str, Any]:
        members = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(member).parameters) for name, member in members if name[0] != "_"}

    assert surface(Client) == surface(AsyncClient)
    assert list(inspect.signature(Client).parameters) == list(inspect.signature(AsyncClient).parameters)
