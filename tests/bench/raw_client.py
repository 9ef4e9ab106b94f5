"""A client that costs next to nothing, so that a server is measured and not its client.

    python raw_client.py PORT PATH TOKENS HIDDEN_SIZE CONNECTIONS SECONDS [--requests N]

Plain sockets and epoll; every connection sends its next request as soon as its reply is there. Prints one JSON object:
`seconds` of every request (or its quantiles with --requests) and `checked`: replies whose bytes were compared.
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import time
from dataclasses import dataclass, field

HEAD_BYTES = 4096
CHECKED_EVERY = 16


def safetensors_body(tokens: int, hidden_size: int, seed: int) -> bytes:
    """bf16 hidden states of `tokens` rows, all finite, as a safetensors file."""
    nbytes = 2 * tokens * hidden_size
    header = {"hidden_states": {"dtype": "BF16", "shape": [tokens, hidden_size], "data_offsets": [0, nbytes]}}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pattern = bytes(byte for number in range(4096) for byte in ((number * 7 + seed) % 256, 0x3F))
    return len(text).to_bytes(8, "little") + text + (pattern * (nbytes // len(pattern) + 1))[:nbytes]


@dataclass
class Caller:
    """One connection. request: head and body. data: what must come back at the end of the reply."""

    connection: socket.socket
    request: memoryview
    data: bytes
    buffer: bytearray
    sent: int = 0
    got: int = 0
    wanted: int = 0  # bytes of the reply with its head, once known
    started: int = 0
    seconds: list[float] = field(default_factory=list)
    checked: int = 0

    def begin(self) -> bool:
        """Send the next request, as far as it goes; whether all of it went."""
        self.sent = self.got = self.wanted = 0
        self.started = time.perf_counter_ns()
        return self.go_on()

    def go_on(self) -> bool:
        """Send more of the request."""
        while self.sent < len(self.request):
            try:
                self.sent += self.connection.send(self.request[self.sent :])
            except BlockingIOError:
                return False
        return True

    def take(self) -> bool:
        """Receive what is there; whether the reply is complete."""
        view = memoryview(self.buffer)
        while True:
            try:
                received = self.connection.recv_into(view[self.got :])
            except BlockingIOError:
                return False
            if not received:
                raise ConnectionError("the server closed the connection")
            self.got += received
            if not self.wanted:
                self._read_head()
            if self.wanted and self.got >= self.wanted:
                self.seconds.append((time.perf_counter_ns() - self.started) * 1e-9)
                if len(self.seconds) % CHECKED_EVERY == 1:
                    self._check()
                return True

    def _read_head(self) -> None:
        end = self.buffer.find(b"\r\n\r\n", 0, min(self.got, HEAD_BYTES))
        if end < 0:
            return
        head = bytes(self.buffer[:end]).lower()
        if not head.startswith(b"http/1.1 200"):
            raise ValueError(f"expected 200, got {bytes(self.buffer[: self.got])[:600]!r}")
        length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
        self.wanted = end + 4 + int(length)

    def _check(self) -> None:
        if self.buffer[self.wanted - len(self.data) : self.wanted] != self.data:
            raise ValueError("a reply has other bytes than its request")
        self.checked += 1


def load(
    port: int, path: str, tokens: int, hidden_size: int, connections: int, seconds: float, requests: int | None = None
) -> tuple[list[float], float, int]:
    """Keep `connections` busy for `seconds`, or until `requests` were answered.

    Returns: seconds of every request, seconds of the whole, and how many replies were compared.
    """
    callers = [_connect(port, path, tokens, hidden_size, seed) for seed in range(connections)]
    epoll = select.epoll()
    by_number = {caller.connection.fileno(): caller for caller in callers}
    for number in by_number:
        epoll.register(number, select.EPOLLIN)

    def begin(caller: Caller) -> None:
        if not caller.begin():
            epoll.modify(caller.connection.fileno(), select.EPOLLIN | select.EPOLLOUT)

    started = time.perf_counter()
    end = started + seconds
    answered, running = 0, len(callers)
    for caller in callers:
        begin(caller)
    while running:
        for number, events in epoll.poll():
            caller = by_number[number]
            if events & select.EPOLLOUT and caller.go_on():
                epoll.modify(number, select.EPOLLIN)
            if events & ~select.EPOLLOUT and caller.take():
                answered += 1
                if (answered + running <= requests) if requests is not None else time.perf_counter() < end:
                    begin(caller)
                else:
                    running -= 1
    whole = time.perf_counter() - started
    for caller in callers:
        caller.connection.close()
    return [one for caller in callers for one in caller.seconds], whole, sum(caller.checked for caller in callers)


def _connect(port: int, path: str, tokens: int, hidden_size: int, seed: int) -> Caller:
    body = safetensors_body(tokens, hidden_size, seed)
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: bench",
        "Content-Type: application/vnd.safetensors",
        f"Content-Length: {len(body)}",
    ]
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setblocking(False)
    request = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
    data = body[-2 * tokens * hidden_size :]
    return Caller(connection, memoryview(request), data, bytearray(len(body) + HEAD_BYTES))


def main() -> None:
    """Read the command line, load the server, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("tokens", type=int)
    parser.add_argument("hidden_size", type=int)
    parser.add_argument("connections", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--requests", type=int, help="end after so many answers instead, and print quantiles only")
    given = parser.parse_args()
    found, whole, checked = load(**vars(given))
    if given.requests is not None:
        found = sorted(found)[:: max(1, len(found) // 1000)]
    print(json.dumps({"seconds": found, "whole_seconds": whole, "checked": checked, "requests": given.requests}))


if __name__ == "__main__":
    main()
