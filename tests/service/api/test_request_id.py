from __future__ import annotations

from typing import Any

import httpx
import pytest

from moe_forward.api.request_id import accepted


@pytest.mark.parametrize("value", [b"a", b"x" * 128, b"req 1/2~!", b"01HXYZ-abc"])
def test_printable_ascii_up_to_128_is_accepted(value: bytes) -> None:
    assert accepted(value)


@pytest.mark.parametrize("value", [b"", b"x" * 129, b"a\x00", b"a\n", b"\x7f", "é".encode(), b"\t"])
def test_anything_else_is_not(value: bytes) -> None:
    assert not accepted(value)


@pytest.mark.parametrize("path", ["/v2", "/nowhere", "/v1/moe/forward", "/v2/models/other/infer"])
async def test_the_clients_id_comes_back_on_every_route(client: httpx.AsyncClient, path: str) -> None:
    reply = await client.get(path, headers={"x-request-id": "mine-1"})
    assert reply.headers["x-request-id"] == "mine-1"
    if reply.status_code != 200:
        assert reply.json()["request_id"] == "mine-1"


async def test_an_unusable_id_is_replaced_by_a_fresh_one(client: httpx.AsyncClient) -> None:
    ids = {(await client.get("/v2", headers={"x-request-id": "x" * 129})).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    assert all(len(value) == 32 for value in ids)


async def test_the_reply_has_exactly_one_id_header(client: httpx.AsyncClient, front: Any) -> None:
    def bug() -> None:
        raise RuntimeError("a bug")

    front.app.add_api_route("/bug", bug)
    for path in ("/v2", "/bug"):
        reply = await client.get(path, headers={"x-request-id": "one"})
        assert reply.headers.get_list("x-request-id") == ["one"]
