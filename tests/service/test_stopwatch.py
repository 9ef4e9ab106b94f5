"""The stopwatch: one figure a phase, added up, in the order of `PHASES`."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from moe_forward.stopwatch import DeviceStopwatch, Event, Span, Stopwatch, Untimed, start_clock
from moe_forward.types import PHASES


class FakeEvent:
    """An event on a time line of milliseconds, given in advance."""

    def __init__(self, moments: list[float]) -> None:
        self._moments = moments
        self.at = 0.0

    def record(self) -> None:
        self.at = self._moments.pop(0)

    def elapsed_time(self, end_event: Event, /) -> float:
        assert isinstance(end_event, FakeEvent)
        return end_event.at - self.at


def seconds_of(clock: Stopwatch | DeviceStopwatch) -> dict[str, float]:
    return dict(zip(PHASES, clock.phase_seconds, strict=True))


def test_a_new_stopwatch_has_a_zero_for_every_phase() -> None:
    assert Stopwatch().phase_seconds == (0.0,) * len(PHASES)


def test_blocks_of_the_same_phase_add_up() -> None:
    clock = Stopwatch()
    with mock.patch("moe_forward.stopwatch.time.perf_counter", side_effect=[1.0, 1.5, 10.0, 12.0, 20.0, 20.25]):
        with clock("host_copy"):
            pass
        with clock("gemm1"):
            pass
        with clock("host_copy"):
            pass
    assert seconds_of(clock) == dict.fromkeys(PHASES, 0.0) | {"host_copy": 0.75, "gemm1": 2.0}


def test_a_block_that_raises_is_timed_and_raises() -> None:
    clock = Stopwatch()
    with (
        mock.patch("moe_forward.stopwatch.time.perf_counter", side_effect=[1.0, 4.0]),
        pytest.raises(RuntimeError, match="broken"),
        clock("gemm2"),
    ):
        raise RuntimeError("broken")
    assert seconds_of(clock)["gemm2"] == 3.0


def test_an_unknown_phase_raises() -> None:
    with pytest.raises(KeyError, match="lunch"), Stopwatch()("lunch"):
        pass


def test_device_events_add_up_with_those_of_a_replayed_graph() -> None:
    moments = [1.0, 3.0, 10.0, 10.5, 20.0, 24.0]
    clock = DeviceStopwatch(lambda phase: (FakeEvent(moments), FakeEvent(moments)))
    for phase in ("host_copy", "quantize", "host_copy"):
        with clock(phase):
            pass
    begin, end = FakeEvent([5.0]), FakeEvent([6.0])
    begin.record()
    end.record()
    clock.add([Span("gemm1", begin, end)])
    expected = dict.fromkeys(PHASES, 0.0) | {"host_copy": 6e-3, "quantize": 0.5e-3, "gemm1": 1e-3}
    assert seconds_of(clock) == pytest.approx(expected)


def test_a_device_block_of_an_unknown_phase_or_that_raises_records_no_span() -> None:
    clock = DeviceStopwatch(lambda phase: (FakeEvent([1.0]), FakeEvent([2.0])))
    with pytest.raises(KeyError, match="lunch"), clock("lunch"):
        pass
    with pytest.raises(RuntimeError, match="broken"), clock("gemm2"):
        raise RuntimeError("broken")
    assert clock.spans == []


def test_an_untimed_step_has_no_figures_at_all() -> None:
    clock = Untimed()
    with clock("gemm1"):
        pass
    assert clock.phase_seconds == ()


def test_every_step_is_timed_on_cpu_and_one_in_so_many_on_a_gpu() -> None:
    assert all(isinstance(start_clock(step, torch.device("cpu"), 0), Stopwatch) for step in range(4))
    kinds = [type(start_clock(step, torch.device("cuda"), 3)) for step in range(6)]
    assert kinds == [DeviceStopwatch, Untimed, Untimed] * 2
    assert isinstance(start_clock(0, torch.device("cuda"), 0), Untimed)
