"""The one place where the tensors of a request are checked against the model.

NaN in hidden_states, hidden_scales and router_logits is not looked for here: ranks find it without an extra pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_forward.errors import ErrorCode, ForwardError
from moe_forward.types import SCALE_GROUP, DType, ModelSpec, Routing
from moe_forward.wire.base import ForwardCall, WireLimits, WireRequest, WireTensor
from moe_forward.wire.parameters import Given, resolve
from moe_forward.wire.text import shown

TENSORS = ("hidden_states", "hidden_scales", "topk_ids", "topk_weights", "router_logits")
_HIDDEN_DTYPES = (DType.BF16, DType.F16, DType.F32, DType.F8_E4M3)


def check_uncompressed(request: WireRequest) -> None:
    """Refuse a body with a content coding: tensors are read in place.

    Raises: ForwardError UNSUPPORTED_MEDIA_TYPE.
    """
    if "content-encoding" not in request.headers:
        return
    coding = request.headers["content-encoding"].strip().lower()
    if coding not in ("", "identity"):
        raise ForwardError(
            ErrorCode.UNSUPPORTED_MEDIA_TYPE, f"content-encoding: expected an uncompressed body, got {shown(coding)}"
        )


def forward_call(
    tensors: Mapping[str, WireTensor], parameters: Sequence[Given], limits: WireLimits, reply: object
) -> ForwardCall:
    """Check a request's tensors and parameters against the model.

    tensors: by name, each holding exactly the bytes its shape says. parameters: from `parameters.collect`.
    reply: the encoding's notes, kept as they are.
    Returns: the call; hidden_scales of shape [T] come out as [T, 1].
    Raises: ForwardError naming the tensor or parameter, what was expected and what came.
    """
    layer, shared_experts, timeout_seconds = resolve(parameters, limits)
    _check_names(tensors)
    hidden = _hidden_states(tensors["hidden_states"], limits)
    tokens = hidden.shape[0]
    routing, chosen, weights = _routing(tensors, tokens, limits.spec)
    return ForwardCall(
        layer=layer,
        tokens=tokens,
        timeout_seconds=timeout_seconds,
        shared_experts=shared_experts,
        hidden=hidden,
        hidden_scales=_hidden_scales(tensors.get("hidden_scales"), hidden),
        routing=routing,
        chosen=chosen,
        weights=weights,
        output_dtype=DType.BF16 if hidden.dtype is DType.F8_E4M3 else hidden.dtype,
        reply=reply,
    )


def _check_names(tensors: Mapping[str, WireTensor]) -> None:
    for name in tensors:
        if name not in TENSORS:
            raise ForwardError(
                ErrorCode.UNEXPECTED_TENSOR, f"tensors: expected only {', '.join(TENSORS)}, got {shown(name)}"
            )
    if "hidden_states" not in tensors:
        raise ForwardError(
            ErrorCode.MISSING_TENSOR, f"hidden_states: expected this tensor, got {list(tensors) or 'no tensors'}"
        )
    for name, other in (("topk_ids", "topk_weights"), ("topk_weights", "topk_ids")):
        if name in tensors and other not in tensors:
            raise ForwardError(
                ErrorCode.MISSING_TENSOR, f"{other}: expected this tensor beside {name}, got only {name}"
            )
    if "topk_ids" in tensors and "router_logits" in tensors:
        raise ForwardError(
            ErrorCode.UNEXPECTED_TENSOR,
            "router_logits: expected either router_logits or topk_ids with topk_weights, got both",
        )


def _hidden_states(hidden: WireTensor, limits: WireLimits) -> WireTensor:
    width = limits.spec.hidden_size
    _check_dtype(hidden, _HIDDEN_DTYPES)
    if len(hidden.shape) != 2 or hidden.shape[1] != width or hidden.shape[0] < 1:
        at_least = "at least one token" if 0 in hidden.shape[:1] else f"shape [tokens, {width}]"
        raise ForwardError(ErrorCode.WRONG_SHAPE, f"hidden_states: expected {at_least}, got {list(hidden.shape)}")
    if hidden.shape[0] > limits.max_request_tokens:
        raise ForwardError(
            ErrorCode.TOO_LARGE,
            f"hidden_states: expected at most {limits.max_request_tokens} tokens in a request, got {hidden.shape[0]}",
        )
    return hidden


def _hidden_scales(scales: WireTensor | None, hidden: WireTensor) -> WireTensor | None:
    tokens, width = hidden.shape
    if hidden.dtype is not DType.F8_E4M3:
        if scales is not None:
            raise ForwardError(
                ErrorCode.UNEXPECTED_TENSOR,
                f"hidden_scales: expected only beside hidden_states in F8_E4M3, got them beside {hidden.dtype.name}",
            )
        return None
    if scales is None:
        raise ForwardError(
            ErrorCode.MISSING_TENSOR, "hidden_scales: expected this tensor beside hidden_states in F8_E4M3, got none"
        )
    _check_dtype(scales, (DType.F32,))
    groups = (width // SCALE_GROUP,) if width % SCALE_GROUP == 0 else ()
    accepted = [(tokens,), (tokens, 1), *((tokens, count) for count in groups)]
    if scales.shape not in accepted:
        expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(accepted))
        raise ForwardError(ErrorCode.WRONG_SHAPE, f"hidden_scales: expected shape {expected}, got {list(scales.shape)}")
    return scales._replace(shape=(tokens, 1)) if len(scales.shape) == 1 else scales


def _routing(
    tensors: Mapping[str, WireTensor], tokens: int, spec: ModelSpec
) -> tuple[Routing, WireTensor | None, WireTensor | None]:
    if "router_logits" in tensors:
        logits = tensors["router_logits"]
        _check_dtype(logits, (DType.F32, DType.BF16))
        _check_shape(logits, (tokens, spec.num_experts), "[tokens, experts]")
        return Routing.LOGITS, logits, None
    if "topk_ids" in tensors:
        ids, weights = tensors["topk_ids"], tensors["topk_weights"]
        _check_dtype(ids, (DType.I32, DType.I64))
        _check_dtype(weights, (DType.F32,))
        _check_shape(ids, (tokens, spec.top_k), "[tokens, top_k]")
        _check_shape(weights, (tokens, spec.top_k), "[tokens, top_k]")
        _check_ids(_view(ids, "<i4" if ids.dtype is DType.I32 else "<i8"), spec.num_experts)
        _check_weights(_view(weights, "<f4"))
        return Routing.TOPK, ids, weights
    return Routing.SERVER, None, None


def _check_ids(ids: npt.NDArray[Any], num_experts: int) -> None:
    bad = np.argwhere((ids < 0) | (ids >= num_experts))
    if bad.size:
        row, column = map(int, bad[0])
        raise ForwardError(
            ErrorCode.OUT_OF_RANGE, f"topk_ids row {row}: expected ids in [0, {num_experts}), got {ids[row, column]}"
        )
    ordered = np.sort(ids, axis=1)
    twice = np.argwhere(ordered[:, 1:] == ordered[:, :-1])
    if twice.size:
        row, column = map(int, twice[0])
        raise ForwardError(
            ErrorCode.OUT_OF_RANGE, f"topk_ids row {row}: expected every id once, got {ordered[row, column]} twice"
        )


def _check_weights(weights: npt.NDArray[Any]) -> None:
    bad = np.argwhere(~np.isfinite(weights))
    if bad.size:
        row, column = map(int, bad[0])
        raise ForwardError(
            ErrorCode.NON_FINITE,
            f"topk_weights row {row} column {column}: expected a finite weight, got {weights[row, column]}",
        )


def _check_dtype(tensor: WireTensor, accepted: tuple[DType, ...]) -> None:
    if tensor.dtype not in accepted:
        expected = " or ".join(dtype.name for dtype in accepted)
        raise ForwardError(ErrorCode.WRONG_DTYPE, f"{tensor.name}: expected {expected}, got {tensor.dtype.name}")


def _check_shape(tensor: WireTensor, expected: tuple[int, int], meaning: str) -> None:
    if tensor.shape != expected:
        raise ForwardError(
            ErrorCode.WRONG_SHAPE,
            f"{tensor.name}: expected shape {list(expected)} ({meaning}), got {list(tensor.shape)}",
        )


def _view(tensor: WireTensor, dtype: str) -> npt.NDArray[Any]:
    return np.frombuffer(tensor.data, dtype).reshape(tensor.shape)
