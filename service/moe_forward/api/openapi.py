"""The OpenAPI document: what FastAPI makes of its own routes, and the two tensor routes that it does not know."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from moe_forward.api.keys import DRAIN, HEALTH
from moe_forward.api.schemas import ErrorBody
from moe_forward.types import ModelSpec
from moe_forward.wire.plain_json import CONTENT_TYPE as JSON
from moe_forward.wire.safetensors import CONTENT_TYPE as SAFETENSORS

REFUSALS = {
    "400": "Malformed request or body, or a tensor or parameter of the wrong name, type, shape or range.",
    "404": "No such model, version or layer.",
    "408": "The body did not come in time.",
    "411": "No Content-Length.",
    "413": "More bytes or tokens than allowed.",
    "415": "Unknown content type, or a compressed body.",
    "422": "NaN or Inf in a tensor.",
    "429": "The queue or the memory is full; Retry-After says when to try again.",
    "500": "A bug; the log has the details.",
    "503": "Not ready, draining, or a rank is lost; Retry-After says when to try again.",
    "504": "The deadline passed.",
}
ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
BINARY = {"schema": {"type": "string", "format": "binary"}}
KEY_SCHEMES = {
    "ApiKeyBearer": {"type": "http", "scheme": "bearer", "description": "A key of api_keys_file."},
    "ApiKeyHeader": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same."},
}
DEGRADED = {
    "X-MoE-Degraded": {
        "schema": {"type": "string"},
        "description": "missing-experts=N of E, where the ranks lack experts and the operator chose to go on.",
    },
    "X-MoE-Missing-Routes": {
        "schema": {"type": "integer"},
        "description": "Routes of this request to such experts, which added nothing to the output.",
    },
}
NO_KEY = {"description": "An API key is needed, and none or none that is valid came.", "content": ERROR}


def describe(app: FastAPI, spec: ModelSpec, keys: bool) -> None:
    """Give `app` the complete document, made when it is first asked for. keys: the service asks for API keys."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            made["components"]["schemas"].setdefault("ErrorBody", ErrorBody.model_json_schema())
            made["paths"].update(tensor_paths(spec))
            if keys:
                _ask_for_keys(made)
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # the way FastAPI documents for extending it


def _ask_for_keys(document: dict[str, Any]) -> None:
    """Say which operations need a key: all but health, which probes call, and the one with a token of its own."""
    document["components"].setdefault("securitySchemes", {}).update(KEY_SCHEMES)
    for path, operations in document["paths"].items():
        if path not in (*HEALTH, DRAIN):
            for operation in operations.values():
                operation["security"] = [{name: []} for name in KEY_SCHEMES]
                operation["responses"].setdefault("401", NO_KEY)


def tensor_paths(spec: ModelSpec) -> dict[str, Any]:
    """Return the path items of the two tensor routes for one model."""
    parameters = [
        _parameter("layer", {"type": "integer", "enum": list(spec.layers)}, "Which layer; here or in the body."),
        _parameter("shared_experts", {"type": "boolean", "default": True}, "Add the shared experts' output."),
        _parameter("timeout_ms", {"type": "number", "exclusiveMinimum": 0}, "Deadline of the call."),
    ]
    shapes = (
        f"hidden_states [T, {spec.hidden_size}] BF16, F16 or F32, or F8_E4M3 with hidden_scales F32 [T] or [T, "
        f"{spec.hidden_size}/128]; either topk_ids I32 or I64 with topk_weights F32, both [T, {spec.top_k}], or "
        f"router_logits [T, {spec.num_experts}] F32 or BF16, or neither: then the layer's own gate chooses. "
        f"Reply: output [T, {spec.hidden_size}]."
    )
    own = _operation(
        "forward",
        "One layer's expert output for some tokens.",
        shapes,
        parameters,
        {SAFETENSORS: BINARY, JSON: {"schema": _json_body(spec)}},
        {SAFETENSORS: BINARY, JSON: {"schema": _json_reply(spec)}},
    )
    header = {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "schema": {"type": "integer"},
        "description": "Bytes of the JSON part, where binary tensors follow it.",
    }
    paths: dict[str, Any] = {"/v1/moe/forward": {"post": own}}
    for path, name in (
        ("/v2/models/{model}/infer", "infer"),
        ("/v2/models/{model}/versions/{version}/infer", "infer_version"),
    ):
        in_path = [
            {"name": part, "in": "path", "required": True, "schema": {"type": "string"}}
            for part in ("model", "version")
            if f"{{{part}}}" in path
        ]
        operation = _operation(
            name,
            "The same as an Open Inference Protocol v2 inference, with the binary tensor extension.",
            shapes + " fp8 travels as UINT8 with the tensor parameter moe_dtype=FP8_E4M3.",
            [*in_path, header, *parameters],
            {JSON: {"schema": _message("inputs")}, "application/octet-stream": BINARY},
            {JSON: {"schema": _message("outputs")}, "application/octet-stream": BINARY},
        )
        paths[path] = {"post": operation}
    return paths


def _json_body(spec: ModelSpec) -> dict[str, Any]:
    """Schema of a forward in JSON. Which routing tensors go together, and that all have T rows, the text says."""
    return {
        "type": "object",
        "required": ["hidden_states"],
        "additionalProperties": False,
        "properties": {
            "layer": {"type": "integer", "enum": list(spec.layers)},
            "shared_experts": {"type": "boolean"},
            "timeout_ms": {"type": "number", "exclusiveMinimum": 0},
            "hidden_states": _rows("number", spec.hidden_size),
            "topk_ids": _rows("integer", spec.top_k),
            "topk_weights": _rows("number", spec.top_k),
            "router_logits": _rows("number", spec.num_experts),
        },
    }


def _json_reply(spec: ModelSpec) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["output", "layer", "tokens", "request_id"],
        "properties": {
            "output": _rows("number", spec.hidden_size),
            "layer": {"type": "integer"},
            "tokens": {"type": "integer"},
            "request_id": {"type": "string"},
            "missing_routes": {"type": "integer"},
            "missing_experts": {"type": "integer"},
        },
    }


def _rows(kind: str, columns: int) -> dict[str, Any]:
    row = {"type": "array", "items": {"type": kind}, "minItems": columns, "maxItems": columns}
    return {"type": "array", "items": row, "minItems": 1}


def _message(tensors: str) -> dict[str, Any]:
    """Schema of an inference request or reply, as far as the protocol itself does not say it."""
    tensor = {
        "type": "object",
        "required": ["name", "shape", "datatype"],
        "properties": {
            "name": {"type": "string"},
            "shape": {"type": "array", "items": {"type": "integer"}},
            "datatype": {"type": "string"},
        },
    }
    properties = {"id": {"type": "string"}, tensors: {"type": "array", "items": tensor, "minItems": 1}}
    return {"type": "object", "required": [tensors], "properties": properties}


def _parameter(name: str, schema: dict[str, Any], text: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": text}


def _operation(
    name: str,
    summary: str,
    description: str,
    parameters: list[dict[str, Any]],
    content: dict[str, Any],
    reply: dict[str, Any],
) -> dict[str, Any]:
    refusals = {status: {"description": text, "content": ERROR} for status, text in REFUSALS.items()}
    return {
        "operationId": name,
        "tags": ["forward"],
        "summary": summary,
        "description": description,
        "parameters": parameters,
        "requestBody": {"required": True, "content": content},
        "responses": {"200": {"description": "The output.", "headers": DEGRADED, "content": reply}, **refusals},
    }
