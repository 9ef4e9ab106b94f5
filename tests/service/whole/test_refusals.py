"""What is wrong with a request is said with its status and a sentence, and harms nobody else."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator

import httpx
import pytest
import torch

from .bad_requests import CASES, GOOD, HIDDEN, INFER, OWN, own, spoiled
from .conftest import ADMIN_TOKEN
from .forwards import SAFETENSORS, Forward, Sent, as_json, as_oip_binary, as_safetensors, read_output
from .local import Local
from .running import Service

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=120.0) as connected:
        yield connected


@pytest.fixture(autouse=True, scope="module")
def _healthy_after(service: Service, local: Local) -> Iterator[None]:
    """After all of it the service answers, right, from the same processes."""
    before = service.rank_pids()
    yield
    assert service.get("/v2/health/ready").status_code == 200
    assert service.rank_pids() == before
    assert raw(service, request_bytes(as_safetensors(Forward(1, HIDDEN)))).startswith(b"HTTP/1.1 200")


def request_bytes(sent: Sent, **headers: str | None) -> bytes:
    """Write a request as it travels; a header of None is left out."""
    fields: dict[str, str | None] = {
        "host": "localhost",
        "connection": "close",
        "content-length": str(len(sent.body)),
        **sent.headers,
        **{key.replace("_", "-"): value for key, value in headers.items()},
    }
    lines = [f"POST {sent.path} HTTP/1.1", *(f"{key}: {value}" for key, value in fields.items() if value is not None)]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + sent.body


def raw(service: Service, data: bytes, end: bool = False) -> bytes:
    """Send bytes as they are and return all that comes back. end: close our direction afterwards."""
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60.0) as connection:
        connection.sendall(data)
        if end:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while chunk := connection.recv(1 << 16):
            received += chunk
        return received


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_bad_request_is_refused_with_its_status_and_a_sentence(
    client: httpx.Client, case: tuple[Sent, int, str]
) -> None:
    sent, status, word = case
    reply = client.post(sent.path, headers=sent.headers, content=sent.body)
    assert reply.status_code == status, reply.text
    document = reply.json()
    assert word.lower() in document["error"].lower(), document["error"]
    assert document.keys() == {"error", "code", "request_id"}
    assert document["request_id"] == reply.headers["x-request-id"]
    assert len(document["error"]) < 400


def test_a_chunked_body_is_refused(client: httpx.Client) -> None:
    reply = client.post(OWN, headers={"content-type": SAFETENSORS}, content=iter([GOOD[:100], GOOD[100:]]))
    assert (reply.status_code, reply.json()["code"]) == (411, "length_required")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content_length": "99999999999"}, 413),
        ({"content_length": "9" * 19}, 413),
        ({"content_length": "9" * 40}, 400),
        ({"content_length": None}, 411),
        ({"content_length": "-5"}, 400),
        ({"content_length": "0x10"}, 400),
        ({"content_length": "100, 200"}, 400),
        ({"content_length": "10"}, 400),
        ({"transfer_encoding": "chunked"}, 400),
    ],
    ids=str,
)
def test_a_length_that_lies_is_refused(service: Service, headers: dict[str, str | None], status: int) -> None:
    reply = raw(service, request_bytes(own(GOOD), **headers))
    assert reply.split(b" ", 2)[1] == str(status).encode(), reply[:300]


def test_a_client_that_leaves_before_its_body_is_whole_harms_nobody(service: Service) -> None:
    assert b"200" not in raw(service, request_bytes(own(GOOD), content_length=str(len(GOOD) + 1)), end=True)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", OWN, 405),
        ("PUT", INFER, 405),
        ("POST", "/v2", 405),
        ("GET", "/nothing/here", 404),
        ("GET", "/v2/models/big", 404),
        ("GET", "/v2/models/big/ready", 404),
        ("GET", "/metrics", 404),
    ],
)
def test_another_method_or_path_is_refused_in_the_same_form(
    client: httpx.Client, method: str, path: str, status: int
) -> None:
    reply = client.request(method, path)
    assert reply.status_code == status
    assert reply.json().keys() == {"error", "code", "request_id"}


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer guess"}, {"authorization": f"Basic {ADMIN_TOKEN}"}])
def test_draining_needs_the_admin_token(client: httpx.Client, headers: dict[str, str]) -> None:
    assert client.post("/v1/drain", headers=headers).status_code == 401


async def test_nan_in_one_request_leaves_the_others_of_its_step_untouched(service: Service, local: Local) -> None:
    clean = [Forward(1, torch.randn(5, 256, generator=torch.Generator().manual_seed(seed))) for seed in range(4)]
    bad = Forward(1, spoiled(HIDDEN, torch.nan))
    long = as_safetensors(Forward(2, torch.randn(4096, 256, generator=torch.Generator().manual_seed(4))))
    sent = [as_oip_binary(clean[0]), as_safetensors(bad), *(as_oip_binary(forward) for forward in clean[1:])]
    async with httpx.AsyncClient(base_url=service.url, timeout=120.0) as client:
        for attempt in range(20):
            before = asyncio.create_task(client.post(long.path, headers=long.headers, content=long.body))
            await asyncio.sleep(0.1)  # those that come while its step runs gather for the next one
            replies = await asyncio.gather(
                *(client.post(item.path, headers=item.headers, content=item.body) for item in sent)
            )
            assert (await before).status_code == 200
            assert [reply.status_code for reply in replies] == [200, 422, 200, 200, 200], attempt
            good = [reply for reply in replies if reply.status_code == 200]
            for forward, reply in zip(clean, good, strict=True):
                assert torch.equal(read_output(reply), local.output(forward))
            lengths = [int(reply.headers["inference-header-content-length"]) for reply in good]
            tokens = [
                json.loads(reply.content[:end])["parameters"]["batch_tokens"]
                for reply, end in zip(good, lengths, strict=True)
            ]
            if max(tokens) == 5 * len(clean) + len(bad.hidden):  # all five met in one step
                return
    pytest.fail(f"the requests never met in one step; the last steps had {tokens} tokens")


def test_a_small_json_request_is_answered_for_comparison(client: httpx.Client, local: Local) -> None:
    sent = as_json(Forward(1, HIDDEN))
    reply = client.post(sent.path, headers=sent.headers, content=sent.body)
    assert torch.equal(read_output(reply), local.output(Forward(1, HIDDEN)))
