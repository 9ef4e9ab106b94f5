"""The messages of every request and step as packed structs: little endian, without padding."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

from moe_forward.messages import RankWord, StepAnswers, StepOrder, StepSummary, Ticket
from moe_forward.types import (
    PHASES,
    DType,
    ForwardRequest,
    ForwardResult,
    QueueReport,
    Routing,
    Step,
    StepReport,
    StepResult,
    TensorRef,
)

_REF = "QBI"
_NO_DTYPE = 255
_NO_REF = (0, _NO_DTYPE, 0)
_HEAD = "<IQiIdBBQ"
_REQUEST = struct.Struct(_HEAD + 5 * _REF)
_REQUEST_HEAD = struct.Struct(_HEAD)
_REF_BYTES = struct.calcsize("<" + _REF)
_FIRST_DTYPE = _REQUEST_HEAD.size + struct.calcsize("<Q")
_FRONT = struct.Struct("<I")
_DTYPES = tuple(DType)
_ROUTINGS = tuple(Routing)
_LAST_ROUTING = len(_ROUTINGS) - 1
_DTYPES_OR_NONE = frozenset((*DType, _NO_DTYPE))
_RESULT = struct.Struct("<IQidddII?qIII")
_ANSWERS = struct.Struct("<QIIIIdIII")
_STEP = struct.Struct("<QIi")
_STEP_RESULT = struct.Struct(f"<QII?{len(PHASES)}dQQQQIII")
_RANK_WORD = struct.Struct(f"<QIIx{8 * len(PHASES)}x32xIII")  # the same without what only the metrics need
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
    return None if dtype == _NO_DTYPE else TensorRef(offset, _DTYPES[dtype], columns)


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


def _unpack_ticket(data: memoryview) -> Ticket:
    """Return what the engine needs of a request.

    Raises: ValueError for what a rank could not read: that would cost the whole group, not the one who sent it.
    """
    packed = bytes(data)
    if len(packed) != _REQUEST.size:
        raise ValueError(f"a request has {len(packed)} bytes, expected {_REQUEST.size}")
    front, request, layer, tokens, deadline, _, routing, client = _REQUEST_HEAD.unpack_from(packed)
    dtypes = packed[_FIRST_DTYPE::_REF_BYTES]  # a byte of each tensor
    if _NO_DTYPE in dtypes[::4]:  # the first and the last
        raise ValueError("a request names neither its input nor its output")
    if routing > _LAST_ROUTING or not _DTYPES_OR_NONE.issuperset(dtypes):
        raise ValueError("a request has a routing or an element type that does not exist")
    # As `Ticket(...)`, whose own constructor is a function of Python.
    return tuple.__new__(Ticket, (front, request, layer, tokens, deadline, client, packed))


def of_front(ticket: Ticket, front: int) -> Ticket:
    """Return the ticket as one of front end `front`, whatever it said."""
    return ticket._replace(front=front, packed=_FRONT.pack(front) + ticket.packed[_FRONT.size :])


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


def _pack_answers(m: StepAnswers) -> bytes:
    counts = (len(m.requests), len(m.non_finite), len(m.missing_routes))
    head = _ANSWERS.pack(*m[:6], *counts)
    return head + struct.pack(_columns(*counts), *m.requests, *m.queue_seconds, *m.non_finite, *m.missing_routes)


def _unpack_answers(data: memoryview) -> StepAnswers:
    *common, count, flagged, routes = _ANSWERS.unpack_from(data)
    numbers = struct.unpack_from(_columns(count, flagged, routes), data, _ANSWERS.size)
    flags = 2 * count
    step, generation, tokens, requests, missing, seconds = common
    return StepAnswers(
        step,
        generation,
        tokens,
        requests,
        missing,
        seconds,
        numbers[:count],
        numbers[count:flags],
        numbers[flags : flags + flagged],
        numbers[flags + flagged :],
    )


def _columns(requests: int, non_finite: int, missing_routes: int) -> str:
    return f"<{requests}Q{requests}d{non_finite}I{missing_routes}I"


def _pack_order(m: StepOrder) -> bytes:
    return _STEP.pack(*m[:3]) + b"".join([ticket.packed for ticket in m.tickets])


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
    numbers = m.non_finite + m.expert_rows + m.missing_routes
    if numbers or m.error:
        return head + struct.pack(f"<{len(numbers)}I", *numbers) + m.error.encode()
    return head


def _unpack_step_result(data: memoryview) -> StepResult:
    step, generation, rank, timed, *rest = _STEP_RESULT.unpack_from(data)
    *phases, routed, requantized, dispatched, combined, count, experts, missing = rest
    words = (step, generation, rank, tuple(phases) if timed else (), routed, requantized)
    if len(data) == _STEP_RESULT.size and not count + experts + missing:
        return StepResult(*words, (), "", dispatched, combined)
    numbers = struct.unpack_from(f"<{count + experts + missing}I", data, _STEP_RESULT.size)
    error = bytes(data[_STEP_RESULT.size + 4 * len(numbers) :]).decode()
    flagged, rows = numbers[:count], numbers[count : count + experts]
    return StepResult(*words, flagged, error, dispatched, combined, rows, numbers[count + experts :])


def _unpack_rank_word(data: memoryview) -> RankWord:
    """Return what the engine needs of a step's result.

    Raises: ValueError or struct.error for what a front end could not read, which would take the engine for broken.
    """
    packed = bytes(data)
    step, generation, rank, *sizes = _RANK_WORD.unpack_from(packed)
    if len(packed) == _RANK_WORD.size and not any(sizes):
        return RankWord(step, generation, rank, packed)
    whole = _unpack_step_result(data)
    return RankWord(step, generation, rank, packed, whole.non_finite, whole.missing_routes, whole.error)


def _pack_report(m: StepReport) -> bytes:
    return _join_report(m[:5], [_pack_step_result(result) for result in m.results])


def _pack_summary(m: StepSummary) -> bytes:
    return _join_report(m[:5], [word.packed for word in m.results])


def _join_report(head: tuple[int, ...], results: list[bytes]) -> bytes:
    parts = [_REPORT.pack(*head)]
    for packed in results:
        parts += (_COUNT.pack(len(packed)), packed)
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


CODECS: dict[type[Any], tuple[int, Callable[[Any], bytes], Callable[[memoryview], Any]]] = {
    ForwardRequest: (1, _pack_request, _unpack_ticket),
    ForwardResult: (2, _pack_result, _unpack_result),
    Step: (3, _pack_step, _unpack_step),
    StepOrder: (3, _pack_order, _unpack_step),
    StepResult: (4, _pack_step_result, _unpack_step_result),
    StepReport: (5, _pack_report, _unpack_report),
    StepSummary: (5, _pack_summary, _unpack_report),
    QueueReport: (15, _pack_queue, _unpack_queue),
    StepAnswers: (18, _pack_answers, _unpack_answers),
}
"""A message's kind, and how it becomes bytes and comes out of them again: a request as a ticket, an order as a step, a
summary as a report."""

OF_ENGINE: dict[int, Callable[[memoryview], Any]] = {4: _unpack_rank_word}
"""What the engine reads in its own way, by kind: the results of steps."""
