"""The client processes of a load test: started once, given a job for each run, and their counts merged."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from moe_forward.bench.clock import NANOSECONDS
from moe_forward.bench.tally import Progress, Tally
from moe_forward.bench.worker import Job, work
from moe_forward.errors import MoEForwardError

LEAD_NS = NANOSECONDS // 50
"""From the last process being ready to the common start: longer than a message takes."""
STOP_SECONDS = 5.0
ENDED = "a client process ended before its run did; its stderr says why"

Tell = Callable[[Progress], None]


class ClientProcessLost(MoEForwardError):
    """A client process of the load test ended, or failed for a reason of its own."""


class Crew:
    """Runs jobs, one for each process. pipes: none runs the only job in this process."""

    def __init__(self, pipes: Sequence[Connection[Any, Any]]) -> None:
        self._pipes = pipes

    def run(self, jobs: Sequence[Job], tell: Tell) -> tuple[Tally, int]:
        """Return the counts of all jobs together, and the moment they started at."""
        if not self._pipes:
            (job,) = jobs
            start_ns = 0

            def begin() -> int:
                nonlocal start_ns
                start_ns = time.monotonic_ns()
                return start_ns

            return work(job, begin, tell), start_ns
        for pipe, job in zip(self._pipes, jobs, strict=True):
            _send(pipe, job)
        for pipe in self._pipes:
            _receive(pipe)
        start_ns = time.monotonic_ns() + LEAD_NS
        for pipe in self._pipes:
            _send(pipe, start_ns)
        whole = Tally(jobs[0].slo_ns)
        working = list(self._pipes)
        while working:
            for pipe in cast("list[Connection[Any, Any]]", wait(working)):
                said = _receive(pipe)
                if isinstance(said, Progress):
                    tell(said)
                else:
                    whole.merge(said)
                    working.remove(pipe)
        return whole, start_ns


@contextlib.contextmanager
def crew(processes: int) -> Iterator[Crew]:
    """Start so many client processes, and end them; one is this process itself."""
    if processes == 1:
        yield Crew(())
        return
    with spawned(_serve, processes) as pipes:
        yield Crew(pipes)


@contextlib.contextmanager
def spawned(target: Callable[[Connection[Any, Any]], None], number: int) -> Iterator[list[Connection[Any, Any]]]:
    """Start processes that run `target` with one end of a pipe, give the other ends, and end them."""
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection[Any, Any]] = []
    children = []
    try:
        for _ in range(number):
            ours, theirs = context.Pipe()
            child = context.Process(target=target, args=(theirs,), daemon=True)
            child.start()
            theirs.close()  # so that the end of the child closes the pipe
            pipes.append(ours)
            children.append(child)
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for child in children:
            child.terminate()
        for child in children:
            child.join(STOP_SECONDS)
            child.close()


def _send(pipe: Connection[Any, Any], what: object) -> None:
    try:
        pipe.send(what)
    except ConnectionError as error:
        raise ClientProcessLost(ENDED) from error


def _receive(pipe: Connection[Any, Any]) -> Any:
    try:
        said = pipe.recv()
    except (EOFError, ConnectionError) as error:
        raise ClientProcessLost(ENDED) from error
    if isinstance(said, BaseException):
        raise said
    return said


def _serve(pipe: Connection[Any, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's goes to all; the parent ends this process

    def begin() -> int:
        pipe.send(None)
        start_ns: int = pipe.recv()
        return start_ns

    while True:
        try:
            job: Job = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(work(job, begin, pipe.send))
        except Exception as error:  # told to the parent, whatever it is
            pipe.send(ClientProcessLost(f"a client process failed: {error!r}"))
