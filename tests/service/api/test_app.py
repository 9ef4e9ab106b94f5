from __future__ import annotations

import asyncio
import dataclasses
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from moe_forward.types import PHASES, StepReport, StepResult


async def test_metadata_of_server_and_model(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v2")).json()["extensions"] == ["binary_tensor_data", "moe_forward"]
    for path in ("/v2/models/tiny", "/v2/models/tiny/versions/1"):
        model = (await client.get(path)).json()
        assert model["name"] == "tiny"
        assert {item["name"] for item in model["inputs"]} >= {"hidden_states", "topk_ids", "router_logits"}
        required = {item["name"] for item in model["inputs"] if not item.get("parameters", {}).get("optional")}
        assert required == {"hidden_states"}


@pytest.mark.parametrize("name", ["a model", "a%2Fb", "modèle:1"])
async def test_any_name_that_the_configuration_takes_can_be_called(make_front: Any, name: str) -> None:
    front = make_front(model_name=name)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(front.app), base_url="http://front") as client:
        assert (await client.get(f"/v2/models/{quote(name, safe='')}")).json()["name"] == name


@pytest.mark.parametrize(
    "path", ["/v2/models/other", "/v2/models/tiny/versions/2", "/v2/models/other/ready", "/v2/models/other/infer"]
)
async def test_unknown_model_or_version_is_404(client: httpx.AsyncClient, path: str) -> None:
    call = client.post(path) if path.endswith("infer") else client.get(path)
    reply = await call
    assert reply.status_code == 404
    assert reply.json()["code"] == "model_not_found"


async def test_health_of_a_ready_service(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v2/health/live")).json() == {"live": True}
    assert (await client.get("/v2/health/ready")).json() == {"ready": True}
    assert (await client.get("/v2/models/tiny/ready")).json() == {"name": "tiny", "ready": True}
    assert (await client.get("/v2/models/tiny/versions/1/ready")).status_code == 200


async def test_health_while_ranks_are_missing(client: httpx.AsyncClient, front: Any) -> None:
    front.link.status = dataclasses.replace(front.link.status, ready=False, reason="rank 1 is loading")
    for path in ("/v2/health/ready", "/v2/models/tiny/ready"):
        reply = await client.get(path)
        assert reply.status_code == 503
        assert reply.json()["code"] == "not_ready"
        assert "rank 1 is loading" in reply.json()["error"]
        assert int(reply.headers["retry-after"]) >= 1
    assert (await client.get("/v2/health/live")).status_code == 200


async def test_live_fails_when_the_group_cannot_come_back(client: httpx.AsyncClient, front: Any) -> None:
    front.link.status = dataclasses.replace(front.link.status, ready=False, reason="failed: restarted 3 times")
    reply = await client.get("/v2/health/live")
    assert reply.status_code == 503
    assert "restarted 3 times" in reply.json()["error"]


async def test_placement_has_the_documented_shape(client: httpx.AsyncClient) -> None:
    reply = (await client.get("/v1/placement")).json()
    ranks = reply.pop("ranks")
    assert reply == {
        "model": "tiny",
        "hidden_size": 256,
        "num_experts": 16,
        "top_k": 4,
        "shared_experts": True,
        "gate": "deepseek_v3",
        "layers": [1, 2, 3],
        "generation": 3,
        "missing_experts": [],
    }
    held = {str(layer): list(range(8, 16)) for layer in (1, 2, 3)}
    assert ranks[1] == {"rank": 1, "node": "node-a", "device": "cpu:1", "experts": held}


async def test_ranks_have_the_documented_shape_and_count_rows_from_reports(
    client: httpx.AsyncClient, front: Any
) -> None:
    phases = (0.001,) * len(PHASES)
    for _ in range(2):
        results = tuple(StepResult(1, 3, rank, phases, routed_rows=10 + rank) for rank in range(2))
        front.link.on_report(StepReport(1, 5, 1, 0, 0, results))
    ranks = (await client.get("/v1/ranks")).json()["ranks"]
    assert [rank["tokens"] for rank in ranks] == [20, 22]
    assert ranks[0] == {
        "rank": 0,
        "state": "ready",
        "since": 1000.0,
        "pid": 41,
        "node": "node-a",
        "device": "cpu:0",
        "tokens": 20,
        "memory": 4096,
    }
    await asyncio.sleep(0)  # metrics take it in after the answers
    assert front.metric("rank_tokens_total", rank="1") == 22


async def test_status_changes_reach_the_metrics(front: Any) -> None:
    assert front.metric("rank_up", rank="0") == 1  # the status at the time the application was made
    front.link.on_status(dataclasses.replace(front.link.status, ranks=()))
    assert front.metric("rank_up", rank="0") == 0


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v2/", 404, "not_found"),
        ("POST", "/v1/ranks", 405, "method_not_allowed"),
        ("GET", "/v1/drain", 405, "method_not_allowed"),
        ("GET", "/v1/moe/forward", 405, "method_not_allowed"),
        ("DELETE", "/v2/models/tiny/infer", 405, "method_not_allowed"),
    ],
)
async def test_framework_errors_have_the_common_form(
    client: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    reply = await client.request(method, path)
    assert reply.status_code == status
    assert set(reply.json()) == {"error", "code", "request_id"}
    assert reply.json()["code"] == code
    assert reply.json()["request_id"] == reply.headers["x-request-id"]
    if status == 405:
        assert reply.headers["allow"] == ("GET" if path == "/v1/ranks" else "POST")


async def test_a_bug_in_a_route_is_a_500_that_tells_nothing(client: httpx.AsyncClient, front: Any) -> None:
    def bug() -> None:
        raise RuntimeError("secret detail")

    front.app.add_api_route("/bug", bug)
    reply = await client.get("/bug")
    assert reply.status_code == 500
    assert reply.json()["code"] == "internal"
    assert "secret" not in reply.text


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic correct horse", "Bearer pässword".encode()])
async def test_drain_needs_the_admin_token(client: httpx.AsyncClient, front: Any, header: Any) -> None:
    headers = {} if header is None else {"authorization": header}
    reply = await client.post("/v1/drain", headers=headers)
    assert reply.status_code == 401
    assert reply.json()["code"] == "unauthorized"
    assert reply.headers["www-authenticate"] == "Bearer"
    assert not front.app.state.draining
    assert front.metric("rejected_total", reason="auth") == 1


async def test_drain_is_forbidden_where_no_token_is_configured(make_front: Any, kit: Any) -> None:
    from moe_forward.api import create_app
    from moe_forward.metrics import Metrics

    front = make_front()
    registry = type(front.registry)()
    app = create_app(front.config, front.spec, front.link, Metrics(registry), None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as client:
        reply = await client.post("/v1/drain", headers={"authorization": "Bearer "})
    assert reply.status_code == 403
    assert reply.json()["code"] == "forbidden"


async def test_drain_refuses_new_forwards_but_stays_alive(client: httpx.AsyncClient, front: Any, kit: Any) -> None:
    reply = await client.post("/v1/drain", headers={"authorization": f"Bearer {kit.token}"})
    assert reply.json() == {"draining": True, "inflight_requests": 0}
    assert front.app.state.draining
    for call in (
        client.get("/v2/health/ready"),
        client.post("/v1/moe/forward?layer=1", content=kit.body(hidden_states=kit.states(1)), headers=kit.headers),
    ):
        refused = await call
        assert refused.status_code == 503
        assert refused.json()["code"] == "draining"
        assert int(refused.headers["retry-after"]) >= 1
    assert (await client.get("/v2/health/live")).status_code == 200
    assert front.metric("rejected_total", reason="draining") == 1


async def test_the_server_can_start_draining_through_the_state(client: httpx.AsyncClient, front: Any) -> None:
    front.app.state.drain()
    assert (await client.get("/v2/health/ready")).json()["code"] == "draining"


def resolve(document: dict[str, Any], node: Any) -> None:
    """Every $ref of the document leads somewhere."""
    if isinstance(node, dict):
        if "$ref" in node:
            target: Any = document
            for part in node["$ref"].removeprefix("#/").split("/"):
                target = target[part]
        for value in node.values():
            resolve(document, value)
    elif isinstance(node, list):
        for value in node:
            resolve(document, value)


async def test_openapi_describes_every_route_with_the_tensor_routes(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    resolve(document, document)
    own = document["paths"]["/v1/moe/forward"]["post"]
    assert set(own["requestBody"]["content"]) == {"application/vnd.safetensors", "application/json"}
    assert {"200", "413", "429", "504"} <= set(own["responses"])
    versioned = document["paths"]["/v2/models/{model}/versions/{version}/infer"]["post"]
    assert {p["name"] for p in versioned["parameters"] if p["in"] == "path"} == {"model", "version"}
    assert "/v1/drain" in document["paths"]
    assert (await client.get("/docs")).status_code == 200
