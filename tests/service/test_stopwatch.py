"""The stopwatch: one figure a phase, added up, in the order of `PHASES`."""

from __future__ import annotations

from unittest import mock

import pytest

from moe_forward.stopwatch import Stopwatch
from moe_forward.types import PHASES


def seconds_of(clock: Stopwatch) -> dict[str, float]:
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
