"""Copies between slabs and a device: at once on a CPU; on a GPU beside the computing, on streams of their own.

So the next step's rows come while this one computes, and this one's outputs leave while the next one does. Computing
stays on one stream, and every step waits there for its own rows alone. Memory that is used on a stream it was not
allocated on must outlive that use: who launched the step holds it until `Pending.result` has returned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from moe_forward.moves import KernelMover, Mover, TorchMover

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """What copies bring once they have ended."""

    def done(self) -> bool:
        """Whether `result` returns at once."""
        ...

    def result(self) -> T_co:
        """Wait until the copies have ended, and return what they brought."""
        ...


class Copies(Protocol):
    """How a rank copies; work is called at once, and starts its copies by what it is given."""

    def read(self, work: Callable[[Mover], T]) -> T:
        """Bring rows to the device; what is computed from now on waits for them."""
        ...

    def write(self, work: Callable[[Mover], T]) -> Pending[T]:
        """Take away what was computed by now."""
        ...


@dataclass(frozen=True, slots=True)
class Done(Generic[T_co]):
    """What is there already."""

    value: T_co

    def done(self) -> bool:
        """It is."""
        return True

    def result(self) -> T_co:
        """Return it."""
        return self.value


class AtOnce:
    """Copies of a CPU, which have ended when they return."""

    def read(self, work: Callable[[Mover], T]) -> T:
        """See `Copies.read`."""
        return work(TorchMover())

    def write(self, work: Callable[[Mover], T]) -> Pending[T]:
        """See `Copies.write`."""
        return Done(work(TorchMover()))


class CopyStreams:
    """A stream into a GPU and one out of it, beside the current one, on which all computing stays.

    device: with its index. mover: starts copies on the current stream.
    """

    def __init__(self, device: torch.device, mover: Mover) -> None:
        self._mover = mover
        self._computing = torch.cuda.current_stream(device)  # to ask for it in every step takes longer than to use it
        self._into = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._out = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Recorded again by every step: who waits for an event waits for what it marked when he was told to.
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._computed = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def read(self, work: Callable[[Mover], T]) -> T:
        """See `Copies.read`."""
        brought = self._on(self._into, work)
        self._arrived.record(self._into)
        self._computing.wait_event(self._arrived)
        return brought

    def write(self, work: Callable[[Mover], T]) -> Pending[T]:
        """See `Copies.write`."""
        self._computed.record(self._computing)
        self._out.wait_event(self._computed)
        value = self._on(self._out, work)
        return _Recorded(value, self._out.record_event())

    def _on(self, stream: torch.cuda.Stream, work: Callable[[Mover], T]) -> T:
        """Call work with `stream` as the current one; torch's own context manager takes three times as long."""
        torch.cuda.set_stream(stream)
        try:
            return work(self._mover)
        finally:
            torch.cuda.set_stream(self._computing)


@dataclass(frozen=True, slots=True)
class _Recorded(Generic[T_co]):
    """What is there when the stream has passed an event."""

    value: T_co
    event: torch.cuda.Event

    def done(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def result(self) -> T_co:
        self.event.synchronize()
        return self.value


def copies_of(device: torch.device, kernels: bool) -> Copies:
    """Return how a device copies. kernels: the kernel library is there, which moves many rows at once."""
    if device.type != "cuda":
        return AtOnce()
    return CopyStreams(device, KernelMover(device) if kernels else TorchMover())
