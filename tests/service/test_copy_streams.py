"""Which stream does what, and what waits for what; the streams are notes in a list."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from moe_forward.copy_streams import AtOnce, CopyStreams, copies_of

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

    @contextmanager
    def stream(self, chosen: FakeStream) -> Iterator[None]:
        before, self.current = self.current, chosen
        yield
        self.current = before

    def work(self, name: str) -> str:
        self.log.append(f"{name} on {self.current.name}")
        return name


class FakeStream:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> FakeEvent:
        self.cuda.log.append(f"event on {self.name}")
        return FakeEvent(self.cuda)


class FakeEvent:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.passed = cuda, False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.cuda.log.append("synchronized")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()
    monkeypatch.setattr(torch.cuda, "Stream", made.make)
    monkeypatch.setattr(torch.cuda, "current_stream", made.current_stream)
    monkeypatch.setattr(torch.cuda, "stream", made.stream)
    return made


def test_computing_waits_for_the_rows_and_the_way_out_for_the_computing(cuda: Cuda) -> None:
    copies = copies_of(GPU)
    assert isinstance(copies, CopyStreams)
    assert copies.read(lambda: cuda.work("rows")) == "rows"
    cuda.work("kernels")
    pending = copies.write(lambda: cuda.work("outputs"))
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


def test_a_cpu_copies_at_once() -> None:
    copies = copies_of(torch.device("cpu"))
    assert isinstance(copies, AtOnce)
    pending = copies.write(lambda: 5)
    assert (copies.read(lambda: 4), pending.done(), pending.result()) == (4, True, 5)
