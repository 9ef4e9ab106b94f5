"""Timing the phases of a step: on the host, or on a GPU's own time line with CUDA events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch

from moe_forward.types import PHASES


class Event(Protocol):
    """What is needed of a torch.cuda.Event."""

    def record(self) -> None:
        """Note the moment when the current stream reaches this point."""
        ...

    def elapsed_time(self, end_event: Event, /) -> float:
        """Return the milliseconds until `end_event`."""
        ...


class Span(NamedTuple):
    """A phase between two events."""

    phase: str
    start: Event
    stop: Event


class Stopwatch:
    """Adds up the seconds spent in each phase of one step: `with stopwatch("dispatch"): ...`."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, phase: str, /) -> Iterator[None]:
        """Time a block and add it to `phase`, one of `PHASES`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += time.perf_counter() - start

    @property
    def phase_seconds(self) -> tuple[float, ...]:
        """One figure for each of `PHASES`."""
        return tuple(self._seconds[phase] for phase in PHASES)


class DeviceStopwatch:
    """The same on the GPU's time line; figures can be read when the stream has passed the last block.

    pair: makes or finds the two events of a phase.
    """

    def __init__(self, pair: Callable[[str], tuple[Event, Event]]) -> None:
        self._pair = pair
        self.spans: list[Span] = []

    @contextmanager
    def __call__(self, phase: str, /) -> Iterator[None]:
        """Time a block and add it to `phase`, one of `PHASES`."""
        if phase not in PHASES:
            raise KeyError(phase)
        span = Span(phase, *self._pair(phase))
        span.start.record()
        yield  # where the block raises, the stream may be broken, and nobody reads the figures
        span.stop.record()
        self.spans.append(span)

    def add(self, spans: list[Span]) -> None:
        """Take in phases that something else records, such as the replay of a graph."""
        self.spans += spans

    @property
    def phase_seconds(self) -> tuple[float, ...]:
        """One figure for each of `PHASES`."""
        seconds = dict.fromkeys(PHASES, 0.0)
        for span in self.spans:
            seconds[span.phase] += span.start.elapsed_time(span.stop) * 1e-3
        return tuple(seconds[phase] for phase in PHASES)


_NOTHING = nullcontext()


class Untimed:
    """The clock of a step that nobody times."""

    def __call__(self, phase: str, /) -> AbstractContextManager[None]:
        """Do nothing before and after the block."""
        return _NOTHING

    @property
    def phase_seconds(self) -> tuple[float, ...]:
        """No figures."""
        return ()


Clock = Stopwatch | DeviceStopwatch | Untimed


def start_clock(step: int, device: torch.device, sample_steps: int) -> Clock:
    """Return the clock of a step: on CPU always one that counts, on a GPU in one of `sample_steps` steps (0: in none).

    An event in a graph costs about a microsecond and keeps kernels from overlapping, so not every step is timed.
    """
    if device.type == "cpu":
        return Stopwatch()
    if sample_steps and step % sample_steps == 0:
        return DeviceStopwatch(_new_pair)
    return Untimed()


def graph_pairs() -> Callable[[str], tuple[Event, Event]]:
    """Return a source of event pairs for captures: one pair a phase, which every graph of a rank records again.

    They are external, so that a capture makes them nodes of the graph and each replay records them. All graphs share
    them, so a timed graph may be replayed only when the figures of the one before have been read (`Rank.launch`).
    """
    pairs: dict[str, tuple[Event, Event]] = {}

    def pair(phase: str) -> tuple[Event, Event]:
        if phase not in pairs:
            pairs[phase] = (_event(external=True), _event(external=True))
        return pairs[phase]

    return pair


def _new_pair(phase: str) -> tuple[Event, Event]:
    return _event(external=False), _event(external=False)


def _event(external: bool) -> Any:
    return torch.cuda.Event(enable_timing=True, external=external)  # type: ignore[no-untyped-call]
