"""How a message becomes the bytes of a datagram, and comes out of them again.

The messages of every request and step are packed structs; the rare ones (hello, status, slabs) are JSON. The first
byte says which. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from moe_forward.errors import ChannelClosed
from moe_forward.messages import (
    Announce,
    AttachSlab,
    Cancel,
    ConnectionGone,
    DetachSlab,
    Drain,
    FrontFailed,
    FrontHello,
    FrontSamples,
    FrontUp,
    FrontWelcome,
    Heartbeat,
    InFlight,
    Message,
    RankHello,
    RankTokens,
    Released,
    Several,
    Stop,
    TakeConnection,
)
from moe_forward.types import (
    PHASES,
    DType,
    EngineStatus,
    ForwardRequest,
    ForwardResult,
    QueueReport,
    RankInfo,
    Routing,
    Step,
    StepReport,
    StepResult,
    TensorRef,
)

_REF = "QBI"
_NO_REF = (0, 255, 0)
_REQUEST = struct.Struct(f"<IQiIdBBQ{5 * _REF}")
_DTYPES = tuple(DType)
_ROUTINGS = tuple(Routing)
_RESULT = struct.Struct("<IQidddII?qIII")
_STEP = struct.Struct("<QIi")
_STEP_RESULT = struct.Struct(f"<QII?{len(PHASES)}dQQQQIII")
_UNTIMED = (0.0,) * len(PHASES)
_REPORT = struct.Struct("<iIIII")
_QUEUE = struct.Struct("<II")
_COUNT = struct.Struct("<I")


def _pack_request(m: ForwardRequest) -> bytes:
    return _REQUEST.pack(
        m.front,
        m.request,
        m.layer,
        m.tokens,
        m.deadline_seconds,
        m.shared_experts,
        m.routing,
        m.client,
        *m.hidden,
        *(m.hidden_scales or _NO_REF),
        *(m.chosen or _NO_REF),
        *(m.weights or _NO_REF),
        *m.output,
    )


def _ref(offset: int, dtype: int, columns: int) -> TensorRef | None:
    return None if dtype == 255 else TensorRef(offset, _DTYPES[dtype], columns)


def _unpack_request(data: memoryview, at: int = 0) -> ForwardRequest:
    front, request, layer, tokens, deadline, shared, routing, client, *refs = _REQUEST.unpack_from(data, at)
    hidden, output = _ref(*refs[:3]), _ref(*refs[12:])
    if hidden is None or output is None:
        raise ValueError("a request names neither its input nor its output")
    return ForwardRequest(
        front,
        request,
        layer,
        tokens,
        deadline,
        bool(shared),
        hidden,
        _ref(*refs[3:6]),
        _ROUTINGS[routing],
        _ref(*refs[6:9]),
        _ref(*refs[9:12]),
        output,
        client,
    )


def _pack_result(m: ForwardResult) -> bytes:
    code = -1 if m.code is None else m.code
    retry = math.nan if m.retry_after_seconds is None else m.retry_after_seconds
    sizes = (m.queue_seconds, m.step_seconds, m.batch_tokens, m.batch_requests, m.held)
    step = -1 if m.step is None else m.step
    missing = (m.missing_routes, m.missing_experts)
    return _RESULT.pack(m.front, m.request, code, retry, *sizes, step, m.generation, *missing) + m.message.encode()


def _unpack_result(data: memoryview) -> ForwardResult:
    front, request, code, retry, queue, seconds, tokens, requests, held, step, *rest = _RESULT.unpack_from(data)
    return ForwardResult(
        front,
        request,
        None if code < 0 else code,
        bytes(data[_RESULT.size :]).decode(),
        None if math.isnan(retry) else retry,
        queue,
        seconds,
        tokens,
        requests,
        held,
        None if step < 0 else step,
        *rest,
    )


def _pack_step(m: Step) -> bytes:
    return _STEP.pack(m.step, m.generation, m.layer) + b"".join(_pack_request(request) for request in m.requests)


def _unpack_step(data: memoryview) -> Step:
    step, generation, layer = _STEP.unpack_from(data)
    starts = range(_STEP.size, len(data), _REQUEST.size)
    return Step(step, generation, layer, tuple(_unpack_request(data, at) for at in starts))


def _pack_step_result(m: StepResult) -> bytes:
    counts = (m.routed_rows, m.requantized_tokens, m.dispatch_bytes, m.combine_bytes)
    sizes = (len(m.non_finite), len(m.expert_rows), len(m.missing_routes))
    timed = bool(m.phase_seconds)
    head = _STEP_RESULT.pack(m.step, m.generation, m.rank, timed, *(m.phase_seconds or _UNTIMED), *counts, *sizes)
    numbers = struct.pack(f"<{sum(sizes)}I", *m.non_finite, *m.expert_rows, *m.missing_routes)
    return head + numbers + m.error.encode()


def _unpack_step_result(data: memoryview) -> StepResult:
    step, generation, rank, timed, *rest = _STEP_RESULT.unpack_from(data)
    *phases, routed, requantized, dispatched, combined, count, experts, missing = rest
    numbers = struct.unpack_from(f"<{count + experts + missing}I", data, _STEP_RESULT.size)
    error = bytes(data[_STEP_RESULT.size + 4 * len(numbers) :]).decode()
    return StepResult(
        step,
        generation,
        rank,
        tuple(phases) if timed else (),
        routed,
        requantized,
        numbers[:count],
        error,
        dispatched,
        combined,
        numbers[count : count + experts],
        numbers[count + experts :],
    )


def _pack_report(m: StepReport) -> bytes:
    parts = [_REPORT.pack(m.layer, m.tokens, m.requests, m.queue_requests, m.queue_tokens)]
    for result in m.results:
        packed = _pack_step_result(result)
        parts += [_COUNT.pack(len(packed)), packed]
    return b"".join(parts)


def _unpack_report(data: memoryview) -> StepReport:
    results, at = [], _REPORT.size
    while at < len(data):
        (size,) = _COUNT.unpack_from(data, at)
        results.append(_unpack_step_result(data[at + 4 : at + 4 + size]))
        at += 4 + size
    layer, tokens, requests, queue_requests, queue_tokens = _REPORT.unpack_from(data)
    return StepReport(layer, tokens, requests, queue_requests, queue_tokens, tuple(results))


def _pack_queue(m: QueueReport) -> bytes:
    return _QUEUE.pack(m.requests, m.tokens)


def _unpack_queue(data: memoryview) -> QueueReport:
    return QueueReport(*_QUEUE.unpack(data))


def _pack_json(message: Any) -> bytes:
    return json.dumps(dataclasses.asdict(message), separators=(",", ":")).encode()


def _rank_info(fields: dict[str, Any]) -> RankInfo:
    return RankInfo(**{**fields, "experts": tuple(fields["experts"])})


def _unpack_status(data: memoryview) -> EngineStatus:
    fields = json.loads(bytes(data))
    ranks = tuple(_rank_info(rank) for rank in fields["ranks"])
    return EngineStatus(**{**fields, "ranks": ranks, "missing": tuple(fields["missing"])})


def _unpack_announce(data: memoryview) -> Announce:
    fields = json.loads(bytes(data))
    return Announce(**{**fields, "missing": tuple(fields["missing"])})


def _unpack_rank_hello(data: memoryview) -> RankHello:
    fields = json.loads(bytes(data))
    return RankHello(**{**fields, "info": _rank_info(fields["info"])})


def _unpack_released(data: memoryview) -> Released:
    return Released(tuple(json.loads(bytes(data))["requests"]))


def _tuples(value: Any) -> Any:
    """Return JSON's lists as the tuples they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _pack_samples(m: FrontSamples) -> bytes:
    return json.dumps({"samples": m.samples}, separators=(",", ":")).encode()


def _unpack_samples(data: memoryview) -> FrontSamples:
    return FrontSamples(_tuples(json.loads(bytes(data))["samples"]))


def _unpack_rank_tokens(data: memoryview) -> RankTokens:
    return RankTokens(_tuples(json.loads(bytes(data))["tokens"]))


def _bundle(packed: Iterable[bytes]) -> bytes:
    return b"".join(part for one in packed for part in (_COUNT.pack(len(one)), one))


def _pack_several(m: Several) -> bytes:
    return _bundle(map(pack, m.messages))


def _unpack_several(data: memoryview) -> Several:
    messages, at = [], 0
    while at < len(data):
        (size,) = _COUNT.unpack_from(data, at)
        one = data[at + 4 : at + 4 + size]
        if len(one) < size or one[0] == _CODECS[Several][0]:
            raise ValueError("a datagram of several messages is cut off, or holds another such")
        messages.append(unpack(one))
        at += 4 + size
    return Several(tuple(messages))


def _from_json(kind: type[Any]) -> Callable[[memoryview], Any]:
    return lambda data: kind(**json.loads(bytes(data)))


_CODECS: dict[type[Any], tuple[int, Callable[[Any], bytes], Callable[[memoryview], Any]]] = {
    ForwardRequest: (1, _pack_request, _unpack_request),
    ForwardResult: (2, _pack_result, _unpack_result),
    Step: (3, _pack_step, _unpack_step),
    StepResult: (4, _pack_step_result, _unpack_step_result),
    StepReport: (5, _pack_report, _unpack_report),
    EngineStatus: (6, _pack_json, _unpack_status),
    FrontHello: (7, _pack_json, _from_json(FrontHello)),
    FrontWelcome: (8, _pack_json, _from_json(FrontWelcome)),
    Cancel: (9, _pack_json, _from_json(Cancel)),
    Released: (10, _pack_json, _unpack_released),
    Announce: (11, _pack_json, _unpack_announce),
    RankHello: (12, _pack_json, _unpack_rank_hello),
    AttachSlab: (13, _pack_json, _from_json(AttachSlab)),
    DetachSlab: (14, _pack_json, _from_json(DetachSlab)),
    QueueReport: (15, _pack_queue, _unpack_queue),
    Heartbeat: (16, _pack_json, _from_json(Heartbeat)),
    Several: (17, _pack_several, _unpack_several),
    FrontUp: (32, _pack_json, _from_json(FrontUp)),
    FrontFailed: (33, _pack_json, _from_json(FrontFailed)),
    TakeConnection: (34, _pack_json, _from_json(TakeConnection)),
    ConnectionGone: (35, _pack_json, _from_json(ConnectionGone)),
    Drain: (36, _pack_json, _from_json(Drain)),
    Stop: (37, _pack_json, _from_json(Stop)),
    RankTokens: (38, _pack_json, _unpack_rank_tokens),
    InFlight: (40, _pack_json, _from_json(InFlight)),
    FrontSamples: (39, _pack_samples, _unpack_samples),
}
_DECODERS = {number: decode for number, _, decode in _CODECS.values()}


def pack(message: Message) -> bytes:
    """Return the datagram for `message`."""
    number, encode, _ = _CODECS[type(message)]
    return bytes((number,)) + encode(message)


def pack_together(messages: Iterable[Message], most_bytes: int) -> Iterator[bytes]:
    """Yield datagrams for messages to one peer, as few as fit into `most_bytes` each (one alone may be longer)."""
    waiting: list[bytes] = []
    size = 1
    for packed in map(pack, messages):
        if waiting and size + 4 + len(packed) > most_bytes:
            yield _datagram(waiting)
            waiting, size = [], 1
        waiting.append(packed)
        size += 4 + len(packed)
    if waiting:
        yield _datagram(waiting)


def _datagram(packed: list[bytes]) -> bytes:
    return packed[0] if len(packed) == 1 else bytes((_CODECS[Several][0],)) + _bundle(packed)


def unpack(data: memoryview) -> Message:
    """Return the message of a datagram; raises ValueError for a kind this version does not know."""
    decode = _DECODERS.get(data[0])
    if decode is None:
        raise ValueError(f"unknown message kind {data[0]}")
    message: Message = decode(data[1:])
    return message


def read(data: memoryview) -> Message:
    """Return the message in what a peer sent; what cannot be read means another program or version.

    Raises: ChannelClosed.
    """
    try:
        return unpack(data)
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise ChannelClosed(f"a message could not be read: {error}") from error
