"""Rows of a step in the slabs: split over ranks, read from any offset, written back where they belong."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from moe_forward.errors import StartError
from moe_forward.slab_rows import Run, attach, convert_runs, detach, read_runs, write_runs
from moe_forward.types import DType, ForwardRequest, Routing, Step, token_range

from .desk import TORCH, Desk

HIDDEN = 128
TOP_K = 2
CPU = torch.device("cpu")


class Cudart:
    """What `attach` and `detach` call of CUDA; it takes memory unless it is told to refuse."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.registered[address] = nbytes
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return self.code

    def cudaGetErrorString(self, code: int) -> str:
        return f"words for {code}"


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    yield made
    made.slab.close()


def request_of(
    desk: Desk, hidden: torch.Tensor, dtype: DType = DType.F32, front: int = 0, number: int = 0
) -> ForwardRequest:
    tokens = len(hidden)
    ref = desk.put(hidden, dtype)
    output = desk.reserve(tokens, HIDDEN, DType.BF16 if dtype == DType.F8_E4M3 else dtype)
    return ForwardRequest(front, number, 3, tokens, 1.0, True, ref, None, Routing.SERVER, None, None, output)


def numbered(first: int, tokens: int) -> torch.Tensor:
    """Rows whose elements all say which row of the step they are; exact in bf16 up to 256."""
    return torch.arange(first, first + tokens).float()[:, None].repeat(1, HIDDEN)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("sizes", [(1,), (5,), (3, 1, 9), (1, 1, 1, 1, 1), (13, 2)])
def test_ranks_read_every_row_once_in_order(desk: Desk, ranks: int, sizes: tuple[int, ...]) -> None:
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    requests = tuple(request_of(desk, numbered(start, size)) for start, size in zip(starts, sizes, strict=True))
    step = Step(0, 1, 3, requests)
    for rank in range(ranks):
        runs = read_runs(step, rank, ranks, {0: desk.memory}, CPU)
        assert len(runs) <= 1, "requests of one form are read as one"
        rows = [int(value) for run in runs for value in run.hidden[:, 0]]
        assert rows == list(token_range(rank, ranks, sum(sizes)))
        for run in runs:
            assert run.first == 0
            assert run.hidden.shape == (run.tokens, HIDDEN)
            row = 0
            for segment in run.segments:
                assert segment.request is requests[segment.position]
                assert segment.tokens > 0
                assert int(run.hidden[row, 0]) == starts[segment.position] + segment.first
                row += segment.tokens
            assert row == run.tokens


def test_requests_of_another_form_begin_another_run(desk: Desk) -> None:
    forms = [DType.F32, DType.F32, DType.BF16, DType.F16, DType.F16, DType.F32]
    requests = tuple(request_of(desk, numbered(2 * index, 2), dtype) for index, dtype in enumerate(forms))
    runs = read_runs(Step(0, 1, 3, requests), 0, 1, {0: desk.memory}, CPU)
    assert [[segment.position for segment in run.segments] for run in runs] == [[0, 1], [2], [3, 4], [5]]
    assert [run.first for run in runs] == [0, 4, 6, 10]
    assert [run.hidden.dtype for run in runs] == [TORCH[forms[index]] for index in (0, 2, 3, 5)]
    assert [int(row) for run in runs for row in run.hidden[:, 0]] == list(range(12))


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32, DType.F8_E4M3])
def test_any_element_type_is_read_exactly_from_an_odd_address(desk: Desk, dtype: DType) -> None:
    hidden = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1)).to(TORCH[dtype])
    request = request_of(desk, hidden, dtype)
    assert request.hidden.offset % 2 == 1
    (run,) = read_runs(Step(0, 1, 3, (request,)), 1, 2, {0: desk.memory}, CPU)
    assert run.hidden.dtype == TORCH[dtype]
    assert [(segment.first, segment.tokens) for segment in run.segments] == [(2, 3)]
    assert torch.equal(run.hidden.view(torch.uint8), hidden[2:].view(torch.uint8))


@pytest.mark.parametrize("ids", [DType.I32, DType.I64])
def test_scales_ids_and_weights_are_cut_to_the_same_rows(desk: Desk, ids: DType) -> None:
    tokens = 7
    chosen = torch.arange(tokens * TOP_K).view(tokens, TOP_K)
    weights = torch.rand(tokens, TOP_K, generator=torch.Generator().manual_seed(2))
    scales = torch.rand(tokens, 1, generator=torch.Generator().manual_seed(3))
    request = ForwardRequest(
        0,
        1,
        3,
        tokens,
        1.0,
        True,
        desk.put(numbered(0, tokens), DType.F8_E4M3),
        desk.put(scales, DType.F32),
        Routing.TOPK,
        desk.put(chosen, ids),
        desk.put(weights, DType.F32),
        desk.reserve(tokens, HIDDEN, DType.BF16),
    )
    (run,) = read_runs(Step(0, 1, 3, (request,)), 1, 3, {0: desk.memory}, CPU)
    mine = token_range(1, 3, tokens)
    rows = slice(mine.start, mine.stop)
    assert run.hidden_scales is not None
    assert run.chosen is not None
    assert run.weights is not None
    assert torch.equal(run.hidden_scales, scales[rows])
    assert run.chosen.dtype == TORCH[ids]
    assert torch.equal(run.chosen.long(), chosen[rows])
    assert torch.equal(run.weights, weights[rows])


def test_what_was_read_no_longer_changes_with_the_slab(desk: Desk) -> None:
    request = request_of(desk, numbered(1, 2))
    (run,) = read_runs(Step(0, 1, 3, (request,)), 0, 1, {0: desk.memory}, CPU)
    desk.memory.zero_()
    assert run.hidden[0, 0] == 1.0


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_outputs_of_all_ranks_lie_where_their_requests_want_them_and_nowhere_else(
    desk: Desk, dtype: DType, ranks: int
) -> None:
    sizes = (3, 1, 5)
    requests = tuple(request_of(desk, numbered(0, size), dtype) for size in sizes)
    step = Step(0, 1, 3, requests)
    output = torch.randn(sum(sizes), HIDDEN, generator=torch.Generator().manual_seed(4))
    expected = desk.memory.clone()
    rows = [output[:3], output[3:4], output[4:]]
    for request, part in zip(requests, rows, strict=True):
        data = part.to(TORCH[dtype]).view(torch.uint8).flatten()
        expected[request.output.offset : request.output.offset + len(data)] = data
    for rank in reversed(range(ranks)):
        mine = token_range(rank, ranks, sum(sizes))
        runs = read_runs(step, rank, ranks, {0: desk.memory}, CPU)
        write_runs(convert_runs(output[mine.start : mine.stop], runs), runs, {0: desk.memory})
    assert torch.equal(desk.memory, expected)
    assert torch.equal(desk.get(requests[2].output, 5), rows[2].to(TORCH[dtype]))


def test_requests_of_several_types_get_their_outputs_in_their_own(desk: Desk) -> None:
    forms = [DType.BF16, DType.F32, DType.F16, DType.F16]
    requests = tuple(request_of(desk, numbered(0, 2), dtype) for dtype in forms)
    runs = read_runs(Step(0, 1, 3, requests), 0, 1, {0: desk.memory}, CPU)
    output = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(5))
    write_runs(convert_runs(output, runs), runs, {0: desk.memory})
    for index, (request, dtype) in enumerate(zip(requests, forms, strict=True)):
        assert torch.equal(desk.get(request.output, 2), output[2 * index : 2 * index + 2].to(TORCH[dtype]))


def test_requests_of_two_front_ends_use_their_own_slabs() -> None:
    desks = Desk(), Desk()
    requests = tuple(request_of(desks[front], numbered(10 * front, 2), front=front) for front in (0, 1))
    slabs = {front: desks[front].memory for front in (0, 1)}
    runs = read_runs(Step(0, 1, 3, requests), 0, 1, slabs, CPU)
    assert [float(row) for run in runs for row in run.hidden[:, 0]] == [0.0, 1.0, 10.0, 11.0]
    write_runs(convert_runs(numbered(100, 4), runs), runs, slabs)
    written = [desks[front].get(requests[front].output, 2)[:, 0].tolist() for front in (0, 1)]
    assert written == [[100.0, 101.0], [102.0, 103.0]]
    for desk in desks:
        desk.slab.close()


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32])
def test_rows_on_their_way_out_are_not_those_the_next_step_writes_over(desk: Desk, dtype: DType) -> None:
    request = request_of(desk, numbered(0, 2), dtype)
    runs = read_runs(Step(0, 1, 3, (request,)), 0, 1, {0: desk.memory}, CPU)
    output = numbered(5, 2)
    rows = convert_runs(output, runs)
    output.zero_()
    write_runs(rows, runs, {0: desk.memory})
    assert desk.get(request.output, 2)[:, 0].tolist() == [5.0, 6.0]


def test_a_rank_without_rows_reads_and_writes_nothing(desk: Desk) -> None:
    step = Step(0, 1, 3, (request_of(desk, numbered(0, 1)),))
    runs: list[Run] = read_runs(step, 0, 3, {0: desk.memory}, CPU)
    assert runs == []
    before = desk.memory.clone()
    write_runs(convert_runs(torch.empty(0, HIDDEN), runs), runs, {0: desk.memory})
    assert torch.equal(desk.memory, before)


def test_an_attached_slab_outlives_its_descriptor(desk: Desk) -> None:
    fd = os.dup(desk.slab.fd)
    memory = attach(fd, desk.slab.nbytes, CPU)
    os.close(fd)
    memory[5] = 77
    assert desk.slab.view(5, 1)[0] == 77


def test_attaching_more_than_there_is_raises(desk: Desk) -> None:
    with pytest.raises(ValueError, match="were announced"):
        attach(desk.slab.fd, desk.slab.nbytes + 1, CPU)


def test_for_a_gpu_a_slab_is_registered_once_and_let_go(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    memory = attach(desk.slab.fd, desk.slab.nbytes, torch.device("cuda:1"))
    assert cudart.registered == {memory.data_ptr(): desk.slab.nbytes}
    detach(memory, torch.device("cuda:1"))
    assert cudart.registered == {}


def test_memory_that_cuda_refuses_is_an_error_with_its_words(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart(code=2))
    with pytest.raises(StartError, match=rf"slab of {desk.slab.nbytes} bytes: words for 2; .* slab_bytes"):
        attach(desk.slab.fd, desk.slab.nbytes, torch.device("cuda"))


def test_on_a_cpu_nothing_is_registered(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "cudart")
    detach(attach(desk.slab.fd, desk.slab.nbytes, CPU), CPU)
