"""The two tensor routes: raw ASGI inside the application, which halves the latency of small requests.

A request goes: refusals that need no body -> body into the slab -> decode -> engine -> encode -> copies out. Its bytes
stay in the slab until the engine says that no rank can touch them, whatever becomes of the client meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from starlette.types import Receive, Scope, Send

from moe_forward.api.availability import Availability
from moe_forward.api.body import ClientDisconnected
from moe_forward.api.call_head import CallHead, read_call_head
from moe_forward.api.clients import client_number
from moe_forward.api.errors import STATUS, render
from moe_forward.api.keys import caller
from moe_forward.api.lease import Lease
from moe_forward.api.peer import Peer, peer_of
from moe_forward.api.ports import Link
from moe_forward.api.request_id import HEADER, request_id
from moe_forward.config import Config
from moe_forward.errors import ErrorCode, ForwardError
from moe_forward.logs import log_request
from moe_forward.metrics import Metrics
from moe_forward.request_record import RequestRecord
from moe_forward.slab import Extent
from moe_forward.tracing import Tracer, trace_context
from moe_forward.types import ForwardRequest, ForwardResult, TensorRef
from moe_forward.wire.base import Encoding, ForwardCall, ReplyNotes, WireLimits, WireReply, WireRequest, WireTensor
from moe_forward.wire.missing import marked, missing_of

log = logging.getLogger(__name__)

ID_HEADER = HEADER.decode()


@dataclass(frozen=True, slots=True)
class ForwardParts:
    """What both tensor routes work with. tracer: None where nobody collects traces."""

    config: Config
    limits: WireLimits
    link: Link
    availability: Availability
    metrics: Metrics
    tracer: Tracer | None = None


class ForwardRoute:
    """One tensor route as an ASGI application.

    route: path template, for metrics and logs.
    choose: request headers -> encoding and the largest body of it in bytes; raises ForwardError.
    """

    def __init__(
        self, route: str, choose: Callable[[Mapping[str, str]], tuple[Encoding, int]], parts: ForwardParts
    ) -> None:
        self._route = route
        self._choose = choose
        self._parts = parts
        self._link = parts.link
        self._model = parts.limits.spec.name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request and account for it, whatever its end."""
        record = RequestRecord(self._route, request_id(scope), self._model, caller=caller(scope))
        peer = peer_of(scope, receive, send)
        lease = Lease(self._link)
        parts = self._parts
        started = record.moments.started = time.perf_counter()
        span = self._begin_trace(scope, peer, record)
        parts.metrics.request_started(self._model)
        parts.availability.inflight += 1
        try:
            await self._serve(scope, peer, lease, record)
        except (ClientDisconnected, asyncio.CancelledError) as error:
            record.status, record.code = STATUS[ErrorCode.CANCELLED], ErrorCode.CANCELLED
            if isinstance(error, asyncio.CancelledError):
                raise
        finally:
            parts.availability.inflight -= 1
            lease.release()
            record.duration_seconds = time.perf_counter() - started
            parts.metrics.request_finished(record)
            if parts.tracer is not None:
                parts.tracer.request_finished(span, record)
            _log(record)

    def _begin_trace(self, scope: Scope, peer: Peer, record: RequestRecord) -> object:
        """Note the trace that the request is part of, and begin its span where traces are collected."""
        head: CallHead | None = peer.notes.get(self)
        parent = trace_context(scope["headers"]) if head is None else head.trace
        if parent is not None:
            record.trace_id, record.sampled = parent.trace_id, parent.sampled
        return None if self._parts.tracer is None else self._parts.tracer.request_started(record, parent)

    async def _serve(self, scope: Scope, peer: Peer, lease: Lease, record: RequestRecord) -> None:
        chunk_timeout = self._parts.config.body_timeout_seconds
        try:
            reply = await self._answer(scope, peer, lease, record)
        except ForwardError as refusal:
            # Its traceback names this frame, which is to name the error: another ring for the garbage collector.
            error = refusal.with_traceback(None)
        except ClientDisconnected:
            raise
        except Exception:
            where = {"request_id": record.request_id, "route": record.route, "trace_id": record.trace_id}
            log.exception("a forward failed", extra=where)
            error = ForwardError(ErrorCode.INTERNAL, "internal error; the log has the details under this request id")
        else:
            queue_ms, step_ms = 1e3 * (record.queue_seconds or 0.0), 1e3 * (record.step_seconds or 0.0)
            headers = (
                ("content-type", reply.content_type),
                *reply.headers,
                (ID_HEADER, record.request_id),
                ("server-timing", f"queue;dur={queue_ms:.3f}, step;dur={step_ms:.3f}"),
            )
            record.moments.sending = time.perf_counter()
            await peer.send_reply(record.status, headers, reply.head, reply.body, lease.release, chunk_timeout)
            return
        rendered = render(error, record.request_id)
        record.moments.sending = time.perf_counter()
        record.status, record.code = rendered.status, error.code
        if rendered.status >= 500:  # what the service did wrong; a 4xx sentence may quote what the client sent
            record.error = error.message
        headers = (*rendered.headers, (ID_HEADER, record.request_id))
        await peer.send_reply(rendered.status, headers, b"", rendered.body, lease.release, chunk_timeout)

    async def _answer(self, scope: Scope, peer: Peer, lease: Lease, record: RequestRecord) -> WireReply:
        limits, slab, moments = self._parts.limits, self._link.slab, record.moments
        refusal = self._parts.availability.refusal()
        if refusal is not None:
            raise refusal
        head: CallHead | None = peer.notes.get(self)
        if head is None:
            head = peer.notes[self] = read_call_head(scope, self._choose, limits.spec)
        headers, query, model, version, encoding, body_bytes, _ = head
        record.encoding = encoding.name
        body = lease.take(body_bytes, "the body")
        view = slab.view(body.offset, body_bytes)
        await peer.receive_body(view, self._parts.config.body_timeout_seconds)
        record.body_bytes = body_bytes

        start = moments.decoding = time.perf_counter()
        call = encoding.decode(WireRequest(headers, query, view, model, version), limits)
        record.layer, record.tokens = call.layer, call.tokens
        request = self._request(call, body, lease, client_number(scope))
        handed_over = moments.handed_over = time.perf_counter()
        record.decode_seconds = handed_over - start

        result = record.result = await self._result(request, peer, lease)
        start = moments.answered = time.perf_counter()
        record.queue_seconds, record.step_seconds = result.queue_seconds, result.step_seconds
        if result.code is not None:
            raise ForwardError(ErrorCode(result.code), result.message, result.retry_after_seconds)

        moments.encoding = start
        place = request.output
        output = slab.view(place.offset, call.tokens * place.columns * place.dtype.itemsize)
        missing = missing_of(result, limits.spec.num_experts)
        lacking = {} if missing is None else missing.fields
        notes = ReplyNotes(record.request_id, result.batch_tokens, result.queue_seconds, result.step_seconds, lacking)
        reply = marked(encoding.encode(call, output, notes), missing)
        record.encode_seconds = time.perf_counter() - start
        return reply

    def _request(self, call: ForwardCall, body: Extent, lease: Lease, client: int) -> ForwardRequest:
        """Describe `call` to the engine: every tensor by its place in the slab, converted ones copied there."""
        columns = self._parts.limits.spec.hidden_size
        output = lease.take(call.tokens * columns * call.output_dtype.itemsize, "the output")
        scales, chosen, weights = call.hidden_scales, call.chosen, call.weights
        timeout_seconds = call.timeout_seconds
        if timeout_seconds is None:
            timeout_seconds = self._parts.config.default_timeout_seconds
        return ForwardRequest(
            front=self._link.front,
            request=self._link.next_request(),
            layer=call.layer,
            tokens=call.tokens,
            deadline_seconds=time.monotonic() + timeout_seconds,
            shared_experts=call.shared_experts,
            hidden=self._place(call.hidden, body, lease),
            hidden_scales=None if scales is None else self._place(scales, body, lease),
            routing=call.routing,
            chosen=None if chosen is None else self._place(chosen, body, lease),
            weights=None if weights is None else self._place(weights, body, lease),
            output=TensorRef(output.offset, call.output_dtype, columns),
            client=client,
        )

    def _place(self, tensor: WireTensor, body: Extent, lease: Lease) -> TensorRef:
        columns = tensor.shape[1] if len(tensor.shape) > 1 else 1
        if tensor.offset is not None:
            return TensorRef(body.offset + tensor.offset, tensor.dtype, columns)
        data = memoryview(tensor.data).cast("B")
        extent = lease.take(len(data), tensor.name)
        self._link.slab.view(extent.offset, len(data))[:] = data
        return TensorRef(extent.offset, tensor.dtype, columns)

    async def _result(self, request: ForwardRequest, peer: Peer, lease: Lease) -> ForwardResult:
        """Wait for the engine, the deadline or the client's leaving, whichever comes first."""
        lease.handed_over(request.request)
        answer = self._link.forward(request)
        left_seconds = max(0.0, request.deadline_seconds - time.monotonic())
        timer = answer.get_loop().call_later(left_seconds, _give_up, answer, _too_late)
        peer.watch(lambda: _give_up(answer, ClientDisconnected))
        try:
            return await answer
        except BaseException:  # whatever ended the wait
            self._link.cancel(request.request)
            raise
        finally:
            timer.cancel()
            peer.unwatch()


def _give_up(answer: asyncio.Future[ForwardResult], reason: Callable[[], Exception]) -> None:
    if not answer.done():
        answer.set_exception(reason())


def _too_late() -> ForwardError:
    return ForwardError(ErrorCode.DEADLINE_EXCEEDED, "timeout_ms: the deadline passed before the step was done")


def _log(record: RequestRecord) -> None:
    if record.code is ErrorCode.INTERNAL:
        level = logging.ERROR
    else:
        level = logging.WARNING if record.status >= 500 else logging.INFO
    log_request(log, level, record.fields)
