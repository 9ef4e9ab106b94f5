"""A front end's process as the process that started it sees it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from moe_forward.channel import AsyncChannel
from moe_forward.front_task import FrontTask
from moe_forward.heartbeat import SilenceWatch
from moe_forward.messages import Message, TakeConnection

END_SECONDS = 5.0
"""For a process to be gone after its last word."""


@dataclass(eq=False, slots=True)
class FrontChild:
    """One process, made by `start_child`.

    deadline: kills it if it does not serve by then. silence: does so when it gives no sign of life later.
    ended: it has hung up. up: it serves. connections, handed: see `Taker`. last_word: why it failed.
    inflight: forwards it is serving, None while it was asked and has not answered.
    asks: it wants to know what the others are serving.
    """

    number: int
    process: subprocess.Popen[bytes]
    channel: AsyncChannel
    deadline: asyncio.TimerHandle
    silence: SilenceWatch
    ended: asyncio.Event
    up: bool = False
    connections: int = 0
    handed: int = 0
    last_word: str = ""
    inflight: int | None = 0
    asks: bool = False

    def serves(self) -> None:
        """It has said that it serves: from now on it has to be heard."""
        self.up = True
        self.deadline.cancel()
        self.silence.watch((self.number,))

    def lose(self, reason: str) -> None:
        """End a process that is not to be waited for."""
        self.last_word = reason
        self.process.kill()

    def take(self, connection: socket.socket) -> None:
        """See `Taker`."""
        self.channel.send(TakeConnection(), connection.fileno())

    async def why_it_ended(self) -> str:
        """Wait for the process, which has hung up, and return why."""
        try:
            status = await asyncio.to_thread(self.process.wait, END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = await asyncio.to_thread(self.process.wait)
        if self.last_word:
            return self.last_word
        return f"its process ended by signal {-status}" if status < 0 else f"its process ended with status {status}"

    def close(self) -> None:
        """End the process, if it has not ended by itself, and hang up."""
        self.deadline.cancel()
        self.silence.stop()
        self.process.kill()
        self.process.wait()
        self.channel.close()


def start_child(
    program: Sequence[str], task: FrontTask, on_message: Callable[[FrontChild, Message, list[int]], None]
) -> FrontChild:
    """Start a front end; to be called on the main thread, whose end is the process' end too.

    program: the command that a descriptor is added to.
    on_message: called with each message and the descriptors it carried (the callee closes them).
    Raises: OSError when no process can be started.
    """
    with contextlib.ExitStack() as undo:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        undo.callback(ours.close)
        with theirs, _signals_blocked():
            process = subprocess.Popen(
                [*program, str(theirs.fileno())], stdin=subprocess.PIPE, pass_fds=[theirs.fileno()]
            )
        undo.pop_all()
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # if it ended already, its channel says so
        pipe.write(task.to_json())
    start_seconds, silence_seconds = task.config.start_timeout_seconds, task.config.silence_seconds

    def hung_up(channel: AsyncChannel) -> None:
        child.up = False
        child.deadline.cancel()
        child.silence.stop()
        child.ended.set()

    child: FrontChild = FrontChild(
        task.number,
        process,
        AsyncChannel(ours, lambda _, message, fds: on_message(child, message, fds), hung_up),
        asyncio.get_running_loop().call_later(
            start_seconds, lambda: child.lose(f"it does not serve after {start_seconds:g} s (start_timeout_seconds)")
        ),
        SilenceWatch(silence_seconds, lambda _: child.lose(f"no sign of life for {silence_seconds:g} s")),
        asyncio.Event(),
    )
    return child


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Start a process that neither Ctrl-C nor SIGTERM ends: both are sent to every process of a service, and this one
    drains the others.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
