"""Whole steps on GPUs, from the slab and back, against the specification; and the same program tried on CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from moe_forward.datagrams import pack, unpack
from moe_forward.exchange.deepep_package import missing_deepep
from moe_forward.rank import Launched
from moe_forward.rank_setup import RankSetup
from moe_forward.slab_rows import attach, detach
from moe_forward.types import PHASES, DType, ForwardRequest, Routing, Step, StepResult

from .desk import Desk
from .step_program import run_steps, start_rank
from .step_traffic import LAYER, ON_CPU, ON_GPU, Sent, Shape, Traffic, make_layers

PROGRAM = Path(__file__).with_name("step_program.py")
GUARD_SECONDS = 300.0  # against tests that never end, not a measurement
LAYER_TOLERANCE = 6e-3
SAMPLE_STEPS = 3
MAX_TOKENS = {ON_GPU: 2048, ON_CPU: 16}  # more goes in chunks
MAX_GRAPH_TOKENS = {ON_GPU: 512, ON_CPU: 8}


@dataclass
class Done:
    """Steps that were done, what the ranks said of them, and which requests are compared with what."""

    traffic: Traffic
    device: torch.device
    words: list[list[StepResult]] = field(default_factory=list)
    exact: dict[str, Sent] = field(default_factory=dict)
    same: dict[str, list[Sent]] = field(default_factory=dict)
    spoiled: int = -1
    requantized: int = -1
    one_by_one: int = 0


def prepare(shape: Shape, ranks: int, device: torch.device, desk: Desk) -> Done:
    """Lay down everything that is asked of a rank."""
    traffic = Traffic(shape, ranks, desk)
    done = Done(traffic, device)

    def exact(name: str, sent: Sent) -> Sent:
        done.exact[name] = sent
        return sent

    for size in shape.sizes:
        tokens = size * ranks - (ranks > 1 and size > 1)  # ranks get uneven parts
        traffic.step(exact(f"{size} tokens a rank", traffic.send(tokens, seed=size)))
    traffic.step(exact("fewer tokens than ranks", traffic.send(1, seed=901)))
    tokens, top_k, experts = 40 * ranks, shape.top_k, shape.experts
    drawn = torch.Generator().manual_seed(902)
    others = torch.stack([torch.randperm(experts - 1, generator=drawn)[: top_k - 1] for _ in range(tokens)])
    hot = torch.cat([torch.full((tokens, 1), experts - 1), others], dim=1)
    traffic.step(exact("one hot expert", traffic.send(tokens, seed=902, ids=hot)))
    few = max(top_k, experts // ranks)
    hot = torch.stack([torch.randperm(few, generator=drawn)[:top_k] for _ in range(tokens)])
    traffic.step(exact("one hot rank", traffic.send(tokens, seed=903, ids=hot)))

    kinds = {
        "bf16": traffic.send(7, seed=1),
        "f16, the layer's gate": traffic.send(5, 2, DType.F16, Routing.SERVER),
        "f32, the client's logits": traffic.send(3, 3, DType.F32, Routing.LOGITS),
        "fp8, one scale a token": traffic.send(4, 4, DType.F8_E4M3, shared=False),
        "fp8, scales for groups, the layer's gate": traffic.send(6, 5, DType.F8_E4M3, Routing.SERVER, scales="group"),
    }
    for name, sent in kinds.items():
        done.same[name] = [exact(name, sent)]
        traffic.step(sent)
    large = max(shape.sizes[-2], MAX_GRAPH_TOKENS[shape] + 1) * ranks
    for company in (0, 9, 100, large):  # in graphs of other sizes, and beyond them; first, in the middle, last
        again = {name: traffic.again(sent) for name, sent in kinds.items()}
        for name, sent in again.items():
            done.same[name].append(sent)
        batch = list(again.values())[:: -1 if company == 9 else 1]
        others_sent = [traffic.send(company, seed=1000 + company)] if company else []
        number = traffic.step(*batch[:2], *others_sent, *batch[2:])
        if company == 100:
            done.requantized = number
    done.same["repeated"] = [kinds["bf16"]]
    for _ in range(shape.repetitions):
        done.same["repeated"].append(traffic.again(kinds["bf16"]))
        traffic.step(done.same["repeated"][-1], kinds["f32, the client's logits"])
    bad = traffic.send(3, seed=905, routing=Routing.SERVER, spoil=True)
    for name in ("bf16", "f16, the layer's gate"):
        done.same[name].append(traffic.again(kinds[name]))
    done.spoiled = traffic.step(done.same["bf16"][-1], bad, done.same["f16, the layer's gate"][-1])
    add_steps_ahead(done)
    return done


def add_steps_ahead(done: Done) -> None:
    """Ask again for what was done one by one, so that ranks launch each step before the one before it is finished.

    Sizes change from step to step: a rank with no row, one row, the edges of a bucket, more than a bucket or a chunk.
    """
    traffic, shape = done.traffic, done.traffic.shape
    done.one_by_one = len(traffic.steps)
    small = [name for name, sent in done.exact.items() if sent.request.tokens <= 128 * traffic.ranks]
    large = [name for name in done.exact if name not in small]
    for number in range(max(shape.repetitions, len(done.exact))):
        names = [small[number % len(small)]]
        if number % 11 == 5:
            names.append(small[(number + 3) % len(small)])
        if number % 40 == 7:
            names = [large[number // 40 % len(large)]] if large else names
        again = [traffic.again(done.exact[name]) for name in names]
        traffic.step(*again)
        for name, sent in zip(names, again, strict=True):
            done.same.setdefault(f"launched ahead: {name}", [done.exact[name]]).append(sent)


def setup_of(shape: Shape, ranks: int, exchange: str, kind: str, rendezvous: Path, graphs: bool = True) -> RankSetup:
    on_gpu = kind == "cuda"
    return RankSetup(
        rank=0,
        ranks=ranks,
        generation=1,
        device="cuda:0" if on_gpu else "cpu",
        folder=rendezvous,
        spec=shape.spec,
        socket_path=rendezvous,
        rendezvous=rendezvous,
        exchange=exchange,
        experts="cutlass" if on_gpu else "reference",
        activation_scale="token",
        threads=1,
        max_tokens=MAX_TOKENS[shape],
        max_graph_tokens=MAX_GRAPH_TOKENS[shape] if graphs else 0,
        phase_sample_steps=SAMPLE_STEPS,
        step_timeout_seconds=120.0,
        start_timeout_seconds=GUARD_SECONDS,
        expert_metrics=True,
    )


def run_in_processes(done: Done, setup: RankSetup, kind: str, folder: Path) -> None:
    """Run the traffic's steps on one process a rank."""
    slab = done.traffic.desk.slab
    os.set_inheritable(slab.fd, True)
    work = {
        "slab": (slab.fd, slab.nbytes),
        "setup": setup,
        "kind": kind,
        "layers": make_layers(done.traffic.shape),
        "steps": [pack(step) for step in done.traffic.steps],
        "one_by_one": done.one_by_one,
    }
    torch.save(work, folder / "work.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    logs = [folder / f"rank-{rank}.log" for rank in range(setup.ranks)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, str(PROGRAM), str(folder), str(rank)]
            with log.open("wb") as out:
                processes.append(
                    subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT, pass_fds=[slab.fd])
                )
        end = time.monotonic() + GUARD_SECONDS
        while time.monotonic() < end and any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes):
                end = min(end, time.monotonic() + 5.0)  # the others wait in a collective: what have they to say?
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = "\n".join(f"rank {rank}: {log.read_text()[-3000:]}" for rank, log in enumerate(logs))
    assert [process.returncode for process in processes] == [0] * setup.ranks, said
    loaded = [torch.load(folder / f"rank-{rank}.pt") for rank in range(setup.ranks)]
    for datagrams in zip(*loaded, strict=True):
        words = [unpack(memoryview(datagram)) for datagram in datagrams]
        done.words.append([word for word in words if isinstance(word, StepResult)])


ways = [
    pytest.param(("local", "cuda"), marks=pytest.mark.gpu, id="local on a GPU"),
    pytest.param(("nccl", "cuda"), marks=pytest.mark.multigpu, id="nccl on GPUs"),
    pytest.param(("deepep", "cuda"), marks=pytest.mark.multigpu, id="deepep on GPUs"),
    pytest.param(("gloo", "cpu"), id="gloo on CPU"),
    pytest.param(("nccl", "cpu"), id="nccl's code on CPU"),
]


@pytest.fixture(scope="module", params=ways)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """All steps of one exchange, done once."""
    exchange, kind = request.param
    if exchange == "deepep" and (missing := missing_deepep()):
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp(exchange)
    on_gpu = kind == "cuda"
    shape = ON_GPU if on_gpu else ON_CPU
    ranks = 1 if exchange == "local" else torch.cuda.device_count() if on_gpu else 2
    desk = Desk((96 << 20) * ranks if on_gpu else 16 << 20)
    made = prepare(shape, ranks, torch.device("cuda:0" if on_gpu else "cpu"), desk)
    setup = setup_of(shape, ranks, exchange, kind, folder / "group")
    if exchange == "local":
        slab = (desk.slab.fd, desk.slab.nbytes)
        words = run_steps(setup, make_layers(shape), made.traffic.steps, slab, made.one_by_one)
        made.words = [[word] for word in words]
    else:
        run_in_processes(made, setup, kind, folder)
    yield made
    desk.slab.close()


def test_outputs_are_the_specifications_at_every_size_skew_and_input_type(done: Done) -> None:
    errors = {name: done.traffic.error(sent, done.device) for name, sent in done.exact.items()}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert {name: error for name, error in errors.items() if not error <= LAYER_TOLERANCE} == {}


def test_a_token_has_the_same_bits_alone_in_any_company_at_any_size_and_every_time(done: Done) -> None:
    for name, sent in done.same.items():
        different = [index for index, other in enumerate(sent) if not done.traffic.same_bits(sent[0], other)]
        assert different == [], f"{name}: {len(different)} of {len(sent)}"


def test_ranks_report_the_rows_they_computed(done: Done) -> None:
    for step, words in zip(done.traffic.steps, done.words, strict=True):
        assert [word.rank for word in words] == list(range(done.traffic.ranks))
        assert {word.step for word in words} == {step.step}
        assert {word.error for word in words} == {""}
        assert sum(word.routed_rows for word in words) == step.tokens * done.traffic.shape.top_k
        assert all(sum(word.expert_rows) == word.routed_rows for word in words)
        moved = [word.dispatch_bytes + word.combine_bytes for word in words]
        assert max(moved) == 0 if done.traffic.ranks == 1 else step.tokens < 64 or max(moved) > 0
    assert sum(word.requantized_tokens for word in done.words[done.requantized]) == 6


def test_nan_is_found_in_its_request_alone(done: Done) -> None:
    for number, words in enumerate(done.words):
        found = {index for word in words for index in word.non_finite}
        assert found == ({1} if number == done.spoiled else set())


def test_phases_are_timed_in_sampled_steps_only(done: Done) -> None:
    for number, words in enumerate(done.words):
        for word in words:
            if done.device.type == "cuda" and number % SAMPLE_STEPS:
                assert word.phase_seconds == ()
            else:
                seconds = dict(zip(PHASES, word.phase_seconds, strict=True))
                assert min(seconds[phase] for phase in ("dispatch", "combine", "host_copy")) > 0
                assert max(seconds.values()) < 10


@pytest.mark.gpu
def test_graphs_change_no_bits(tmp_path: Path) -> None:
    outputs = []
    for graphs in (True, False):
        desk = Desk(64 << 20)
        traffic = Traffic(ON_GPU, 1, desk)
        sent = [
            traffic.send(tokens, seed=tokens, routing=routing)
            for tokens in (1, 2, 7, 64, 100, 200)
            for routing in (Routing.SERVER, Routing.TOPK)
        ]
        for item in sent:
            traffic.step(item)
        setup = setup_of(ON_GPU, 1, "local", "cuda", tmp_path / f"group-{graphs}", graphs)
        run_steps(setup, make_layers(ON_GPU), traffic.steps, (desk.slab.fd, desk.slab.nbytes))
        outputs.append([traffic.output(item) for item in sent])
        desk.slab.close()
    for graphed, eager in zip(*outputs, strict=True):
        assert torch.equal(graphed, eager)


@pytest.mark.parametrize(
    ("shape", "kind"), [pytest.param(ON_GPU, "cuda", marks=pytest.mark.gpu), pytest.param(ON_CPU, "cpu")]
)
def test_memory_of_a_finished_step_is_used_again_while_the_next_one_runs(
    shape: Shape, kind: str, tmp_path: Path
) -> None:
    """As the service does: two requests' memory in turn, and whatever happens to it once its step is finished."""
    desk = Desk(128 << 20)
    traffic = Traffic(shape, 1, desk)
    types = (DType.BF16, DType.F32)
    sent = [traffic.send(size, size, types[size % 2], Routing.SERVER) for size in shape.sizes]
    rank = start_rank(setup_of(shape, 1, "local", kind, tmp_path / "group"), make_layers(shape))
    device = torch.device("cuda:0" if kind == "cuda" else "cpu")
    slabs = {0: attach(desk.slab.fd, desk.slab.nbytes, device)}
    for number, item in enumerate(sent):
        rank.step(Step(number, 1, LAYER, (item.request,)), slabs)
    expected = [desk.bytes(item.request.output, item.request.tokens).clone() for item in sent]
    most = max(shape.sizes)
    places = [[desk.reserve(most, shape.hidden, DType.F32) for _ in ("input", "output")] for _ in range(2)]
    under_way: deque[tuple[int, ForwardRequest, Launched]] = deque()
    for number in range(2 * shape.repetitions):
        index = number * 5 % len(sent)
        request = sent[index].request
        hidden, output = places[number % 2]
        here = request._replace(
            hidden=request.hidden._replace(offset=hidden.offset),
            output=request.output._replace(offset=output.offset),
        )
        desk.bytes(here.hidden, here.tokens).copy_(desk.bytes(request.hidden, here.tokens))
        under_way.append((index, here, rank.launch(Step(100 + number, 1, LAYER, (here,)), slabs)))
        if len(under_way) == 2:
            index, done, launched = under_way.popleft()
            launched.finish()
            assert torch.equal(desk.bytes(done.output, done.tokens), expected[index]), f"step {number - 1}"
            for ref in (done.hidden, done.output):
                desk.bytes(ref, done.tokens).fill_(0x7F)
    under_way.popleft()[2].finish()
    detach(slabs[0], device)
    rank.close()
    desk.slab.close()
