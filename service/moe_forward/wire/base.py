"""What every encoding of a forward reads and makes: bytes on one side, checked tensors on the other.

Nothing here does I/O or copies a tensor: bodies lie in shared memory, tensors are sub-views of them.
Dimensions: T tokens, H hidden, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

from moe_forward.types import DType, ModelSpec, Routing


@dataclass(frozen=True, slots=True, eq=False)
class WireLimits:
    """What a request is checked against; one object a front end, told from others by being another.

    spec: the served model. max_request_tokens: rows of one request at most. max_timeout_seconds: longest deadline.
    max_json_values: numbers in a JSON reply at most: to write a million takes a front end a second or more, in which it
        serves nobody else.
    """

    spec: ModelSpec
    max_request_tokens: int
    max_timeout_seconds: float
    max_json_values: int


class WireRequest(NamedTuple):
    """One HTTP request whose body is complete.

    headers: lower-case names. query: pairs in the order they came, decoded.
    body: contiguous bytes, read in place. model, version: from the path, or None where the path has none.
    """

    headers: Mapping[str, str]
    query: Sequence[tuple[str, str]]
    body: memoryview
    model: str | None = None
    version: str | None = None


class WireTensor(NamedTuple):
    """A row-major little-endian tensor.

    data: contiguous bytes of exactly `shape`, at any alignment.
    offset: bytes from the start of the body; None when the data was converted and lies outside of it.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    data: memoryview
    offset: int | None


class ForwardCall(NamedTuple):
    """A request that was checked against the model.

    timeout_seconds: the deadline it asked for, None when it names none.
    hidden: [T, H] BF16, F16, F32 or F8_E4M3. hidden_scales: [T, 1] or [T, H/128] F32 for fp8 input, else None.
    chosen: ids [T, K] I32 or I64 (TOPK), router logits [T, E] F32 or BF16 (LOGITS), else None.
    weights: [T, K] F32 (TOPK), else None. output_dtype: of the reply, hidden's float type, BF16 for fp8 input.
    reply: the encoding's own notes for its `encode`.
    """

    layer: int
    tokens: int
    timeout_seconds: float | None
    shared_experts: bool
    hidden: WireTensor
    hidden_scales: WireTensor | None
    routing: Routing
    chosen: WireTensor | None
    weights: WireTensor | None
    output_dtype: DType
    reply: object


class ReplyNotes(NamedTuple):
    """What a reply says about its forward.

    batch_tokens: rows of the step it was part of. queue_seconds, step_seconds: waiting and computing.
    lacking: further fields of a reply that was made without some experts, where the encoding has a place for them.
    """

    request_id: str
    batch_tokens: int
    queue_seconds: float
    step_seconds: float
    lacking: Mapping[str, int] = MappingProxyType({})


class WireReply(NamedTuple):
    """A reply body, sent as `head` and then `body` without joining them.

    headers: lower-case names, beside content-type and content-length.
    """

    content_type: str
    headers: tuple[tuple[str, str], ...]
    head: bytes
    body: memoryview | bytes


class Encoding(Protocol):
    """One way to write a forward as bytes; each is a module of this package.

    name: as the metrics label it.
    """

    @property
    def name(self) -> str:
        """Label of the encoding."""

    def decode(self, request: WireRequest, limits: WireLimits) -> ForwardCall:
        """Read and check a request.

        Raises: ForwardError naming the tensor or parameter, what was expected and what came; nothing else.
        """

    def encode(self, call: ForwardCall, output: memoryview, notes: ReplyNotes) -> WireReply:
        """Write the reply to `call`.

        output: bytes of [T, H] in `call.output_dtype`.
        Raises: ForwardError when the encoding cannot hold a value, ValueError when `output` has the wrong size.
        """


def output_shape(call: ForwardCall, output: memoryview) -> tuple[int, int]:
    """Shape [T, H] of a reply.

    Raises: ValueError when `output` does not hold exactly that many elements.
    """
    shape = (call.tokens, call.hidden.shape[1])
    expected_bytes = shape[0] * shape[1] * call.output_dtype.itemsize
    if output.nbytes != expected_bytes:
        raise ValueError(f"output: expected {expected_bytes} bytes for {list(shape)}, got {output.nbytes}")
    return shape
