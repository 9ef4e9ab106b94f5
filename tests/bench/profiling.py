"""Where one request's time goes: moments of every request of a front end, and samples of its stack as a picture.

Benchmark only: the functions of the service are wrapped from outside.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_forward.api import connections, direct
from moe_forward.channel import AsyncChannel
from moe_forward.link import EngineLink
from moe_forward.metrics import Metrics
from moe_forward.request_record import RequestRecord

KEPT = 20000

STAGES = (
    ("parse", "read", "started", "read from the socket, HTTP parsed, task started"),
    ("refusals, headers", "started", "aimed", "what is refused without the body, headers, room in the slab"),
    ("body", "aimed", "decoding", "from the buffer and the socket into the slab"),
    ("decode", "decoding", "handed_over", "safetensors read and checked, described to the engine"),
    ("send", "handed_over", "sent", "datagram to the engine"),
    ("engine, ranks", "sent", "result", "two hops there, the copy, two hops back"),
    ("wake", "result", "answered", "the front end's task runs again"),
    ("encode", "answered", "sending", "head of the reply"),
    ("reply", "sending", "written", "slab to socket"),
    ("account", "written", "counted", "memory freed"),
    ("metrics", "counted", "ended", "series; the log line comes after"),
)
"""Name, first and last moment, meaning."""


class Stages:
    """Keeps the moments of a front end's requests; made before the front end is."""

    def __init__(self) -> None:
        self.requests: list[dict[str, float]] = []
        self._now: dict[str, float] = {}
        self._wrap(connections.Connection, "buffer_updated", before="read")
        self._wrap(direct.DirectBody, "aim", before="aimed")
        self._wrap(EngineLink, "_finish", before="result")
        self._wrap(connections.Connection, "write_now", after="written")
        self._wrap(AsyncChannel, "_send_posted", after="sent")
        self._wrap_end()

    def _note(self, moment: str, once: bool = False) -> None:
        if not (once and moment in self._now):
            self._now[moment] = time.perf_counter()

    def _wrap(self, owner: Any, name: str, before: str | None = None, after: str | None = None) -> None:
        inner = getattr(owner, name)

        def outer(*arguments: Any) -> Any:
            if before is not None:
                self._note(before, once=before == "read")
            found = inner(*arguments)
            if after is not None:
                self._note(after)
            return found

        setattr(owner, name, outer)

    def _wrap_end(self) -> None:
        inner = Metrics.request_finished

        def request_finished(metrics: Metrics, record: RequestRecord) -> None:
            self._note("counted")
            inner(metrics, record)
            self._note("ended")
            moments = {name: getattr(record.moments, name) for name in record.moments.__slots__}
            if record.code is None and len(self.requests) < KEPT:
                self.requests.append({**moments, **self._now})
            self._now.clear()

        Metrics.request_finished = request_finished  # type: ignore[method-assign]

    def write(self, path: Path) -> None:
        """Write every request's moments."""
        path.write_text(json.dumps(self.requests))


def stage_table(requests: Sequence[dict[str, float]]) -> str:
    """Microseconds of each stage: median, and the least of nine tenths of the requests where the machine is shared."""
    lines = ["| stage | p10 us | p50 us | what |", "|---|---|---|---|"]
    sums = [0.0, 0.0]
    for name, first, last, meaning in STAGES:
        found = [1e6 * (request[last] - request[first]) for request in requests if {first, last} <= request.keys()]
        if len(found) < 2:
            continue
        tenth, median = statistics.quantiles(found, n=10)[0], statistics.median(found)
        sums = [sums[0] + tenth, sums[1] + median]
        lines.append(f"| {name} | {tenth:.1f} | {median:.1f} | {meaning} |")
    lines.append(f"| sum | {sums[0]:.1f} | {sums[1]:.1f} | of {len(requests)} requests, one at a time |")
    return "\n".join(lines)
