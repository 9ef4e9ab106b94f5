"""A limit on what cannot be interrupted: calls into NCCL and DeepEP that wait for another rank."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
from collections.abc import Iterator

EXIT_CODE = os.EX_TEMPFAIL
"""Of a process that a deadline ended: starting it again may work."""

BACKSTOP_SECONDS = 10.0
"""How much later faulthandler's own thread, which needs no GIL, ends a process whose stuck call holds the GIL."""


@contextlib.contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """End the process, with a sentence on stderr, if the block takes longer.

    A thread does it, by `os._exit`: a call that hangs in NCCL returns to no Python signal handler and no exception.
    Nested, the outer one loses its backstop: the process has one faulthandler timer.

    seconds: how long the block may take. what: what it does, for the message: "joining the group".
    """
    done = threading.Event()
    threading.Thread(target=_end_unless, args=(done, seconds, what), name="deadline", daemon=True).start()
    faulthandler.dump_traceback_later(seconds + BACKSTOP_SECONDS, exit=True, file=2)
    try:
        yield
    finally:
        done.set()
        faulthandler.cancel_dump_traceback_later()


def _end_unless(done: threading.Event, seconds: float, what: str) -> None:
    if done.wait(seconds):
        return
    reason = f"{what} took longer than {seconds:g} s and cannot be interrupted, so this process ends"
    # Not by sys.stderr, whose lock the stuck thread may hold.
    os.write(2, f"moe-forward: {reason}; look for the first error of the other ranks\n".encode())
    faulthandler.dump_traceback(file=2)
    os._exit(EXIT_CODE)
