"""Arrays of the caller to the body of a forward, and the body of its reply back to an array of the same kind.

Torch is never imported from here: an array can only be a torch tensor if the caller has imported torch.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors

from moe_forward.client.errors import TransportFailed
from moe_forward.types import SCALE_GROUP

Array = Any
"""A torch.Tensor or a numpy.ndarray."""

FLOATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float8_e4m3fn": "F8_E4M3"}
"""Element types of hidden states: name in torch, numpy and ml_dtypes -> name in safetensors."""

DTYPES = {**FLOATS, "int32": "I32", "int64": "I64"}


@dataclass(frozen=True, slots=True)
class OutputLike:
    """What the reply must hold, and what the caller gets it as.

    shape: the caller's hidden states; the wire has them as [T, H].
    dtype: name of the element type. device: of a torch tensor, None for numpy.
    """

    shape: tuple[int, ...]
    dtype: str
    device: Any | None


def encode_forward(
    hidden_states: Array,
    hidden_scales: Array | None,
    topk_ids: Array | None,
    topk_weights: Array | None,
    router_logits: Array | None,
) -> tuple[bytes, OutputLike]:
    """Check the arguments of a forward and write them as one safetensors body; leading dimensions become rows.

    hidden_states: [..., H] bfloat16, float16, float32 or float8_e4m3fn.
    hidden_scales: [...], [..., 1] or [..., H/128] float32, for float8_e4m3fn only.
    topk_ids: [..., K] int32 or int64. topk_weights: [..., K] float32.
    router_logits: [..., E] float32 or bfloat16.
    Returns: the body, and what its reply must look like.
    Raises: TypeError for a kind of array or element type, ValueError for a shape or a combination.
    """
    dtype = _dtype("hidden_states", hidden_states, FLOATS)
    shape = tuple(hidden_states.shape)
    if not shape or math.prod(shape) == 0:
        raise ValueError(f"hidden_states must be [..., H] with at least one token, got shape {list(shape)}")
    lead, hidden = shape[:-1], shape[-1]
    tokens = math.prod(lead)
    sent: dict[str, tuple[Array, tuple[int, ...]]] = {"hidden_states": (hidden_states, (tokens, hidden))}

    fp8 = dtype == "float8_e4m3fn"
    if fp8 and hidden_scales is None:
        raise ValueError("hidden_scales must come with float8_e4m3fn hidden_states, got None")
    if hidden_scales is not None:
        if not fp8:
            raise ValueError(f"hidden_scales only go with float8_e4m3fn hidden_states, which are {dtype}")
        _dtype("hidden_scales", hidden_scales, ("float32",))
        sent["hidden_scales"] = (hidden_scales, _scales_shape(tuple(hidden_scales.shape), lead, hidden))

    if (topk_ids is None) != (topk_weights is None):
        missing = "topk_ids" if topk_ids is None else "topk_weights"
        raise ValueError(f"topk_ids and topk_weights go together, got no {missing}")
    if topk_ids is not None and router_logits is not None:
        raise ValueError("give either topk_ids with topk_weights or router_logits, got both")
    if topk_ids is not None:
        _dtype("topk_ids", topk_ids, ("int32", "int64"))
        _dtype("topk_weights", topk_weights, ("float32",))
        top_k = _columns("topk_ids", topk_ids, lead, "K")
        weights = _columns("topk_weights", topk_weights, lead, "K")
        if weights != top_k:
            raise ValueError(f"topk_weights must have the {top_k} columns of topk_ids, got {weights}")
        sent["topk_ids"] = (topk_ids, (tokens, top_k))
        sent["topk_weights"] = (topk_weights, (tokens, top_k))
    if router_logits is not None:
        _dtype("router_logits", router_logits, ("float32", "bfloat16"))
        sent["router_logits"] = (router_logits, (tokens, _columns("router_logits", router_logits, lead, "E")))

    device = hidden_states.device if _is_torch(hidden_states) else None
    return _serialize(sent), OutputLike(shape, "bfloat16" if fp8 else dtype, device)


def decode_output(body: bytes, like: OutputLike) -> Array:
    """Read the tensor `output` of a reply.

    body: safetensors with `output` [T, H] in the element type of `like`.
    Returns: `like.shape`, writable, the caller's kind of array and device.
    Raises: TransportFailed when the body is anything else.
    """
    try:
        tensors: dict[str, Any] = dict(safetensors.deserialize(body))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise TransportFailed(f"the reply is not safetensors: {error}") from error
    if "output" not in tensors:
        raise TransportFailed(f"the reply must hold a tensor 'output', it holds {sorted(tensors)}")
    output = tensors["output"]
    wanted = [math.prod(like.shape[:-1]), like.shape[-1]]
    if output["dtype"] != FLOATS[like.dtype] or list(output["shape"]) != wanted:
        raise TransportFailed(
            f"output must be {FLOATS[like.dtype]} {wanted}, the reply holds {output['dtype']} {list(output['shape'])}"
        )
    if like.device is not None:
        torch: Any = sys.modules["torch"]
        flat = torch.frombuffer(output["data"], dtype=getattr(torch, like.dtype))
        return flat.reshape(like.shape).to(like.device)
    return np.frombuffer(output["data"], dtype=_numpy_dtype(like.dtype)).reshape(like.shape)


def _is_torch(array: Array) -> bool:
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _dtype(name: str, array: Array, allowed: Collection[str]) -> str:
    if _is_torch(array):
        found = str(array.dtype).removeprefix("torch.")
    elif isinstance(array, np.ndarray):
        found = array.dtype.name
    else:
        raise TypeError(f"{name} must be a torch tensor or a numpy array, got {type(array).__name__}")
    if found not in allowed:
        raise TypeError(f"{name} must be {' or '.join(allowed)}, got {found}")
    return found


def _columns(name: str, array: Array, lead: tuple[int, ...], dimension: str) -> int:
    shape = tuple(array.shape)
    if len(shape) != len(lead) + 1 or shape[:-1] != lead or shape[-1] == 0:
        wanted = ", ".join([*map(str, lead), dimension])
        raise ValueError(f"{name} must be [{wanted}], the rows of hidden_states, got shape {list(shape)}")
    return int(shape[-1])


def _scales_shape(shape: tuple[int, ...], lead: tuple[int, ...], hidden: int) -> tuple[int, ...]:
    tokens, groups = math.prod(lead), hidden // SCALE_GROUP
    if shape in (lead, (*lead, 1)):
        return (tokens,)
    if hidden % SCALE_GROUP == 0 and shape == (*lead, groups):
        return (tokens, groups)
    per_group = f" or {[*lead, groups]}" if hidden % SCALE_GROUP == 0 else ""
    raise ValueError(f"hidden_scales must be {list(lead)}, {[*lead, 1]}{per_group}, got shape {list(shape)}")


def _serialize(sent: dict[str, tuple[Array, tuple[int, ...]]]) -> bytes:
    """One copy of the data. Written here because the library's writer from memory differs between its versions."""
    header: dict[str, Any] = {}
    parts: list[Any] = []
    offset = 0
    for name, (array, shape) in sorted(
        sent.items(), key=lambda item: -item[1][0].dtype.itemsize
    ):  # each starts aligned
        data = _raw(array)
        code = DTYPES[_dtype(name, array, DTYPES)]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": (offset, offset + data.nbytes)}
        parts.append(data)
        offset += data.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def _raw(array: Array) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if _is_torch(array):
        torch: Any = sys.modules["torch"]
        raw: Any = array.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    else:
        raw = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
    return raw  # type: ignore[no-any-return]


def _numpy_dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":  # numpy has none of its own; who sends bfloat16 or fp8 arrays has ml_dtypes
        import ml_dtypes

        name = ml_dtypes.bfloat16
    return np.dtype(name)
