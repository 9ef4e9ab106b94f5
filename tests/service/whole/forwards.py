"""One forward in every form a client may write it in, and its reply read back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import httpx
import ml_dtypes
import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

SAFETENSORS = "application/vnd.safetensors"
OIP_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "FP16",
    torch.float32: "FP32",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.float8_e4m3fn: "UINT8",
}
NUMPY = {"BF16": ml_dtypes.bfloat16, "FP16": np.float16, "FP32": np.float32}


@dataclass(frozen=True)
class Forward:
    """What is asked of one layer. hidden: [T, H]; the other tensors as the interface names them, or None."""

    layer: int
    hidden: Tensor
    scales: Tensor | None = None
    ids: Tensor | None = None
    weights: Tensor | None = None
    logits: Tensor | None = None
    shared: bool = True

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are sent, by their names on the wire."""
        named = {
            "hidden_states": self.hidden,
            "hidden_scales": self.scales,
            "topk_ids": self.ids,
            "topk_weights": self.weights,
            "router_logits": self.logits,
        }
        return {name: tensor.contiguous() for name, tensor in named.items() if tensor is not None}

    @property
    def output_dtype(self) -> torch.dtype:
        """Element type of the reply."""
        return torch.bfloat16 if self.hidden.dtype == torch.float8_e4m3fn else self.hidden.dtype


@dataclass(frozen=True)
class Sent:
    """An HTTP request. path: with the query."""

    path: str
    headers: dict[str, str]
    body: bytes


def as_safetensors(forward: Forward) -> Sent:
    """Write a forward as the product's own call takes it."""
    return Sent(_own_path(forward), {"content-type": SAFETENSORS}, save(forward.tensors))


def as_json(forward: Forward) -> Sent:
    """Write a forward as nested lists; numbers are float32 there."""
    fields: dict[str, Any] = {name: tensor.tolist() for name, tensor in forward.tensors.items()}
    return Sent(_own_path(forward), {"content-type": "application/json"}, json.dumps(fields).encode())


def as_oip_json(forward: Forward, model: str = "tiny") -> Sent:
    """Write a forward as an Open Inference Protocol request that is all JSON."""
    inputs = [_oip_input(name, tensor) | {"data": _flat(tensor)} for name, tensor in forward.tensors.items()]
    body = json.dumps({"inputs": inputs, "parameters": _oip_parameters(forward)}).encode()
    return Sent(f"/v2/models/{model}/infer", {"content-type": "application/json"}, body)


def as_oip_binary(forward: Forward, model: str = "tiny") -> Sent:
    """Write a forward as an Open Inference Protocol request with binary tensors behind the JSON."""
    blobs = [_bytes(tensor) for tensor in forward.tensors.values()]
    inputs = []
    for (name, tensor), blob in zip(forward.tensors.items(), blobs, strict=True):
        item = _oip_input(name, tensor)
        item["parameters"] = {**item.get("parameters", {}), "binary_data_size": len(blob)}
        inputs.append(item)
    parameters = {**_oip_parameters(forward), "binary_data_output": True}
    head = json.dumps({"inputs": inputs, "parameters": parameters}).encode()
    headers = {"inference-header-content-length": str(len(head)), "content-type": "application/octet-stream"}
    return Sent(f"/v2/models/{model}/infer", headers, head + b"".join(blobs))


def read_output(response: httpx.Response) -> Tensor:
    """Read the tensor `output` of a reply in any form; numbers in JSON come as float32."""
    assert response.status_code == 200, response.text
    if response.headers["content-type"] == SAFETENSORS:
        return load(response.content)["output"]
    head, tail = oip_parts(response)
    if "outputs" not in head:
        return torch.tensor(head["output"], dtype=torch.float32)
    (output,) = head["outputs"]
    if "data" in output:
        return torch.tensor(output["data"], dtype=torch.float32).view(output["shape"])
    dtype = next(dtype for dtype, name in OIP_NAMES.items() if name == output["datatype"])
    assert len(tail) == output["parameters"]["binary_data_size"]
    return torch.frombuffer(bytearray(tail), dtype=dtype).view(output["shape"])


def oip_parts(response: httpx.Response) -> tuple[dict[str, Any], bytes]:
    """Split a reply into its JSON and the bytes behind."""
    end = int(response.headers.get("inference-header-content-length", len(response.content)))
    head: dict[str, Any] = json.loads(response.content[:end])
    return head, response.content[end:]


def post(url: str, sent: Sent) -> httpx.Response:
    """Send one request."""
    return httpx.post(url + sent.path, headers=sent.headers, content=sent.body, timeout=120.0)


def as_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """View a float tensor as numpy does, bfloat16 by ml_dtypes."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _own_path(forward: Forward) -> str:
    return f"/v1/moe/forward?layer={forward.layer}&shared_experts={str(forward.shared).lower()}"


def _oip_parameters(forward: Forward) -> dict[str, Any]:
    return {"layer": forward.layer, "shared_experts": forward.shared}


def _oip_input(name: str, tensor: Tensor) -> dict[str, Any]:
    item: dict[str, Any] = {"name": name, "shape": list(tensor.shape), "datatype": OIP_NAMES[tensor.dtype]}
    if tensor.dtype == torch.float8_e4m3fn:
        item["parameters"] = {"moe_dtype": "FP8_E4M3"}
    return item


def _flat(tensor: Tensor) -> list[Any]:
    values: list[Any] = tensor.flatten().tolist()
    return values


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
