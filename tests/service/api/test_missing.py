"""Replies of a rank group that lacks experts say so in every encoding; replies of a complete one say nothing."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import httpx
import pytest

FORWARD, INFER = "/v1/moe/forward?layer=1", "/v2/models/tiny/infer"
DEGRADED, ROUTES = "x-moe-degraded", "x-moe-missing-routes"


def lack(front: Any, routes: int, experts: int) -> None:
    """Let the fake engine answer as a group without some experts."""
    compute = front.link._compute

    async def lacking(request: Any) -> Any:
        return (await compute(request))._replace(missing_routes=routes, missing_experts=experts)

    front.link._compute = lacking


async def call(client: httpx.AsyncClient, kit: Any, encoding: str) -> httpx.Response:
    states = kit.states(3)
    if encoding == "safetensors":
        return await client.post(FORWARD, content=kit.body(hidden_states=states), headers=kit.headers)
    if encoding == "json":
        return await client.post(FORWARD, json={"hidden_states": states.tolist()})
    tensor = {"name": "hidden_states", "datatype": "FP32", "shape": [3, kit.hidden], "data": states.ravel().tolist()}
    binary = encoding == "oip binary"
    return await client.post(INFER, json={"inputs": [tensor], "parameters": {"layer": 1, "binary_data_output": binary}})


def fields(reply: httpx.Response, encoding: str) -> dict[str, Any]:
    """The JSON fields beside the output, where the encoding has some."""
    if encoding == "safetensors":
        return {}
    head = json.loads(reply.content[: int(reply.headers.get("inference-header-content-length", len(reply.content)))])
    named: dict[str, Any] = head.get("parameters", head)
    return {name: value for name, value in named.items() if name.startswith("missing")}


@pytest.mark.parametrize("encoding", ["safetensors", "json", "oip json", "oip binary"])
async def test_a_reply_that_lost_routes_counts_them(client: Any, front: Any, kit: Any, encoding: str) -> None:
    lack(front, routes=5, experts=4)
    reply = await call(client, kit, encoding)
    assert reply.status_code == 200
    assert (reply.headers[DEGRADED], reply.headers[ROUTES]) == ("missing-experts=4 of 16", "5")
    expected = {} if encoding == "safetensors" else {"missing_routes": 5, "missing_experts": 4}
    assert fields(reply, encoding) == expected


@pytest.mark.parametrize("encoding", ["safetensors", "json", "oip json"])
async def test_a_reply_that_lost_none_still_says_that_the_group_lacks_experts(
    client: Any, front: Any, kit: Any, encoding: str
) -> None:
    lack(front, routes=0, experts=4)
    reply = await call(client, kit, encoding)
    assert reply.headers[DEGRADED] == "missing-experts=4 of 16"
    assert ROUTES not in reply.headers
    assert fields(reply, encoding).get("missing_routes", 0) == 0


@pytest.mark.parametrize("encoding", ["safetensors", "json", "oip json", "oip binary"])
async def test_a_reply_of_a_complete_group_says_nothing(client: Any, kit: Any, encoding: str) -> None:
    reply = await call(client, kit, encoding)
    assert reply.status_code == 200
    assert not {DEGRADED, ROUTES} & reply.headers.keys()
    assert fields(reply, encoding) == {}


async def test_placement_lists_what_is_missing_and_a_hole_in_a_ranks_experts(client: Any, front: Any, kit: Any) -> None:
    ranks = (
        dataclasses.replace(kit.ready.ranks[0], experts=(0, 9)),
        dataclasses.replace(kit.ready.ranks[1], experts=(9, 16)),
    )
    front.link.status = dataclasses.replace(kit.ready, ranks=ranks, missing=(3, 4, 5), lacking_ranks=1)
    placement = (await client.get("/v1/placement")).json()
    assert placement["missing_experts"] == [3, 4, 5]
    assert [rank["experts"]["2"] for rank in placement["ranks"]] == [[0, 1, 2, 6, 7, 8], list(range(9, 16))]
    assert (await client.get("/v2/health/ready")).status_code == 200
