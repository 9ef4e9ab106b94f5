"""Which stream does what, and what waits for what; the streams are notes in a list."""

from __future__ import annotations

import pytest
import torch

from moe_forward.copy_streams import AtOnce, CopyStreams, copies_of
from moe_forward.moves import KernelMover, Mover, TorchMover

GPU = torch.device("cuda:1")


class Cuda:
    """What `CopyStreams` calls of torch.cuda."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.made = 0
        self.current = FakeStream(self, "compute")

    def make(self, device: torch.device) -> FakeStream:
        assert device == GPU
        self.made += 1
        return FakeStream(self, ("in", "out")[self.made - 1])

    def current_stream(self, device: torch.device) -> FakeStream:
        assert device == GPU
        return self.current

    def set_stream(self, chosen: FakeStream) -> None:
        self.current = chosen

    def event(self) -> FakeEvent:
        return FakeEvent(self)

    def work(self, name: str) -> str:
        self.log.append(f"{name} on {self.current.name}")
        return name


class FakeStream:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_event(self, event: FakeEvent) -> None:
        self.cuda.log.append(f"{self.name} waits for {event.marked}")

    def record_event(self) -> FakeEvent:
        event = FakeEvent(self.cuda)
        event.record(self)
        self.cuda.log.append(f"event on {self.name}")
        return event


class FakeEvent:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.passed, self.marked = cuda, False, "nothing"

    def record(self, stream: FakeStream) -> None:
        self.marked = stream.name

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.cuda.log.append("synchronized")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()
    monkeypatch.setattr(torch.cuda, "Stream", made.make)
    monkeypatch.setattr(torch.cuda, "current_stream", made.current_stream)
    monkeypatch.setattr(torch.cuda, "set_stream", made.set_stream)
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    return made


def test_computing_waits_for_the_rows_and_the_way_out_for_the_computing(cuda: Cuda) -> None:
    copies = CopyStreams(GPU, TorchMover())
    assert copies.read(lambda mover: cuda.work("rows")) == "rows"
    cuda.work("kernels")
    pending = copies.write(lambda mover: cuda.work("outputs"))
    assert cuda.log == [
        "rows on in",
        "compute waits for in",
        "kernels on compute",
        "out waits for compute",
        "outputs on out",
        "event on out",
    ]
    assert not pending.done()
    assert cuda.log[-1] == "event on out", "asking waits for nothing"
    assert pending.result() == "outputs"
    assert cuda.log[-1] == "synchronized"


def test_computing_goes_on_where_it_was_after_copies_that_fail(cuda: Cuda) -> None:
    def fail(mover: Mover) -> None:
        raise RuntimeError("no such slab")

    copies = CopyStreams(GPU, TorchMover())
    with pytest.raises(RuntimeError, match="no such slab"):
        copies.read(fail)
    assert cuda.work("kernels") == "kernels"
    assert cuda.log[-1] == "kernels on compute"


def test_a_gpu_moves_by_the_kernel_library_where_it_has_it(cuda: Cuda) -> None:
    given: list[Mover] = []
    for kernels in (True, False):
        cuda.made = 0
        copies_of(GPU, kernels).read(given.append)
    assert isinstance(given[0], KernelMover)
    assert isinstance(given[1], TorchMover)


def test_a_cpu_copies_at_once() -> None:
    copies = copies_of(torch.device("cpu"), kernels=False)
    assert isinstance(copies, AtOnce)
    pending = copies.write(lambda mover: 5)
    assert (copies.read(lambda mover: 4), pending.done(), pending.result()) == (4, True, 5)
