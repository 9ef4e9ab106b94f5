"""Padding, chunks and replays of a step, on CPU: a graph is work that was run once and is run again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_forward import cuda_graphs
from moe_forward.cuda_graphs import Work
from moe_forward.errors import StartError
from moe_forward.exchange import Dispatched
from moe_forward.experts import PhaseClock
from moe_forward.graphs import GraphedForward
from moe_forward.layer_forward import LayerForward, StepNotes, TokenShape
from moe_forward.stopwatch import DeviceStopwatch, Event, Untimed
from w4afp8 import Quantized

H, K, E = 128, 2, 5
CPU = torch.device("cpu")
LAYERS = (3, 7)
MAX_TOKENS, MAX_GRAPH_TOKENS = 100, 8


class Ring:
    """An exchange and experts of one rank that want one T, and remember what they saw.

    A row is its token's values times its scale times the layer; a shared expert adds 1000.
    """

    name = "ring"
    pads = True
    capturable = True

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.layers: list[int] = []
        self.fails_at = 0

    def dispatch(self, tokens: Quantized, topk_ids: Tensor, topk_weights: Tensor) -> Dispatched:
        count = len(topk_ids)
        if count == self.fails_at:
            raise RuntimeError("out of something")
        self.counts.append(count)
        live = topk_ids >= 0
        assert bool((live.all(1) | ~live.any(1)).all()), "a token has either experts or none"
        offsets = torch.tensor([0, int(live.sum())])
        return Dispatched(tokens, offsets, topk_weights, 1, live[:, 0])

    def combine(self, rows: Tensor, handle: Tensor) -> Tensor:
        return rows.masked_fill(~handle[:, None], 0.0)

    def count_bytes(self, rows: Tensor, handle: Tensor, out: Tensor) -> None:
        out.copy_(torch.tensor([len(handle), 2 * len(handle)]))

    def forward(
        self, layer: int, rows: Quantized, offsets: Tensor, row_weights: Tensor, expected_rows: int, clock: PhaseClock
    ) -> Tensor:
        self.layers.append(layer)
        with clock("gemm1"):
            return rows.values.float() * rows.scales * layer

    def shared(self, layer: int, rows: Quantized) -> Tensor:
        return torch.full(rows.values.shape, 1000.0)

    def quantize(self, x: Tensor, out: tuple[Quantized, Tensor] | None = None) -> tuple[Quantized, Tensor]:
        raise NotImplementedError

    def pad_routes(self, ids: Tensor, weights: Tensor, out_ids: Tensor, out_weights: Tensor) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.counts.append(-1)


class Recorder:
    """Captures by running the work, and counts what is replayed."""

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0

    def __call__(self, work: Work) -> Work:
        work()
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


class Ticking:
    """Events of a clock that counts how often it was looked at."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self, phase: str) -> tuple[Event, Event]:
        return Tick(self), Tick(self)


class Tick:
    def __init__(self, clock: Ticking) -> None:
        self._clock = clock
        self.at = 0.0

    def record(self) -> None:
        self._clock.now += 1.0
        self.at = self._clock.now

    def elapsed_time(self, end_event: Event, /) -> float:
        assert isinstance(end_event, Tick)
        return end_event.at - self.at


@pytest.fixture
def ring() -> Ring:
    return Ring()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def forward(ring: Ring, recorder: Recorder) -> GraphedForward:
    shape = TokenShape(H, K, E, 1, True, CPU)
    made = GraphedForward(
        LayerForward(ring, ring, shape), MAX_TOKENS, MAX_GRAPH_TOKENS, timed=True, record=recorder, pair=Ticking()
    )
    made.warm_up(LAYERS)
    ring.counts.clear()
    recorder.replayed = 0
    return made


def tokens_of(count: int) -> tuple[Quantized, Tensor, Tensor]:
    values = torch.arange(1, H + 1).remainder(7).float().repeat(count, 1).to(torch.float8_e4m3fn)
    scales = torch.arange(1, count + 1).float()[:, None]
    return Quantized(values, scales), torch.arange(K).repeat(count, 1), torch.ones(count, K)


def run(
    forward: GraphedForward,
    layer: int,
    tokens: Quantized,
    ids: Tensor,
    weights: Tensor,
    shared: Tensor | None = None,
    clock: PhaseClock | None = None,
    most_tokens: int | None = None,
) -> tuple[Tensor, StepNotes]:
    """Lay tokens down as a rank does and forward them. Returns: the output, and what was noted."""
    count = len(ids)
    most = count if most_tokens is None else most_tokens
    room = forward.room(count, most)
    assert len(room.notes.non_finite) == count
    room.tokens.values.view(torch.uint8).copy_(tokens.values.view(torch.uint8))
    room.tokens.scales.copy_(tokens.scales)
    room.ids.fill_(-1)[:count] = ids
    room.weights[:count] = weights
    if shared is not None:
        room.shared.copy_(shared)
    return forward.forward(layer, room, shared is not None, clock or Untimed(), most_tokens=most), room.notes


def expected(tokens: Quantized, layer: int) -> Tensor:
    return tokens.values.float() * tokens.scales * layer


@pytest.mark.parametrize(
    ("max_tokens", "sizes"),
    [
        (1, (1,)),
        (6, (1, 2, 4, 6)),
        (64, (1, 2, 4, 8, 16, 32, 64)),
        (100, (1, 2, 4, 8, 16, 32, 64, 96, 100)),
        (128, (1, 2, 4, 8, 16, 32, 64, 96, 128)),
        (1024, (1, 2, 4, 8, 16, 32, 64, 96, 128, 256, 512, 1024)),
        (1025, (1, 2, 4, 8, 16, 32, 64, 96, 128, 256, 512, 1024, 1025)),
    ],
)
def test_buckets_double_and_end_at_the_maximum(max_tokens: int, sizes: tuple[int, ...]) -> None:
    assert cuda_graphs.buckets(max_tokens) == sizes


@pytest.mark.parametrize(("count", "bucket"), [(1, 1), (3, 4), (8, 8), (9, 16), (65, 96), (97, 100), (100, 100)])
def test_a_step_is_padded_to_its_bucket_and_replayed_where_that_is_small(
    forward: GraphedForward, ring: Ring, recorder: Recorder, count: int, bucket: int
) -> None:
    tokens, ids, weights = tokens_of(count)
    output, notes = run(forward, 7, tokens, ids, weights)
    assert torch.equal(output, expected(tokens, 7))
    assert ring.counts == [bucket]
    assert recorder.replayed == (1 if bucket <= MAX_GRAPH_TOKENS else 0)
    assert notes.offsets[:2].tolist() == [0, count * K]
    assert notes.moved_bytes.tolist() == [bucket, 2 * bucket]


@pytest.mark.parametrize("mine", [0, 2, 3])
def test_the_bucket_comes_from_the_fullest_rank_not_from_this_one(
    forward: GraphedForward, ring: Ring, mine: int
) -> None:
    run(forward, 3, *tokens_of(16))  # leaves something in the buffers
    tokens, ids, weights = tokens_of(mine)
    output, notes = run(forward, 3, tokens, ids, weights, most_tokens=9)
    assert output.shape == (mine, H)
    assert torch.equal(output, expected(tokens, 3))
    assert ring.counts == [16, 16]
    assert notes.offsets[:2].tolist() == [0, mine * K]


@pytest.mark.parametrize(
    ("most", "mine", "buckets"),
    [(101, 101, [100, 1]), (101, 100, [100, 1]), (250, 250, [100, 100, 64]), (250, 0, [100, 100, 64])],
)
def test_more_than_the_largest_bucket_goes_in_as_many_chunks_on_every_rank(
    forward: GraphedForward, ring: Ring, most: int, mine: int, buckets: list[int]
) -> None:
    tokens, ids, weights = tokens_of(mine)
    shared = torch.arange(mine) % 2 == 0
    output, notes = run(forward, 7, tokens, ids, weights, shared, most_tokens=most)
    assert torch.equal(output, expected(tokens, 7) + 1000.0 * shared[:, None])
    assert ring.counts == buckets
    assert notes.offsets[:2].tolist() == [0, mine * K]
    assert notes.moved_bytes.tolist() == [sum(buckets), 2 * sum(buckets)], "the chunks' figures add up"


@pytest.mark.parametrize("count", [3, 50])
def test_shared_experts_reach_the_tokens_that_want_them_and_no_later_step(forward: GraphedForward, count: int) -> None:
    tokens, ids, weights = tokens_of(count)
    shared = torch.arange(count) % 3 == 1
    first = run(forward, 3, tokens, ids, weights, shared)[0].clone()
    second, _ = run(forward, 3, tokens, ids, weights)
    assert torch.equal(first, expected(tokens, 3) + 1000.0 * shared[:, None])
    assert torch.equal(second, expected(tokens, 3))


def test_layers_and_sizes_replay_in_any_order(forward: GraphedForward, ring: Ring) -> None:
    for layer, count in [(3, 8), (7, 1), (3, 2), (7, 8), (3, 1), (7, 4), (3, 8)]:
        tokens, ids, weights = tokens_of(count)
        assert torch.equal(run(forward, layer, tokens, ids, weights)[0], expected(tokens, layer))
        assert ring.layers[-1] == layer


def test_a_timed_step_replays_its_own_graph_and_reads_its_events(forward: GraphedForward, recorder: Recorder) -> None:
    for count, replays in ((4, 1), (50, 0)):
        recorder.replayed = 0
        clock = DeviceStopwatch(Ticking())
        run(forward, 3, *tokens_of(count), torch.ones(count, dtype=torch.bool), clock)
        phases = [span.phase for span in clock.spans]
        assert phases == ["dispatch", "gemm1", "combine", "shared_experts"]
        assert sum(clock.phase_seconds) == pytest.approx(4e-3)
        assert recorder.replayed == replays


def test_a_timed_step_of_several_chunks_counts_all_of_them(forward: GraphedForward, recorder: Recorder) -> None:
    clock = DeviceStopwatch(Ticking())
    tokens, ids, weights = tokens_of(201)
    output, _ = run(forward, 3, tokens, ids, weights, clock=clock)
    assert torch.equal(output, expected(tokens, 3))
    assert [span.phase for span in clock.spans] == ["dispatch", "gemm1", "combine"] * 3
    assert recorder.replayed == 0, "graphs share their events, so the second chunk would overwrite the first"


def test_warm_up_runs_every_bucket_and_captures_the_small_ones(ring: Ring, recorder: Recorder) -> None:
    forward = GraphedForward(
        LayerForward(ring, ring, TokenShape(H, K, E, 1, False, CPU)), 16, 4, timed=False, record=recorder
    )
    forward.warm_up(LAYERS)
    assert recorder.captured == 3 * len(LAYERS)
    assert recorder.replayed == recorder.captured, "each graph was tried"
    assert sorted(set(ring.counts)) == [1, 2, 4, 8, 16]
    assert ring.counts[0] == 16, "the largest bucket takes the memory that the others use again"
    forward.close()
    assert ring.counts[-1] == -1


def test_without_graphs_steps_are_still_padded(ring: Ring, recorder: Recorder) -> None:
    forward = GraphedForward(
        LayerForward(ring, ring, TokenShape(H, K, E, 1, False, CPU)), 16, 0, timed=True, record=recorder
    )
    forward.warm_up(LAYERS)
    tokens, ids, weights = tokens_of(5)
    assert torch.equal(run(forward, 3, tokens, ids, weights)[0], expected(tokens, 3))
    assert ring.counts[-1] == 8
    assert recorder.captured == 0


def test_what_fails_while_warming_up_is_named_by_layer_and_bucket(ring: Ring, recorder: Recorder) -> None:
    ring.fails_at = 32
    forward = GraphedForward(
        LayerForward(ring, ring, TokenShape(H, K, E, 1, False, CPU)), 64, 64, timed=False, record=recorder
    )
    with pytest.raises(StartError, match="layer 3 for 32 tokens a rank failed: RuntimeError: out of something"):
        forward.warm_up(LAYERS)
