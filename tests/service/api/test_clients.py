"""Who sent a request, as the engine hears of it: by key, else by address, and the same from every front end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from moe_forward.api.clients import client_number

FORWARD = "/v1/moe/forward?layer=1"


def scope(address: str | None = "10.0.0.7", key_name: str | None = None) -> dict[str, Any]:
    state = {} if key_name is None else {"caller": key_name}
    return {"client": None if address is None else (address, 51234), "state": state}


def test_the_number_is_the_same_in_every_process_and_version() -> None:
    assert client_number(scope()) == 0xF380_C240_81E1_7244
    assert client_number(scope(key_name="team-a")) == 0x7072_A74C_E106_7DDA


def test_a_keys_name_counts_and_not_where_it_is_used() -> None:
    assert client_number(scope("10.0.0.7", "team-a")) == client_number(scope("10.0.0.8", "team-a"))
    assert client_number(scope("10.0.0.7", "team-a")) != client_number(scope("10.0.0.7", "team-b"))


def test_without_keys_addresses_differ_and_ports_do_not() -> None:
    here = scope()
    there = {**here, "client": ("10.0.0.7", 40000)}
    assert client_number(here) == client_number(there)
    assert client_number(scope("10.0.0.8")) != client_number(here)
    assert client_number(scope(None)) != client_number(here)


def test_a_key_named_like_an_address_is_somebody_else() -> None:
    assert client_number(scope("10.0.0.7")) != client_number(scope(key_name="10.0.0.7"))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::2", True),
        ("fe80::1%eth0", "fe80::9", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
    ],
)
def test_addresses_of_one_ipv6_network_are_one_client(one: str, other: str, same: bool) -> None:
    assert (client_number(scope(one)) == client_number(scope(other))) is same


async def test_requests_reach_the_engine_with_the_number_of_their_key(
    make_front: Any, kit: Any, tmp_path: Path
) -> None:
    path = tmp_path / "keys"
    path.write_text("team-a:0123456789abcdef\nteam-b:fedcba9876543210\n")
    front = make_front(api_keys_file=path)
    transport = httpx.ASGITransport(front.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for key in ("0123456789abcdef", "fedcba9876543210"):
            body = kit.body(hidden_states=kit.states(2))
            reply = await client.post(FORWARD, content=body, headers={**kit.headers, "x-api-key": key})
            assert reply.status_code == 200
    numbers = [request.client for request in front.link.requests]
    assert numbers == [client_number(scope(key_name=name)) for name in ("team-a", "team-b")]
