"""Steps of a group that lacks experts: what they would have added is not there, everything else is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from moe_forward.types import DType, Routing, StepResult

from .desk import Desk
from .step_program import run_steps
from .step_traffic import ON_CPU, ON_GPU, Sent, Traffic, make_layers
from .test_rank_gpu import LAYER_TOLERANCE, Done, run_in_processes, setup_of

MISSING = (0, 5, 6, 7, 15)
"""A hole in the middle, the first and the last: 11 of 16 experts are left, which no even number of ranks divides."""


@dataclass
class Ran:
    """What was asked of the group, and what its ranks said: requests by name, and results by step."""

    traffic: Traffic
    device: torch.device
    sent: dict[str, Sent]
    together: list[Sent]
    words: list[list[StepResult]]

    def missing_routes(self, sent: Sent) -> int:
        return int(torch.isin(sent.ids, torch.tensor(MISSING)).sum())


def prepare(traffic: Traffic) -> tuple[dict[str, Sent], list[Sent]]:
    """Each request alone, then all in one step; some tokens have all of their experts, some none."""
    all_missing = torch.tensor([MISSING[:4]] * 3)
    all_there = torch.tensor([[1, 2, 3, 4], [8, 9, 10, 11]])
    sent = {
        "bf16, any experts": traffic.send(9, seed=1),
        "the layer's gate": traffic.send(5, 2, DType.F16, Routing.SERVER),
        "the client's logits": traffic.send(3, 3, DType.F32, Routing.LOGITS),
        "fp8": traffic.send(4, 4, DType.F8_E4M3, shared=False),
        "no expert is there": traffic.send(3, 5, DType.F32, shared=False, ids=all_missing),
        "no expert but the shared one": traffic.send(3, 6, DType.F32, ids=all_missing),
        "all experts are there": traffic.send(2, 7, ids=all_there),
    }
    for item in sent.values():
        traffic.step(item)
    together = [traffic.again(item) for item in sent.values()]
    traffic.step(*together)
    return sent, together


ways = [
    pytest.param(("local", "cpu"), id="one rank"),
    pytest.param(("gloo", "cpu"), id="gloo"),
    pytest.param(("nccl", "cpu"), id="nccl's code on CPU"),
    pytest.param(("local", "cuda"), marks=pytest.mark.gpu, id="one GPU"),
    pytest.param(("nccl", "cuda"), marks=pytest.mark.multigpu, id="nccl on GPUs"),
]


@pytest.fixture(scope="module", params=ways)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    exchange, kind = request.param
    folder = tmp_path_factory.mktemp(exchange)
    shape = ON_GPU if kind == "cuda" else ON_CPU
    device = torch.device("cuda:0" if kind == "cuda" else "cpu")
    ranks = 1 if exchange == "local" else torch.cuda.device_count() if kind == "cuda" else 2
    desk = Desk(8 << 20)
    done = Done(Traffic(shape, ranks, desk), device)
    sent, together = prepare(done.traffic)
    setup = replace(setup_of(shape, ranks, exchange, kind, folder / "group"), missing=MISSING)
    if ranks == 1:
        slab = (desk.slab.fd, desk.slab.nbytes)
        done.words = [[word] for word in run_steps(setup, make_layers(shape), done.traffic.steps, slab)]
    else:
        run_in_processes(done, setup, kind, folder)
    yield Ran(done.traffic, device, sent, together, done.words)
    desk.slab.close()


def test_the_output_is_the_specifications_without_what_the_missing_experts_would_add(ran: Ran) -> None:
    for name, sent in ran.sent.items():
        there = ~torch.isin(sent.ids, torch.tensor(MISSING))
        without = replace(sent, weights=sent.weights * there)
        if name == "no expert is there":
            assert (ran.traffic.output(sent) == 0).all(), name
        else:
            assert ran.traffic.error(without, ran.device) <= LAYER_TOLERANCE, name
        if ran.missing_routes(sent):
            assert ran.traffic.error(sent, ran.device) > 0.1, f"{name}: nothing lacks"


def test_bits_are_the_same_alone_and_together(ran: Ran) -> None:
    for (name, alone), again in zip(ran.sent.items(), ran.together, strict=True):
        assert ran.traffic.same_bits(alone, again), name


def test_every_lost_route_is_counted_for_its_request_by_the_rank_that_read_it(ran: Ran) -> None:
    expected = [ran.missing_routes(sent) for sent in ran.sent.values()]
    assert 0 in expected
    assert sum(count > 0 for count in expected) >= 4
    for words, count in zip(ran.words, expected, strict=False):
        told = [word.missing_routes for word in words if word.missing_routes]
        assert sum(counts[0] for counts in told) == count
        assert all(len(counts) == 1 for counts in told)
    together = [word.missing_routes for word in ran.words[-1] if word.missing_routes]
    assert [sum(counts) for counts in zip(*together, strict=True)] == expected


def test_ranks_share_the_experts_that_are_there_and_compute_what_is_asked_of_them(ran: Ran) -> None:
    shape = ran.traffic.shape
    for step, words in zip(ran.traffic.steps, ran.words, strict=True):
        lost = sum(sum(word.missing_routes) for word in words)
        assert sum(word.routed_rows for word in words) == step.tokens * shape.top_k - lost
        held = [len(word.expert_rows) for word in words]
        assert sum(held) == shape.experts - len(MISSING)
        assert max(held) - min(held) <= 1
