"""A program, one process a rank: put an exchange for GPUs through its cases, and report what each showed.

Arguments: FOLDER EXCHANGE RANK RANKS DEVICE SHAPE, with DEVICE cuda or cpu and SHAPE one of `SHAPES`. Every rank makes
the same tokens of all ranks from the same seed, so it knows what it must receive and what its sums must be.
FOLDER/rank-N.json: list of mappings, one for each case: what was run and what was found, for the tests to judge.
On CPU no graph is captured: "replaying" runs the step again on the changed inputs; and DeepEP is the stand-in of
`fakes`, without the checks of the GPUs.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from device_cases import KINDS, SHAPES, Inputs, Shape, judge_rows, judge_sums, make_inputs
from oracle import contributions, expert_rows, in_rank_order

from moe_forward import exchange
from moe_forward.exchange import deepep, gpu_checks
from moe_forward.exchange.deadline import deadline
from moe_forward.types import expert_range
from w4afp8 import Quantized

START_SECONDS = 240.0


BATCH = 64


class Member:
    """This process's rank. device: where its tensors lie. shape: of the cases."""

    def __init__(self, name: str, rank: int, ranks: int, device: torch.device, shape: Shape, folder: Path) -> None:
        self.name, self.rank, self.ranks, self.device, self.shape = name, rank, ranks, device, shape
        self.dtype = torch.bfloat16
        largest = max(*shape.tokens, BATCH)
        args = (rank, ranks, shape.num_experts, folder / "group", 100.0, device, shape.hidden, shape.top_k, largest)
        with deadline(START_SECONDS, f"rank {rank} joining {name}"):
            self.group = exchange.create(name, exchange.Place(*args, scale_columns=shape.columns[0]))
        self.mine = expert_range(rank, ranks, shape.num_experts)

    def make(self, seed: int, count: int, columns: int, kind: str) -> Inputs:
        return make_inputs(self.shape, self.ranks, self.device, seed, count, columns, kind)

    def part(self, whole: Inputs) -> Inputs:
        count = len(whole.ids) // self.ranks
        return Inputs(*(tensor[self.rank * count :][:count].clone() for tensor in whole))

    def step(self, inputs: Inputs) -> tuple[exchange.Dispatched, torch.Tensor]:
        received = self.group.dispatch(Quantized(inputs.values, inputs.scales), inputs.ids, inputs.weights)
        rows = expert_rows(received, self.mine.start, self.dtype)
        return received, self.group.combine(rows, received.handle)

    def captured(self, inputs: Inputs) -> tuple[Callable[[], None], torch.Tensor]:
        """Return what runs the step again on `inputs` as they are then, and the tensor that gets its result."""
        if self.device.type == "cpu":
            result = self.step(inputs)[1].clone()
            return lambda: result.copy_(self.step(inputs)[1]), result
        self.step(inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = self.step(inputs)[1]
        return graph.replay, result

    def judge(self, whole: Inputs, got: torch.Tensor) -> dict[str, Any]:
        """Compare this rank's sums with those added as `nccl` promises to."""
        part = self.part(whole)
        rows = contributions(Quantized(part.values, part.scales), part.ids, part.weights, self.dtype)
        wanted = in_rank_order(rows, part.ids, self.ranks, self.shape.num_experts)
        return judge_sums(got, wanted, (part.ids < 0).all(1))


def eager_and_replayed(member: Member) -> Iterator[dict[str, Any]]:
    for count, columns in member.shape.sizes():
        static = member.part(member.make(0, count, columns, "uniform"))
        replay, result = member.captured(static)
        for seed, kind in enumerate((*KINDS, *KINDS), start=1):
            what = {"case": "step", "tokens": count, "columns": columns, "kind": kind, "seed": seed}
            whole = member.make(seed, count, columns, kind)
            received, combined = member.step(member.part(whole))
            yield {**what, "graph": False, **judge_rows(whole, member.mine, received), **member.judge(whole, combined)}
            for target, source in zip(static, member.part(whole), strict=True):
                target.copy_(source)
            replay()
            same = bool(torch.equal(result, combined))
            yield {**what, "graph": True, "as_eager": same, **member.judge(whole, result)}
        del replay, result


def no_tokens(member: Member) -> dict[str, Any]:
    whole = member.make(1, 0, member.shape.columns[0], "uniform")
    received, combined = member.step(whole)
    return {"case": "no tokens", "live": int(received.offsets[-1]), "combined": list(combined.shape)}


def same_bits(member: Member) -> Iterator[dict[str, Any]]:
    """A token on every rank alone, then in batches at other places and of other tokens, then over and over."""
    columns = member.shape.columns[0]
    alone = member.part(member.make(77, 1, columns, "uniform"))
    wanted = member.step(alone)[1].clone()
    for count, place in ((8, 7), (BATCH, 0), (BATCH, 41), (max(member.shape.tokens), 3)):
        batch = member.part(member.make(count + place, count, columns, "hot rank"))
        for target, source in zip(batch, alone, strict=True):
            target[place] = source[0]
        got = member.step(batch)[1][place]
        yield {"case": "same bits", "where": f"row {place} of {count}", "same": bool(torch.equal(got, wanted[0]))}
    batch = member.part(member.make(5, BATCH, columns, "uniform"))
    replay, result = member.captured(batch)
    replay()
    first, different = result.clone(), torch.zeros((), dtype=torch.int64, device=member.device)
    for _ in range(member.shape.repeats):
        replay()
        different += (result != first).any()
    yield {"case": "same bits", "where": "repeated", "same": int(different) == 0 and bool(result.any())}
    del replay, result


def payload(member: Member) -> dict[str, Any]:
    """What is really sent for a token: bytes given to collectives, or the tokens that DeepEP counts at a rank."""
    count, columns = 8, member.shape.columns[0]
    whole = member.make(9, count, columns, "uniform")
    sent: dict[str, int] = {}
    inner = {call: getattr(dist, call) for call in ("all_gather_into_tensor", "all_to_all_single")}
    for call, original in inner.items():

        def counted(output: torch.Tensor, given: torch.Tensor, *, name: str = call, original: Any = original) -> Any:
            sent[name] = sent.get(name, 0) + given.numel() * given.element_size()
            return original(output, given)

        setattr(dist, call, counted)
    try:
        received, _ = member.step(member.part(whole))
    finally:
        for call, original in inner.items():
            setattr(dist, call, original)
    found: dict[str, Any] = {"case": "payload", "tokens": count, "columns": columns, "sent_bytes": sent}
    moved = torch.full((2,), -1, device=member.device)
    member.group.count_bytes(
        received.weights.new_empty(0, member.shape.hidden, dtype=member.dtype), received.handle, moved
    )
    found["moved_bytes"] = moved.tolist()
    if member.name == "deepep":
        here = ((whole.ids >= member.mine.start) & (whole.ids < member.mine.stop)).any(1)
        arrived = received.handle.dispatched.psum_num_recv_tokens_per_scaleup_rank[-1]
        own = here[member.rank * count : (member.rank + 1) * count]
        found |= {"arrived": int(arrived), "wanted_here": int(here.sum()), "own": int(own.sum())}
    return found


def use_fake_deepep() -> None:
    sys.path.insert(0, str(Path(__file__).parent / "fakes"))
    for check in ("use_device", "check_peers", "warn_without_nvlink", "check_memory", "check_nccl_version"):
        setattr(gpu_checks, check, lambda *_: "")
    gpu_checks.check_compiler = lambda: None
    deepep.missing_deepep = lambda: ""


def main() -> None:
    folder, name, rank, ranks, kind, shape = Path(sys.argv[1]), *sys.argv[2:7]
    device = torch.device("cpu") if kind == "cpu" else torch.device("cuda", int(rank))
    torch.set_num_threads(1)
    if kind == "cpu":
        use_fake_deepep()
    member = Member(name, int(rank), int(ranks), device, SHAPES[shape], folder)
    cases = itertools.chain(eager_and_replayed(member), [no_tokens(member)], same_bits(member), [payload(member)])
    with deadline(START_SECONDS, f"rank {rank} running its cases"):
        found = list(cases)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    member.group.close()


if __name__ == "__main__":
    main()
