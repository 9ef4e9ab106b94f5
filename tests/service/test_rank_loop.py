"""The order in which a rank's loop launches and finishes steps, and what is waited for before memory goes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping

import pytest
import torch

from moe_forward import rank_loop
from moe_forward.errors import ChannelClosed
from moe_forward.messages import AttachSlab, Cancel, DetachSlab, Message
from moe_forward.rank_loop import MAX_LAUNCHED, RankLoop
from moe_forward.slab import Slab
from moe_forward.types import Step, StepResult

CPU = torch.device("cpu")


class Script:
    """A channel and a rank in one, which note what is asked of them.

    queue: messages that have come. late: messages that come one by one, each when the rank was asked that often whether
    a step is done. slow: steps that are never done before somebody waits for them.
    """

    def __init__(self, *queue: Message, slow: bool = False) -> None:
        self.log: list[str] = []
        self.queue = deque(queue)
        self.late: deque[tuple[int, Message]] = deque()
        self.slow = slow
        self.asked = 0
        self.launched: list[int] = []
        self.most = 0
        self.breaks = ""
        self.results: list[StepResult] = []

    def ready(self) -> bool:
        return bool(self.queue) or not self.late  # the end can be read too

    def receive(self) -> tuple[Message, list[int]]:
        if not self.queue:
            raise ChannelClosed("the engine is gone")
        return self.queue.popleft(), []

    def send(self, message: Message) -> None:
        assert isinstance(message, StepResult)
        self.results.append(message)
        self.log.append(f"told {message.step}{' why not' if message.error else ''}")

    def launch(self, step: Step, slabs: Mapping[int, torch.Tensor]) -> Launched:
        if self.breaks == f"launch {step.step}":
            raise RuntimeError("out of memory")
        self.log.append(f"launched {step.step}")
        self.launched.append(step.step)
        self.most = max(self.most, len(self.launched))
        return Launched(self, step)

    def close(self) -> None:
        raise AssertionError("the loop does not close what it was given")


class Launched:
    def __init__(self, script: Script, step: Step) -> None:
        self._script = script
        self._step = step

    def done(self) -> bool:
        self._script.asked += 1
        while self._script.late and self._script.late[0][0] <= self._script.asked:
            self._script.queue.append(self._script.late.popleft()[1])
        return not self._script.slow

    def finish(self) -> StepResult:
        assert self._script.launched.pop(0) == self._step.step, "steps are finished in their order"
        if self._script.breaks == f"finish {self._step.step}":
            raise RuntimeError("an illegal memory access was encountered")
        self._script.log.append(f"finished {self._step.step}")
        return StepResult(self._step.step, self._step.generation, 1, (), 0)


def steps(*numbers: int) -> list[Step]:
    return [Step(number, 4, 3, ()) for number in numbers]


def serve(script: Script) -> list[str]:
    first, fds = script.receive()
    with pytest.raises(ChannelClosed):
        RankLoop(script, script, 1, CPU).serve(first, fds)  # type: ignore[arg-type]
    return script.log


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes of `wait` and `detach`, in place of a GPU's."""
    notes: list[str] = []
    monkeypatch.setattr(rank_loop, "wait", lambda device: notes.append("waited for the device"))
    monkeypatch.setattr(rank_loop, "detach", lambda slab, device: notes.append("detached"))
    return notes


@pytest.fixture
def slab() -> Iterator[Slab]:
    made = Slab(1 << 20)
    yield made
    made.close()


def test_a_queued_step_is_launched_before_the_one_before_it_is_finished_and_never_a_third() -> None:
    script = Script(*steps(0, 1, 2, 3), slow=True)
    log = serve(script)
    assert log[:2] == ["launched 0", "launched 1"]
    assert log[2:8] == ["finished 0", "told 0", "launched 2", "finished 1", "told 1", "launched 3"]
    assert script.most == MAX_LAUNCHED == 2


def test_a_step_that_is_done_is_told_before_the_next_one_is_launched() -> None:
    log = serve(Script(*steps(0, 1)))
    assert log == ["launched 0", "finished 0", "told 0", "launched 1", "finished 1", "told 1"]


def test_a_step_that_comes_while_another_runs_is_launched_behind_it() -> None:
    script = Script(*steps(0), slow=True)
    script.late.extend(enumerate(steps(1, 2), start=50))
    log = serve(script)
    assert script.asked >= 50
    assert log[:4] == ["launched 0", "launched 1", "finished 0", "told 0"]


def test_slabs_come_and_go_between_steps_only(slab: Slab, waited: list[str]) -> None:
    script = Script(*steps(0), slow=True)
    script.queue.extend([DetachSlab(7), *steps(1, 2)])
    log = serve(script)
    assert log[:4] == ["launched 0", "finished 0", "told 0", "launched 1"]
    assert waited == ["waited for the device"], "a slab that was never shown is not let go of"


def test_when_the_engine_hangs_up_the_device_is_waited_for_before_slabs_are_let_go(
    slab: Slab, waited: list[str]
) -> None:
    script = Script(*steps(0), slow=True)
    loop = RankLoop(script, script, 1, CPU)  # type: ignore[arg-type]
    with pytest.raises(ChannelClosed):
        loop.serve(AttachSlab(7, slab.nbytes), [os.dup(slab.fd)])
    assert script.log == ["launched 0"], "nobody waits for its result"
    assert waited == ["waited for the device", "detached"]


@pytest.mark.parametrize(("breaks", "step"), [("launch 1", 1), ("finish 0", 0)])
def test_what_breaks_one_of_two_steps_is_told_under_its_number_and_the_device_waited_for(
    breaks: str, step: int, waited: list[str]
) -> None:
    script = Script(*steps(0, 1), slow=True)
    script.breaks = breaks
    first, fds = script.receive()
    with pytest.raises(RuntimeError):
        RankLoop(script, script, 1, CPU).serve(first, fds)  # type: ignore[arg-type]
    (result,) = script.results
    assert (result.step, result.generation, result.rank) == (step, 4, 1)
    assert result.error.startswith("RuntimeError: ")
    assert waited == ["waited for the device"], "copies of the other step may still be under way"


def test_a_message_that_is_not_for_ranks_ends_the_loop() -> None:
    script = Script()
    with pytest.raises(TypeError, match="sent a Cancel"):
        RankLoop(script, script, 1, CPU).serve(Cancel(1), [])  # type: ignore[arg-type]
