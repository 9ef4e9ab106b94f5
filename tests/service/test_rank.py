"""A rank's step against the specification, and the promise: a token's bits depend on nothing but the token."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

import pytest
import torch

from moe_forward import gates
from moe_forward.checkpoint import LayerWeights
from moe_forward.copy_streams import Copies, Pending
from moe_forward.datagrams import pack, unpack
from moe_forward.exchange.local import LocalExchange
from moe_forward.moves import Mover, TorchMover
from moe_forward.rank import Launched, Rank
from moe_forward.stopwatch import Clock, DeviceStopwatch, Event, Stopwatch
from moe_forward.types import (
    PHASES,
    ActivationScale,
    DType,
    ForwardRequest,
    GateSpec,
    ModelSpec,
    Routing,
    Step,
    StepResult,
)
from w4afp8 import (
    ExpertWeights,
    Quantized,
    SharedExpert,
    portable,
    quantize_fp8_block,
    quantize_int4,
    quantize_tokens,
    reference,
)

from .desk import TORCH
from .desk import Desk as LaidOut
from .make_rank import make_rank, without_bias

T = TypeVar("T")

H, I, E, K = 256, 128, 7, 3  # noqa: E741
LAYER = 3
SPEC = ModelSpec("test", H, I, E, K, I, (LAYER, 5), 128, GateSpec("deepseek_v3", 1, 1, True, 2.5))
LAYER_TOLERANCE = 6e-3
GRANULARITIES: tuple[ActivationScale, ...] = ("token", "token_group")


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_layer(seed: int) -> LayerWeights:
    def matrix(rows: int, columns: int, number: int) -> torch.Tensor:
        return random(rows, columns, seed=seed * 1000 + number).mul(columns**-0.5)

    routed = tuple(
        ExpertWeights(
            quantize_int4(matrix(I, H, 3 * expert)),
            quantize_int4(matrix(I, H, 3 * expert + 1)),
            quantize_int4(matrix(H, I, 3 * expert + 2)),
        )
        for expert in range(E)
    )
    shared = SharedExpert(
        *(quantize_fp8_block(matrix(*shape, 900 + n)) for n, shape in enumerate([(I, H), (I, H), (H, I)]))
    )
    return LayerWeights(routed, shared, random(E, H, seed=seed) / H**0.5, random(E, seed=seed + 1) * 0.1)


LAYERS = {layer: make_layer(layer) for layer in SPEC.layers}


@dataclass
class Sent:
    """A request and the tensors it was made of."""

    request: ForwardRequest
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


class Desk(LaidOut):
    """A slab to lay requests into, and the one rank that holds everything."""

    def send(
        self,
        hidden: torch.Tensor | Quantized,
        dtype: DType = DType.F32,
        routing: Routing = Routing.TOPK,
        shared_experts: bool = True,
        seed: int = 0,
        logits: torch.Tensor | None = None,
        output: DType | None = None,
    ) -> Sent:
        """Lay a request down; TOPK routes at random by `seed`."""
        scales = None
        if isinstance(hidden, Quantized):
            dtype, values = DType.F8_E4M3, hidden.values
            scales = self.put(hidden.scales, DType.F32)
        else:
            values = hidden.to(TORCH[dtype])
        tokens = len(values)
        ids, weights = choose_at_random(tokens, seed)
        chosen, weighted = None, None
        if routing == Routing.TOPK:
            chosen, weighted = self.put(ids, DType.I32 if seed % 2 else DType.I64), self.put(weights, DType.F32)
        elif routing == Routing.LOGITS:
            assert logits is not None
            chosen = self.put(logits, DType.F32)
        if output is None:
            output = DType.BF16 if dtype == DType.F8_E4M3 else dtype
        request = ForwardRequest(
            0,
            seed,
            LAYER,
            tokens,
            1e9,
            shared_experts,
            self.put(values, dtype),
            scales,
            routing,
            chosen,
            weighted,
            self.reserve(tokens, H, output),
        )
        return Sent(request, values, ids, weights)

    def again(self, sent: Sent) -> Sent:
        """The same request with another place for its output."""
        output = self.reserve(sent.request.tokens, H, sent.request.output.dtype)
        return replace(sent, request=sent.request._replace(output=output))

    def output(self, sent: Sent) -> torch.Tensor:
        ref, rows = sent.request.output, sent.request.tokens
        data = self.slab.view(ref.offset, rows * H * ref.dtype.itemsize)
        return torch.frombuffer(bytearray(data), dtype=TORCH[ref.dtype]).view(rows, H)

    def run(
        self, *sent: Sent, granularity: ActivationScale = "token", layer: int = LAYER, pads: bool = False
    ) -> StepResult:
        step = Step(0, 1, layer, tuple(item.request for item in sent))
        return lone_rank(granularity, pads=pads).step(step, {0: self.memory})


def lone_rank(
    granularity: ActivationScale,
    spec: ModelSpec = SPEC,
    pads: bool = False,
    copies: Copies | None = None,
    start_clock: Callable[[int], Clock] = lambda step: Stopwatch(),
) -> Rank:
    layers = without_bias(LAYERS) if spec.gate.kind == "softmax" else LAYERS
    rank = make_rank(0, 1, spec, layers, LocalExchange(E, pads=pads), granularity, copies, start_clock)
    if pads:
        rank.warm_up()
    return rank


def choose_at_random(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, E, generator=generator).topk(K, dim=1).indices
    return ids, torch.rand(tokens, K, generator=generator)


def oracle(sent: Sent, granularity: ActivationScale, shared: bool = True) -> torch.Tensor:
    layer = LAYERS[LAYER]
    return reference.moe_layer(
        sent.hidden,
        sent.ids,
        sent.weights,
        layer.experts,
        layer.shared if shared else None,
        granularity,
        torch.float64,
    )


def error(output: torch.Tensor, expected: torch.Tensor) -> float:
    return float((output.double() - expected).norm() / expected.norm())


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    yield made
    made.slab.close()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32])
def test_the_layer_is_the_specifications(desk: Desk, dtype: DType, granularity: ActivationScale) -> None:
    sent = desk.send(random(9, H, seed=1), dtype, seed=1)
    result = desk.run(sent, granularity=granularity)
    assert error(desk.output(sent), oracle(sent, granularity)) < LAYER_TOLERANCE
    assert (result.step, result.generation, result.rank, result.error) == (0, 1, 0, "")
    assert (result.routed_rows, result.requantized_tokens, result.non_finite) == (9 * K, 0, ())
    assert len(result.phase_seconds) == len(PHASES)
    assert min(result.phase_seconds) > 0, "a phase was not timed"
    assert list(result.expert_rows) == torch.bincount(sent.ids.flatten(), minlength=SPEC.num_experts).tolist()
    assert (result.dispatch_bytes, result.combine_bytes) == (0, 0), "one rank has nobody to send to"


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_fp8_of_our_own_granularity_gives_the_bits_of_the_floats_it_came_from(
    desk: Desk, granularity: ActivationScale
) -> None:
    hidden = random(5, H, seed=2)
    as_float = desk.send(hidden, seed=2, output=DType.BF16)
    as_fp8 = desk.send(quantize_tokens(hidden, granularity)[0], seed=2)
    result = desk.run(as_float, as_fp8, granularity=granularity)
    assert same_bits(desk.output(as_float), desk.output(as_fp8))
    assert result.requantized_tokens == 0


@pytest.mark.parametrize(("granularity", "other"), [GRANULARITIES, GRANULARITIES[::-1]])
def test_fp8_of_the_other_granularity_is_requantized_and_counted(
    desk: Desk, granularity: ActivationScale, other: ActivationScale
) -> None:
    quantized = quantize_tokens(random(5, H, seed=3), other)[0]
    ours = quantize_tokens(random(2, H, seed=4), granularity)[0]
    expanded = (quantized.values.float().view(5, quantized.scales.shape[1], -1) * quantized.scales[..., None]).view(
        5, H
    )
    sent, floats = desk.send(quantized, seed=3), desk.send(expanded, seed=3, output=DType.BF16)
    result = desk.run(desk.send(ours, seed=4), sent, floats, granularity=granularity)
    assert result.requantized_tokens == 5
    assert same_bits(desk.output(sent), desk.output(floats))


@pytest.mark.parametrize("gate", [GateSpec("softmax"), SPEC.gate], ids=lambda gate: gate.kind)
def test_all_ways_of_routing_share_a_step_and_agree(desk: Desk, gate: GateSpec) -> None:
    hidden = random(6, H, seed=5)
    logits = portable.linear(hidden, LAYERS[LAYER].gate_weight)
    ids, weights = gates.choose(gate, K, logits, None if gate.kind == "softmax" else LAYERS[LAYER].gate_bias)
    server = desk.send(hidden, routing=Routing.SERVER, seed=1)
    by_logits = desk.send(hidden, routing=Routing.LOGITS, logits=logits, seed=2)
    by_ids = desk.send(hidden, seed=3)
    assert by_ids.request.chosen is not None
    assert by_ids.request.weights is not None
    by_ids.request = by_ids.request._replace(chosen=desk.put(ids, DType.I32), weights=desk.put(weights, DType.F32))
    other = desk.send(hidden, seed=4)
    step = Step(0, 1, LAYER, tuple(item.request for item in (server, other, by_logits, by_ids)))
    lone_rank("token", replace(SPEC, gate=gate)).step(step, {0: desk.memory})
    assert same_bits(desk.output(server), desk.output(by_logits))
    assert same_bits(desk.output(server), desk.output(by_ids))
    assert not same_bits(desk.output(server), desk.output(other))
    server.ids, server.weights = ids, weights
    assert error(desk.output(server), oracle(server, "token")) < LAYER_TOLERANCE


def test_fp8_tokens_are_routed_by_the_server_by_what_they_stand_for(desk: Desk) -> None:
    quantized = quantize_tokens(random(6, H, seed=6), "token_group")[0]
    expanded = (quantized.values.float().view(6, 2, -1) * quantized.scales[..., None]).view(6, H)
    as_fp8 = desk.send(quantized, routing=Routing.SERVER)
    as_float = desk.send(expanded, routing=Routing.SERVER, output=DType.BF16)
    desk.run(as_fp8, as_float, granularity="token_group")
    assert same_bits(desk.output(as_fp8), desk.output(as_float))


def test_shared_experts_are_added_for_those_who_want_them(desk: Desk) -> None:
    hidden = random(4, H, seed=7)
    wants, refuses, wants_too = (desk.send(hidden, shared_experts=flag, seed=7) for flag in (True, False, True))
    desk.run(wants, refuses, wants_too)
    assert error(desk.output(wants), oracle(wants, "token", shared=True)) < LAYER_TOLERANCE
    assert error(desk.output(refuses), oracle(refuses, "token", shared=False)) < LAYER_TOLERANCE
    assert error(desk.output(refuses), oracle(refuses, "token", shared=True)) > 0.1
    assert same_bits(desk.output(wants), desk.output(wants_too))


def test_a_model_without_shared_experts_adds_none(desk: Desk) -> None:
    sent = desk.send(random(4, H, seed=8), seed=8)
    spec = replace(SPEC, shared_intermediate_size=0)
    lone_rank("token", spec).step(Step(0, 1, LAYER, (sent.request,)), {0: desk.memory})
    assert error(desk.output(sent), oracle(sent, "token", shared=False)) < LAYER_TOLERANCE


def test_each_layer_has_its_own_weights(desk: Desk) -> None:
    first = desk.send(random(3, H, seed=9), seed=9)
    second = desk.again(first)
    desk.run(first)
    desk.run(second, layer=5)
    assert not same_bits(desk.output(first), desk.output(second))


def test_a_zero_token_gives_exactly_zero(desk: Desk) -> None:
    hidden = random(3, H, seed=10)
    hidden[1] = 0
    sent = desk.send(hidden, DType.BF16, seed=10)
    desk.run(sent)
    output = desk.output(sent)
    assert (output[1] == 0).all()
    assert (output[[0, 2]] != 0).any(dim=1).all()


Spoiler = Literal["nan", "inf", "fp8 nan", "scale inf", "logits nan", "server nan"]


def spoiled(desk: Desk, how: Spoiler) -> Sent:
    hidden = random(4, H, seed=20)
    logits = random(4, E, seed=21)
    quantized = quantize_tokens(hidden, "token")[0]
    if how == "fp8 nan":
        quantized.values.view(torch.uint8)[2, 5] = 0x7F
        return desk.send(quantized)
    if how == "scale inf":
        quantized.scales[2, 0] = float("inf")
        return desk.send(quantized)
    if how == "logits nan":
        logits[2, 1] = float("nan")
        return desk.send(hidden, routing=Routing.LOGITS, logits=logits)
    hidden[2, 5] = float("inf") if how == "inf" else float("nan")
    return desk.send(hidden, routing=Routing.SERVER if how == "server nan" else Routing.TOPK)


@pytest.mark.parametrize("how", ["nan", "inf", "fp8 nan", "scale inf", "logits nan", "server nan"])
def test_nan_is_the_error_of_the_request_that_sent_it_and_touches_no_other(desk: Desk, how: Spoiler) -> None:
    others = [
        desk.send(random(3, H, seed=30 + n), seed=n, routing=r) for n, r in enumerate([Routing.TOPK, Routing.SERVER])
    ]
    clean = [desk.again(item) for item in others]
    desk.run(*clean)
    result = desk.run(others[0], spoiled(desk, how), others[1])
    assert result.non_finite == (1,)
    for one, other in zip(clean, others, strict=True):
        assert same_bits(desk.output(one), desk.output(other))


def test_two_spoiled_requests_are_both_named(desk: Desk) -> None:
    fine = desk.send(random(2, H, seed=40))
    assert desk.run(spoiled(desk, "nan"), fine, spoiled(desk, "logits nan")).non_finite == (0, 2)


def traffic(desk: Desk) -> list[Sent]:
    """Requests of all kinds, of uneven sizes."""
    hidden = [random(tokens, H, seed=50 + tokens) for tokens in (1, 5, 2, 7, 3)]
    return [
        desk.send(hidden[0], DType.BF16, seed=1),
        desk.send(hidden[1], DType.F32, Routing.SERVER, seed=2),
        desk.send(quantize_tokens(hidden[2], "token")[0], seed=3, shared_experts=False),
        desk.send(hidden[3], DType.F16, Routing.LOGITS, seed=4, logits=random(7, E, seed=70)),
        desk.send(quantize_tokens(hidden[4], "token_group")[0], routing=Routing.SERVER, seed=5),
    ]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_bits_are_the_same_alone_together_and_in_any_order(desk: Desk, granularity: ActivationScale) -> None:
    alone = traffic(desk)
    for sent in alone:
        desk.run(sent, granularity=granularity)
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [3, 3, 1]):
        together = [desk.again(alone[index]) for index in order]
        desk.run(*together, granularity=granularity)
        for index, sent in zip(order, together, strict=True):
            assert same_bits(desk.output(sent), desk.output(alone[index])), f"request {index} in order {order}"


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_padding_chunks_and_replays_change_no_bits(desk: Desk, granularity: ActivationScale) -> None:
    expected = traffic(desk)
    for sent in expected:
        desk.run(sent, granularity=granularity)
    rank = lone_rank(granularity, pads=True)
    for order in ([0], [1], [3], [4, 0], [0, 1, 2, 3, 4], [2], [0]):  # of 1 to 18 rows; 6 go at once, up to 4 replayed
        sent_again = [desk.again(expected[index]) for index in order]
        result = rank.step(Step(0, 1, LAYER, tuple(item.request for item in sent_again)), {0: desk.memory})
        assert result.routed_rows == K * sum(item.request.tokens for item in sent_again)
        for index, sent in zip(order, sent_again, strict=True):
            assert same_bits(desk.output(sent), desk.output(expected[index])), f"request {index} in order {order}"


@pytest.mark.parametrize("how", ["nan", "inf", "fp8 nan", "scale inf", "logits nan", "server nan"])
def test_nan_stays_alone_in_a_padded_step_and_in_the_next(desk: Desk, how: Spoiler) -> None:
    fine = desk.send(random(3, H, seed=31), routing=Routing.SERVER)
    desk.run(fine)
    rank = lone_rank("token", pads=True)
    for step, with_bad in enumerate((True, False)):
        again = desk.again(fine)
        requests = (again.request, spoiled(desk, how).request) if with_bad else (again.request,)
        result = rank.step(Step(step, 1, LAYER, requests), {0: desk.memory})
        assert result.non_finite == ((1,) if with_bad else ())
        assert same_bits(desk.output(again), desk.output(fine))


def test_layers_take_turns_in_replayed_steps(desk: Desk) -> None:
    sent = [desk.send(random(2, H, seed=61), routing=Routing.SERVER) for _ in range(4)]
    rank = lone_rank("token", pads=True)
    for number, item in enumerate(sent):
        rank.step(Step(number, 1, SPEC.layers[number % 2], (item.request,)), {0: desk.memory})
    assert same_bits(desk.output(sent[0]), desk.output(sent[2]))
    assert same_bits(desk.output(sent[1]), desk.output(sent[3]))
    assert not same_bits(desk.output(sent[0]), desk.output(sent[1]))


class Later:
    """Copies whose outputs leave at the last moment, as a GPU's may: when somebody waits for them."""

    def read(self, work: Callable[[Mover], T]) -> T:
        return work(TorchMover())

    def write(self, work: Callable[[Mover], T]) -> Pending[T]:
        return Leaving(lambda: work(TorchMover()))


class Leaving(Generic[T]):
    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work

    def done(self) -> bool:
        return False

    def result(self) -> T:
        return self._work()


def test_steps_launched_ahead_have_the_bits_of_steps_one_by_one(desk: Desk) -> None:
    expected = traffic(desk)
    for sent in expected:
        desk.run(sent)
    rank = lone_rank("token", pads=True, copies=Later())
    orders = [[0], [1], [3], [4, 0], [0, 1, 2, 3, 4], [2], [0], [1]]
    under_way: deque[tuple[list[int], list[Sent], Launched]] = deque()
    for number, order in enumerate([*orders, None]):
        if order is not None:
            sent_again = [desk.again(expected[index]) for index in order]
            step = Step(number, 1, LAYER, tuple(item.request for item in sent_again))
            under_way.append((order, sent_again, rank.launch(step, {0: desk.memory})))
        if len(under_way) < 2 and order is not None:
            continue
        done, outputs, launched = under_way.popleft()
        assert not launched.done()
        assert not launched.finished
        result = launched.finish()
        assert launched.finished
        assert result.routed_rows == K * sum(item.request.tokens for item in outputs)
        for index, sent in zip(done, outputs, strict=True):
            assert same_bits(desk.output(sent), desk.output(expected[index])), f"request {index} in {done}"


def test_a_spoiled_step_is_found_when_it_is_finished_and_no_other(desk: Desk) -> None:
    rank = lone_rank("token", copies=Later())
    requests = [spoiled(desk, "nan").request, desk.send(random(2, H, seed=40)).request]
    first, second = (rank.launch(Step(n, 1, LAYER, (r,)), {0: desk.memory}) for n, r in enumerate(requests))
    assert (first.finish().non_finite, second.finish().non_finite) == ((0,), ())


def test_while_a_timed_step_is_under_way_the_next_is_not_timed(desk: Desk) -> None:
    """Timed graphs share their events: a second replay would write over the first one's figures."""
    rank = lone_rank("token", copies=Later(), start_clock=lambda step: DeviceStopwatch(lambda phase: (Tick(), Tick())))
    request = desk.send(random(2, H, seed=41)).request
    first, second = (rank.launch(Step(number, 1, LAYER, (request,)), {0: desk.memory}) for number in range(2))
    assert len(first.finish().phase_seconds) == len(PHASES)
    third = rank.launch(Step(2, 1, LAYER, (request,)), {0: desk.memory})
    assert second.finish().phase_seconds == ()
    assert len(third.finish().phase_seconds) == len(PHASES)


class Tick:
    """An event that is no time away from any other."""

    def record(self) -> None:
        pass

    def elapsed_time(self, end_event: Event, /) -> float:
        return 0.0


Job = tuple[int, str, ActivationScale, list[Step]]


def run_group(folder: Path, desk: Desk, jobs: Sequence[Job]) -> list[list[list[StepResult]]]:
    """Run steps on groups (ranks, exchange, granularity, steps) in other processes; returns by job, step and rank."""
    os.set_inheritable(desk.slab.fd, True)
    packed = [(ranks, name, granularity, [pack(step) for step in steps]) for ranks, name, granularity, steps in jobs]
    work = {"slab": (desk.slab.fd, desk.slab.nbytes), "spec": SPEC, "layers": LAYERS, "jobs": packed}
    torch.save(work, folder / "jobs.pt")
    program = Path(__file__).with_name("rank_group.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(
        [sys.executable, str(program), str(folder)],
        check=True,
        timeout=120,
        env=environment,
        pass_fds=[desk.slab.fd],
    )
    loaded = [torch.load(folder / f"rank-{rank}.pt") for rank in range(max(job[0] for job in jobs))]
    results: list[list[list[StepResult]]] = []
    for number, (ranks, _, _, steps) in enumerate(jobs):
        results.append([])
        for index in range(len(steps)):
            words = [unpack(memoryview(loaded[rank][number][index])) for rank in range(ranks)]
            results[-1].append([word for word in words if isinstance(word, StepResult)])
    return results


def steps_of(batches: Sequence[Sequence[Sent]]) -> list[Step]:
    return [Step(n, 1, LAYER, tuple(sent.request for sent in batch)) for n, batch in enumerate(batches)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_bits_are_the_same_alone_and_together_on_ranks_that_pad(desk: Desk, tmp_path: Path, ranks: int) -> None:
    alone = traffic(desk)
    together, turned = ([desk.again(item) for item in alone] for _ in range(2))
    single = desk.again(alone[0])
    batches = [*([item] for item in alone), together, turned[::-1], [single]]
    (results,) = run_group(tmp_path, desk, [(ranks, "nccl", "token", steps_of(batches))])
    for got, wanted in zip([*together, *turned, single], [*alone, *alone, alone[0]], strict=True):
        assert same_bits(desk.output(got), desk.output(wanted))
    assert sum(word.routed_rows for word in results[len(alone)]) == 18 * K
    server = alone[1]
    logits = portable.linear(server.hidden, LAYERS[LAYER].gate_weight)
    server.ids, server.weights = gates.choose(SPEC.gate, K, logits, LAYERS[LAYER].gate_bias)
    for sent in (alone[0], server):
        assert error(desk.output(sent), oracle(sent, "token")) < LAYER_TOLERANCE


def test_bits_are_the_same_on_one_two_and_three_ranks(desk: Desk, tmp_path: Path) -> None:
    alone = {granularity: traffic(desk) for granularity in GRANULARITIES}
    bad = spoiled(desk, "nan")
    tasks: list[tuple[int, ActivationScale, list[list[Sent]]]] = []
    for granularity, sent in alone.items():
        for item in sent:
            desk.run(item, granularity=granularity)
        for ranks in (2, 3):
            together = [desk.again(item) for item in sent]
            single = [desk.again(sent[0])]  # one token: most ranks have no rows
            with_bad = [desk.again(item) for item in (sent[3], bad, sent[1])]
            tasks.append((ranks, granularity, [together, single, with_bad]))
    jobs = [(ranks, "gloo", granularity, steps_of(steps)) for ranks, granularity, steps in tasks]
    results = run_group(tmp_path, desk, jobs)
    for (ranks, granularity, (together, single, with_bad)), words in zip(tasks, results, strict=True):
        where = f"{granularity} on {ranks} ranks"
        expected = alone[granularity]
        for got, wanted in zip([*together, *single], [*expected, expected[0]], strict=True):
            assert same_bits(desk.output(got), desk.output(wanted)), where
        for got, wanted in zip([with_bad[0], with_bad[2]], [expected[3], expected[1]], strict=True):
            assert same_bits(desk.output(got), desk.output(wanted)), where
        assert [word.rank for word in words[0]] == list(range(ranks))
        assert sum(word.routed_rows for word in words[0]) == 18 * K
        assert sum(word.requantized_tokens for word in words[0]) == (3 if granularity == "token" else 2)
        assert sum(word.routed_rows for word in words[1]) == K
        assert {index for word in words[0] for index in word.non_finite} == set()
        assert {index for word in words[2] for index in word.non_finite} == {1}
