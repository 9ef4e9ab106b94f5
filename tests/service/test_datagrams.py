"""Messages: every kind comes out of its datagram as it went in, and the largest still fit."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_forward.channel import MAX_MESSAGE_BYTES
from moe_forward.datagrams import ENGINE_DECODERS, pack, pack_together, unpack
from moe_forward.errors import ErrorCode
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
    RankWord,
    Released,
    Several,
    StepAnswers,
    StepOrder,
    StepSummary,
    Stop,
    TakeConnection,
    Ticket,
)
from moe_forward.packed_messages import of_front
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

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
I32 = st.integers(0, 2**31 - 1)
SECONDS = st.floats(0, 1e12, allow_nan=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)

REFS = st.builds(TensorRef, offset=U64, dtype=st.sampled_from(DType), columns=U32)
REQUESTS = st.builds(
    ForwardRequest,
    front=U32,
    request=U64,
    layer=I32,
    tokens=U32,
    deadline_seconds=SECONDS,
    shared_experts=st.booleans(),
    hidden=REFS,
    hidden_scales=st.none() | REFS,
    routing=st.sampled_from(Routing),
    chosen=st.none() | REFS,
    weights=st.none() | REFS,
    output=REFS,
    client=U64,
)
RESULTS = st.builds(
    ForwardResult,
    front=U32,
    request=U64,
    code=st.none() | st.sampled_from(ErrorCode),
    message=TEXT,
    retry_after_seconds=st.none() | SECONDS,
    queue_seconds=SECONDS,
    step_seconds=SECONDS,
    batch_tokens=U32,
    batch_requests=U32,
    held=st.booleans(),
    step=st.none() | st.integers(0, 2**63 - 1),
    generation=U32,
    missing_routes=U32,
    missing_experts=U32,
)
COUNT = st.integers(0, 5)
ANSWERS = COUNT.flatmap(
    lambda count: st.builds(
        StepAnswers,
        step=U64,
        generation=U32,
        batch_tokens=U32,
        batch_requests=U32,
        missing_experts=U32,
        step_seconds=SECONDS,
        requests=st.tuples(*[U64] * count),
        queue_seconds=st.tuples(*[SECONDS] * count),
        non_finite=st.lists(U32, max_size=count).map(tuple),
        missing_routes=st.just(()) | st.tuples(*[U32] * count),
    )
)
STEPS = st.builds(Step, step=U64, generation=U32, layer=I32, requests=st.lists(REQUESTS, max_size=5).map(tuple))
STEP_RESULTS = st.builds(
    StepResult,
    step=U64,
    generation=U32,
    rank=U32,
    phase_seconds=st.just(()) | st.tuples(*[SECONDS] * len(PHASES)),
    routed_rows=U64,
    requantized_tokens=U64,
    non_finite=st.lists(U32, max_size=5).map(tuple),
    error=TEXT,
    dispatch_bytes=U64,
    combine_bytes=U64,
    expert_rows=st.lists(U32, max_size=5).map(tuple),
    missing_routes=st.lists(U32, max_size=5).map(tuple),
)
REPORTS = st.builds(
    StepReport,
    layer=I32,
    tokens=U32,
    requests=U32,
    queue_requests=U32,
    queue_tokens=U32,
    results=st.lists(STEP_RESULTS, max_size=4).map(tuple),
)
INFOS = st.builds(
    RankInfo,
    rank=U32,
    state=st.sampled_from(["starting", "ready", "lost"]),
    since=SECONDS,
    pid=U32,
    node=TEXT,
    device=TEXT,
    experts=st.tuples(U32, U32),
    memory_bytes=U64,
    buffer_bytes=U64,
    free_bytes=U64,
    load_seconds=SECONDS,
    capacity_bytes=U64,
)
STATUSES = st.builds(
    EngineStatus,
    ready=st.booleans(),
    lost=st.booleans(),
    generation=U32,
    reason=TEXT,
    ranks=st.lists(INFOS, max_size=4).map(tuple),
    restarts=U32,
    backend=TEXT,
    kernel=TEXT,
    lacking_ranks=U32,
    missing=st.lists(U32, max_size=5).map(tuple),
)
LABELS = st.lists(st.tuples(TEXT, TEXT), max_size=3).map(tuple)
SAMPLES = st.tuples(TEXT, TEXT, LABELS, SECONDS, st.none() | st.tuples(LABELS, SECONDS, SECONDS))
MESSAGES = st.one_of(
    RESULTS,
    ANSWERS,
    STEPS,
    STEP_RESULTS,
    REPORTS,
    STATUSES,
    st.builds(QueueReport, requests=U32, tokens=U32),
    st.builds(FrontHello, slab_bytes=U64, wants_reports=st.booleans()),
    st.builds(FrontWelcome, front=U32),
    st.builds(Cancel, request=U64),
    st.builds(Released, requests=st.lists(U64, max_size=5).map(tuple)),
    st.builds(
        Announce,
        generation=U32,
        ranks=U32,
        restarts=U32,
        failed=TEXT,
        lacking_ranks=U32,
        missing=st.lists(U32, max_size=5).map(tuple),
        after_steps=st.booleans(),
    ),
    st.builds(RankHello, generation=U32, info=INFOS, backend=TEXT, kernel=TEXT),
    st.builds(Heartbeat, generation=U32, rank=U32),
    st.builds(AttachSlab, front=U32, slab_bytes=U64),
    st.builds(DetachSlab, front=U32),
    st.sampled_from([FrontUp(), TakeConnection(), ConnectionGone(), Drain(), Stop()]),
    st.builds(FrontFailed, reason=TEXT),
    st.builds(InFlight, requests=U64),
    st.builds(RankTokens, tokens=st.lists(st.tuples(U32, U64), max_size=4).map(tuple)),
    st.builds(FrontSamples, samples=st.lists(SAMPLES, max_size=4).map(tuple)),
)


def again(message: Message) -> Message:
    return unpack(memoryview(pack(message)))


@settings(max_examples=500, deadline=None)
@given(MESSAGES)
def test_every_message_comes_back_as_it_went(message: Message) -> None:
    back = again(message)
    assert type(back) is type(message)
    assert back == message


def full_request(number: int) -> ForwardRequest:
    ref = TensorRef(2**64 - 1, DType.F8_E4M3, 2**32 - 1)
    return ForwardRequest(2**32 - 1, number, 2**31 - 1, 2**32 - 1, 1e9, True, ref, ref, Routing.LOGITS, ref, ref, ref)


@settings(max_examples=200, deadline=None)
@given(STEPS, U32)
def test_requests_come_to_the_engine_as_tickets_and_whole_to_the_ranks(step: Step, front: int) -> None:
    tickets = []
    for request in step.requests:
        ticket = again(request)
        assert isinstance(ticket, Ticket)
        for name in ("front", "request", "layer", "tokens", "deadline_seconds", "client"):
            assert getattr(ticket, name) == getattr(request, name)
        assert of_front(ticket, request.front) == ticket
        tickets.append(of_front(ticket, front))
        assert tickets[-1].front == front
    order = StepOrder(step.step, step.generation, step.layer, tuple(tickets))
    assert again(order) == step._replace(requests=tuple(item._replace(front=front) for item in step.requests))


@settings(max_examples=200, deadline=None)
@given(REPORTS)
def test_results_come_to_the_engine_as_words_and_whole_to_the_front_ends(report: StepReport) -> None:
    words = []
    for result in report.results:
        word = unpack(memoryview(pack(result)), ENGINE_DECODERS)
        assert isinstance(word, RankWord)
        for name in ("step", "generation", "rank", "non_finite", "missing_routes", "error"):
            assert getattr(word, name) == getattr(result, name)
        words.append(word)
    assert again(StepSummary(*report[:5], tuple(words))) == report


@pytest.mark.parametrize(
    "result",
    [StepResult(1, 2, 3, (), 4), StepResult(1, 2, 3, (), 4, non_finite=(5,), expert_rows=(6, 7), error="größer")],
)
def test_a_result_that_front_ends_could_not_read_does_not_pass_the_engine(result: StepResult) -> None:
    data = pack(result)
    counts_at = len(pack(StepResult(1, 2, 3, (), 4))) - 12
    cut = data[:-3]  # in the middle of a number, or of a letter
    counts_lie = data[:counts_at] + b"\xff" + data[counts_at + 1 :]
    for damaged in (cut, counts_lie, data[:20], data + b"\xff"):
        with pytest.raises((ValueError, struct.error)):
            unpack(memoryview(damaged), ENGINE_DECODERS)


def test_enums_come_back_as_enums() -> None:
    step = again(Step(1, 1, 1, (full_request(1),)))
    assert isinstance(step, Step)
    (back,) = step.requests
    assert isinstance(back.hidden.dtype, DType)
    assert isinstance(back.routing, Routing)
    assert back.shared_experts is True


def test_step_of_256_requests_fits_a_datagram() -> None:
    step = Step(2**64 - 1, 2**32 - 1, 2**31 - 1, tuple(full_request(2**64 - 1 - i) for i in range(256)))
    assert len(pack(step)) < MAX_MESSAGE_BYTES
    assert again(step) == step


def test_report_of_64_ranks_with_every_request_flagged_and_short_of_routes_fits_a_datagram() -> None:
    flags = tuple(range(256))
    results = tuple(
        StepResult(2**64 - 1, 1, rank, (math.pi,) * len(PHASES), 2**64 - 1, 2**64 - 1, flags, missing_routes=flags)
        for rank in range(64)
    )
    report = StepReport(60, 8192, 256, 1024, 65536, results)
    assert len(pack(report)) < MAX_MESSAGE_BYTES
    assert again(report) == report


def test_report_with_the_rows_of_512_experts_fits_a_datagram_beside_every_flag() -> None:
    most = 2**32 - 1
    results = tuple(
        StepResult(2**63, 1, rank, (math.pi,) * len(PHASES), most, most, tuple(range(256)), "", most, most, (most,) * 8)
        for rank in range(64)
    )
    report = StepReport(60, 8192, 256, 1024, 65536, results)
    assert len(pack(report)) < MAX_MESSAGE_BYTES
    assert again(report) == report
    alone = StepResult(2**63, 1, 0, (), most, expert_rows=(most,) * 512)
    assert again(alone) == alone


def test_status_of_64_ranks_fits_a_datagram() -> None:
    info = RankInfo(63, "starting", 1.8e9, 2**22, "n" * 253, "d" * 64, (0, 256), 2**40, 123.456789)
    status = EngineStatus(False, True, 3, "r" * 2100, (info,) * 64, 3, "gloo", "reference")
    assert len(pack(status)) < MAX_MESSAGE_BYTES
    assert again(status) == status


def test_step_without_requests_and_result_without_text_come_back() -> None:
    assert again(Step(0, 0, 0, ())) == Step(0, 0, 0, ())
    assert again(ForwardResult(0, 0)) == ForwardResult(0, 0)


def test_refusal_keeps_code_text_and_retry() -> None:
    result = ForwardResult(1, 2, ErrorCode.QUEUE_FULL, "voll: größer als 7 ✗", 0.0, held=True)
    back = again(result)
    assert back == result
    assert isinstance(back, ForwardResult)
    assert back.retry_after_seconds == 0.0


@settings(max_examples=100, deadline=None)
@given(st.lists(MESSAGES, max_size=6))
def test_messages_that_travel_together_come_back_in_order(messages: list[Message]) -> None:
    several = Several(tuple(messages))
    assert again(several) == several
    for most_bytes in (1, 300, MAX_MESSAGE_BYTES):
        back: list[Message] = []
        for data in pack_together(messages, most_bytes):
            message = unpack(memoryview(data))
            assert len(data) <= most_bytes or not isinstance(message, Several)
            back += message.messages if isinstance(message, Several) else [message]
        assert back == messages


def test_several_messages_that_are_cut_off_or_nested_raise() -> None:
    packed = pack(Several((Cancel(1), Cancel(2))))
    for damaged in (packed[:-1], packed[:3], pack(Several((Several(()),)))):
        with pytest.raises((ValueError, struct.error)):
            unpack(memoryview(damaged))


@pytest.mark.parametrize("kind", [0, 200, 255])
def test_unknown_kind_raises(kind: int) -> None:
    with pytest.raises(ValueError, match=f"unknown message kind {kind}"):
        unpack(memoryview(bytes((kind, 1, 2, 3))))


def test_truncated_packed_message_raises() -> None:
    data = pack(Step(1, 1, 1, (full_request(1),)))
    with pytest.raises(struct.error):
        unpack(memoryview(data)[:-1])


OUTPUT_DTYPE = -5  # where the last tensor's type lies
WEIGHTS_DTYPE = OUTPUT_DTYPE - 13
ROUTING = 30


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (OUTPUT_DTYPE, 255, "neither its input nor its output"),
        (OUTPUT_DTYPE, len(DType), "does not exist"),
        (WEIGHTS_DTYPE, 254, "does not exist"),
        (ROUTING, len(Routing), "does not exist"),
    ],
)
def test_a_request_that_ranks_could_not_read_does_not_pass_the_engine(place: int, value: int, reason: str) -> None:
    data = bytearray(pack(full_request(1)))
    data[place] = value
    with pytest.raises(ValueError, match=reason):
        unpack(memoryview(data))
    step = pack(Step(1, 1, 1, ())) + data[1:]
    with pytest.raises((ValueError, IndexError)):
        unpack(memoryview(step))


@pytest.mark.parametrize("damaged", [pack(full_request(1))[:-1], pack(full_request(1)) + b"x"], ids=["cut", "longer"])
def test_a_request_of_another_length_raises(damaged: bytes) -> None:
    with pytest.raises(ValueError, match=f"a request has {len(damaged) - 1} bytes, expected"):
        unpack(memoryview(damaged))


def test_integers_that_do_not_fit_raise_instead_of_wrapping() -> None:
    with pytest.raises(struct.error):
        pack(StepReport(0, 2**32, 0, 0, 0))
