"""What the Open Inference Protocol's metadata calls answer, and which model and version a path may name."""

from __future__ import annotations

from moe_forward.errors import ErrorCode, ForwardError
from moe_forward.types import ModelSpec
from moe_forward.wire.text import shown

MODEL_VERSION = "1"
PLATFORM = "moe_forward"


def server_metadata(version: str) -> dict[str, object]:
    """Answer of `GET /v2`. version: of this service."""
    return {"name": "moe-forward", "version": version, "extensions": ["binary_tensor_data", PLATFORM]}


def model_metadata(spec: ModelSpec) -> dict[str, object]:
    """Answer of `GET /v2/models/{model}`: every tensor a request may hold, -1 where a size is free.

    The protocol's metadata knows one datatype for a tensor and no optional ones: a parameter says which are, and what
    else is accepted stands in the interface's description.
    """
    return {
        "name": spec.name,
        "versions": [MODEL_VERSION],
        "platform": PLATFORM,
        "inputs": [
            _tensor("hidden_states", "BF16", spec.hidden_size),
            _optional("hidden_scales", "FP32", -1),
            _optional("topk_ids", "INT64", spec.top_k),
            _optional("topk_weights", "FP32", spec.top_k),
            _optional("router_logits", "FP32", spec.num_experts),
        ],
        "outputs": [_tensor("output", "BF16", spec.hidden_size)],
    }


def check_model(model: object, version: object, spec: ModelSpec) -> None:
    """Refuse a model or version that is not served; None stands for what a path leaves out.

    Raises: ForwardError MODEL_NOT_FOUND.
    """
    if model is not None and model != spec.name:
        raise ForwardError(ErrorCode.MODEL_NOT_FOUND, f"model: expected {shown(spec.name)}, got {shown(model)}")
    if version is not None and version != MODEL_VERSION:
        raise ForwardError(
            ErrorCode.MODEL_NOT_FOUND, f"model version: expected {shown(MODEL_VERSION)}, got {shown(version)}"
        )


def _tensor(name: str, datatype: str, columns: int) -> dict[str, object]:
    return {"name": name, "datatype": datatype, "shape": [-1, columns]}


def _optional(name: str, datatype: str, columns: int) -> dict[str, object]:
    return {**_tensor(name, datatype, columns), "parameters": {"optional": True}}
