"""A rank's loop with a test in the engine's place: hello, steps, a broken step, and the end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_forward.channel import BlockingChannel, listen
from moe_forward.checkpoint import make_model, read_spec
from moe_forward.datagrams import pack
from moe_forward.errors import StartError
from moe_forward.messages import AttachSlab, Cancel, DetachSlab, Heartbeat, RankHello
from moe_forward.rank_process import check_folder, check_memory, run_rank
from moe_forward.rank_setup import RankSetup
from moe_forward.slab import Slab
from moe_forward.types import DType, ForwardRequest, Routing, Step, StepResult, TensorRef

HANG_SECONDS = 60.0


class EngineSide:
    """`run_rank` in a thread, and the engine's end of its channel."""

    def __init__(self, setup: RankSetup) -> None:
        self.error: Exception | None = None
        self._listener = listen(setup.socket_path)
        self._listener.settimeout(HANG_SECONDS)
        self._thread = threading.Thread(target=self._run, args=(setup,))
        self._thread.start()
        self.sock, _ = self._listener.accept()
        self.channel = BlockingChannel(self.sock)

    def _run(self, setup: RankSetup) -> None:
        try:
            run_rank(setup)
        except Exception as error:
            self.error = error

    def step(self, step: Step) -> StepResult:
        self.channel.send(step)
        while True:
            result, _ = self.channel.receive()
            if not isinstance(result, Heartbeat):
                assert isinstance(result, StepResult)
                return result

    def join(self) -> None:
        self._thread.join(HANG_SECONDS)
        assert not self._thread.is_alive(), "the rank does not end"

    def close(self) -> None:
        self.channel.close()
        self._listener.close()
        self.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    make_model("tiny", made, layers=1, progress=False)
    return made


@pytest.fixture
def setup(folder: Path, socket_folder: Path) -> RankSetup:
    return RankSetup(
        rank=0,
        ranks=1,
        generation=4,
        device="cpu",
        folder=folder,
        spec=read_spec(folder),
        socket_path=socket_folder / "engine.sock",
        rendezvous=socket_folder / "group",
        exchange="local",
        experts="reference",
        activation_scale="token",
        threads=1,
        max_tokens=64,
        max_graph_tokens=16,
        phase_sample_steps=1,
        step_timeout_seconds=10.0,
        start_timeout_seconds=HANG_SECONDS,
        silence_seconds=0.5,
    )


@pytest.fixture
def engine(setup: RankSetup, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineSide]:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    threads = torch.get_num_threads()
    made = EngineSide(setup)
    yield made
    made.close()
    torch.set_num_threads(threads)


@pytest.fixture
def slab() -> Iterator[Slab]:
    made = Slab(1 << 20)
    yield made
    made.close()


def step_of(number: int, hidden_size: int, layer: int) -> Step:
    hidden = TensorRef(0, DType.F32, hidden_size)
    output = TensorRef(3 * 4 * hidden_size, DType.F32, hidden_size)
    request = ForwardRequest(7, 1, layer, 3, 1e9, True, hidden, None, Routing.SERVER, None, None, output)
    return Step(number, 4, layer, (request,))


def hello_of(engine: EngineSide) -> RankHello:
    hello, fds = engine.channel.receive()
    assert isinstance(hello, RankHello)
    assert fds == []
    return hello


def attach(engine: EngineSide, slab: Slab) -> None:
    socket.send_fds(engine.sock, [pack(AttachSlab(7, slab.nbytes))], [slab.fd])


def test_a_rank_says_who_it_is_and_serves_until_the_engine_hangs_up(
    engine: EngineSide, folder: Path, slab: Slab
) -> None:
    hello = hello_of(engine)
    spec = read_spec(folder)
    assert (hello.generation, hello.backend, hello.kernel) == (4, "local", "reference")
    assert (hello.info.rank, hello.info.state, hello.info.experts) == (0, "ready", (0, spec.num_experts))
    assert hello.info.pid > 0
    assert hello.info.memory_bytes > 0
    attach(engine, slab)
    size = 3 * 4 * spec.hidden_size
    rows = torch.frombuffer(slab.view(0, 2 * size), dtype=torch.float32).view(6, spec.hidden_size)
    rows[:3] = torch.randn(3, spec.hidden_size, generator=torch.Generator().manual_seed(0))
    results = [engine.step(step_of(number, spec.hidden_size, spec.layers[0])) for number in (10, 11)]
    assert [(result.step, result.generation, result.error) for result in results] == [(10, 4, ""), (11, 4, "")]
    assert results[0].routed_rows == 3 * spec.top_k
    assert rows[3:].isfinite().all()
    assert (rows[3:] != 0).any(dim=1).all()
    engine.channel.close()
    engine.join()
    assert engine.error is None


def test_a_rank_gives_signs_of_life_once_it_is_taken_in(engine: EngineSide, slab: Slab) -> None:
    hello_of(engine)
    attach(engine, slab)
    assert [engine.channel.receive()[0] for _ in range(2)] == [Heartbeat(4, 0)] * 2


def test_what_breaks_a_step_is_told_before_the_rank_ends(engine: EngineSide, folder: Path, slab: Slab) -> None:
    hello_of(engine)
    spec = read_spec(folder)
    attach(engine, slab)
    engine.channel.send(DetachSlab(7))
    result = engine.step(step_of(3, spec.hidden_size, spec.layers[0]))
    assert (result.step, result.generation, result.rank) == (3, 4, 0)
    assert result.error == "KeyError: 7"
    assert result.phase_seconds == ()
    engine.join()
    assert isinstance(engine.error, KeyError)


def test_a_message_that_is_not_for_ranks_ends_the_rank(engine: EngineSide) -> None:
    hello_of(engine)
    engine.channel.send(Cancel(1))
    engine.join()
    assert isinstance(engine.error, TypeError)
    assert "the engine sent a Cancel" in str(engine.error)


def test_a_node_without_the_checkpoint_is_named_with_the_path(setup: RankSetup, socket_folder: Path) -> None:
    check_folder(setup)
    elsewhere = replace(setup, rank=3, host="10.1.2.3", folder=socket_folder / "not here")
    with pytest.raises(StartError, match=r"rank 3 on node .* \(10\.1\.2\.3\) cannot read .*not here/config\.json"):
        check_folder(elsewhere)


class Gpu:
    """A GPU's free memory, each time it is asked for, and the seconds slept meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *free_bytes: int) -> None:
        self.free_bytes = list(free_bytes)
        self.now = 0.0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free_bytes.pop(0), 1 << 40))
        monkeypatch.setattr("moe_forward.rank_process.time.monotonic", lambda: self.now)
        monkeypatch.setattr("moe_forward.rank_process.time.sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds


def on_gpu(setup: RankSetup, generation: int) -> RankSetup:
    return replace(setup, device="cuda:0", experts="cutlass", generation=generation)


def test_a_rank_that_does_not_fit_its_gpu_is_refused_at_once(setup: RankSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, 1 << 20)
    with pytest.raises(StartError, match=r"the GPU has 0\.00 GB free"):
        check_memory(on_gpu(setup, generation=1))
    assert gpu.now == 0


def test_a_new_group_waits_for_the_memory_of_the_one_that_was_killed(
    setup: RankSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(monkeypatch, 1 << 20, 1 << 20, 1 << 40)
    check_memory(on_gpu(setup, generation=2))
    assert gpu.now == 2.0
    Gpu(monkeypatch, *[1 << 20] * 100)
    with pytest.raises(StartError, match="free"):
        check_memory(on_gpu(setup, generation=2))
