"""Rows of any type become tokens with experts; usual steps by a graph, with the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_forward.checkpoint import LayerWeights
from moe_forward.cuda_graphs import Work
from moe_forward.exchange.local import LocalExchange
from moe_forward.experts.reference import ReferenceExperts
from moe_forward.graphed_intake import GraphedIntake
from moe_forward.graphs import GraphedForward
from moe_forward.intake import Intake
from moe_forward.layer_forward import LayerForward, Room, TokenShape
from moe_forward.router import Router
from moe_forward.segments import Segment
from moe_forward.slab_rows import Run
from moe_forward.stopwatch import Stopwatch, Untimed
from moe_forward.types import DType, ForwardRequest, GateSpec, ModelSpec, Routing, TensorRef

H, E, K = 128, 16, 3
LAYERS = (3, 7)
CPU = torch.device("cpu")
SHAPE = TokenShape(H, K, E, 1, False, CPU)
SPEC = ModelSpec("routed", H, 128, E, K, 0, LAYERS, 128, GateSpec("deepseek_v3", 4, 2, True, 2.5))
MAX_TOKENS, MAX_GRAPH_TOKENS = 40, 16


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def intake() -> Intake:
    layers = {
        layer: LayerWeights((), None, drawn(E, H, seed=layer) * H**-0.5, drawn(E, seed=layer + 50) * 0.1)
        for layer in LAYERS
    }
    return Intake(Router(SPEC, layers, CPU), ReferenceExperts({}, "token"), SHAPE)


class Recorder:
    """Captures by running the work, and counts what is replayed."""

    def __init__(self) -> None:
        self.replayed = 0

    def __call__(self, work: Work) -> Work:
        def replay() -> None:
            self.replayed += 1
            work()

        return replay


class Graphed:
    """A graphed intake, warm, and the forward whose room it fills."""

    def __init__(self, intake: Intake) -> None:
        self.recorder = Recorder()
        layer_forward = LayerForward(LocalExchange(E), intake.experts, SHAPE)
        self.forward = GraphedForward(layer_forward, MAX_TOKENS, 0, timed=False, record=self.recorder)
        self.intake = GraphedIntake(intake, self.forward, MAX_GRAPH_TOKENS, LAYERS, self.recorder)
        self.intake.warm_up()


@pytest.fixture
def graphed(intake: Intake) -> Graphed:
    return Graphed(intake)


def run_of(hidden: Tensor, routing: Routing = Routing.SERVER, first: int = 0, chosen: Tensor | None = None) -> Run:
    ref = TensorRef(0, DType.BF16, H)
    tokens = len(hidden)
    request = ForwardRequest(0, 1, 3, tokens, 1.0, True, ref, None, routing, None, None, ref)
    weights = torch.rand(tokens, K) if routing == Routing.TOPK else None
    return Run((Segment(0, request, 0, tokens),), first, hidden, None, chosen, weights)


def parts(room: Room) -> list[Tensor]:
    """What a layer reads of a step's own rows, and what is noted of them."""
    tokens = len(room.notes.non_finite)
    values = room.tokens.values.view(torch.uint8)
    return [values, room.tokens.scales, room.ids[:tokens], room.weights[:tokens], room.notes.non_finite]


def assert_same(left: Room, right: Room) -> None:
    for one, other in zip(parts(left), parts(right), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("tokens", "most"), [(1, 1), (3, 4), (8, 8), (5, 16), (16, 16), (17, 17), (0, 4)])
def test_a_usual_step_is_one_replay_with_the_bits_of_the_plain_intake(
    intake: Intake, graphed: Graphed, tokens: int, most: int
) -> None:
    for turn, layer in enumerate((3, 7, 7, 3)):
        hidden = drawn(tokens, H, seed=turn).bfloat16()
        if turn == 2 and tokens > 1:
            hidden[1, 5] = torch.nan
        runs = [run_of(hidden)] if tokens else []
        expected = Room.new(SHAPE, tokens)
        intake.lay(layer, runs, expected, Untimed())
        room = graphed.forward.room(tokens, most)
        graphed.recorder.replayed = 0
        laid = graphed.intake.lay(layer, runs, room, Untimed())
        assert graphed.recorder.replayed == (1 if tokens and most <= MAX_GRAPH_TOKENS else 0)
        assert laid == (0, None)
        assert_same(room, expected)
        assert bool((room.ids[tokens:] == -1).all()), "padding has no expert, whatever lay there before"
        assert room.notes.non_finite.tolist() == [turn == 2 and row == 1 for row in range(tokens)]


def test_unusual_steps_are_laid_without_a_graph(intake: Intake, graphed: Graphed) -> None:
    hidden = drawn(4, H, seed=9)
    ids = torch.arange(12).view(4, 3)
    one, other = run_of(hidden.bfloat16()), run_of(hidden.half(), first=4)
    for runs in ([run_of(hidden)], [run_of(hidden.bfloat16(), Routing.TOPK, chosen=ids)], [one, other]):
        tokens = sum(run.tokens for run in runs)
        expected, room = Room.new(SHAPE, tokens), graphed.forward.room(tokens, tokens)
        intake.lay(3, runs, expected, Untimed())
        graphed.intake.lay(3, runs, room, Untimed())
        assert_same(room, expected)
    graphed.intake.lay(3, [one], graphed.forward.room(4, 4), Stopwatch())
    assert graphed.recorder.replayed == 0, "a timed step's phases are told apart"


def test_a_step_in_chunks_is_laid_into_its_own_room(intake: Intake, graphed: Graphed) -> None:
    hidden = drawn(8, H, seed=11).bfloat16()
    expected, room = Room.new(SHAPE, 8), graphed.forward.room(8, MAX_TOKENS + 1)
    intake.lay(3, [run_of(hidden)], expected, Untimed())
    graphed.intake.lay(3, [run_of(hidden)], room, Untimed())
    assert_same(room, expected)
    assert graphed.recorder.replayed == 0


def test_where_experts_are_missing_nothing_is_a_graph(intake: Intake) -> None:
    numbers = torch.arange(E + 1)
    numbers[[2, E]] = -1
    graphed = Graphed(Intake(intake.router, intake.experts, SHAPE, numbers))
    room = graphed.forward.room(8, 8)
    hidden = drawn(8, H, seed=12).bfloat16()
    laid = graphed.intake.lay(3, [run_of(hidden)], room, Untimed())
    assert laid.missing_rows is not None
    assert laid.missing_rows.tolist() == (intake.router.by_hidden(3, hidden).ids == 2).sum(1).tolist()
    assert graphed.recorder.replayed == 0
