"""Bytes that change on their way from a rank of another host to the gateway: a proxy stands between them."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...service.whole.hosts import Hosts, RayCluster, on_host, visiting
from ...service.whole.running import Service
from ..scene import Fault, Scene, in_thread
from .network import CPUS, cannot_make_hosts, starting

GATEWAY_PORT, PROXY_PORT = 6410, 6411
MARK = 77
"""Of the proxy's own packets, which must not be sent to the proxy again."""
PATIENCE_SECONDS = 10.0
CHUNK_BYTES = 1 << 16


class Proxy:
    """Takes a host's connections to the gateway, passes them on, and flips a bit when asked.

    host: of the ranks. gateway: its address.
    """

    def __init__(self, host: str, gateway: str) -> None:
        self._host, self._gateway = host, gateway
        self._in_rows = False
        self._wanted = threading.Event()
        with visiting(host):
            self._listener = socket.create_server(("", PROXY_PORT))
        own = ["-m", "mark", "!", "--mark", str(MARK)]
        there = ["-p", "tcp", "-d", gateway, "--dport", str(GATEWAY_PORT)]
        rule = ["iptables", "-t", "nat", "-A", "OUTPUT", *there, *own, "-j", "REDIRECT", "--to-ports", str(PROXY_PORT)]
        subprocess.run(on_host(host, rule), check=True, capture_output=True)
        threading.Thread(target=self._accept, daemon=True).start()

    def flip(self, in_rows: bool) -> None:
        """Flip a bit of the next result that a rank sends; returns when it is done.

        in_rows: in the middle, where the rows are; else in the length of its frame.
        """
        self._in_rows = in_rows
        self._wanted.set()
        give_up = time.monotonic() + PATIENCE_SECONDS
        while self._wanted.is_set():
            assert time.monotonic() < give_up, "no rank sent anything"
            time.sleep(0.001)

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                rank, _ = self._listener.accept()
                with visiting(self._host):
                    gateway = socket.socket()
                gateway.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
                gateway.connect((self._gateway, GATEWAY_PORT))
                for sock in (rank, gateway):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pass, args=(rank, gateway, True), daemon=True).start()
                threading.Thread(target=self._pass, args=(gateway, rank, False), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, from_rank: bool) -> None:
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(CHUNK_BYTES)):
                if from_rank and self._wanted.is_set():
                    data[len(data) // 2 if self._in_rows else 1] ^= 0x40
                    self._wanted.clear()
                target.sendall(data)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class Flips:
    """A fault of a service on two hosts. in_rows: whether the bit is one of an output, or of a frame's length."""

    def __init__(self, in_rows: bool) -> None:
        self._in_rows = in_rows
        self._proxy: Proxy | None = None

    @contextlib.contextmanager
    def start(self, model: Path, config: Mapping[str, Any]) -> Iterator[Service]:
        """Run a service whose second host reaches the gateway through a proxy."""
        with contextlib.closing(Hosts()) as hosts, contextlib.closing(RayCluster(hosts, CPUS)) as cluster:
            cluster.wait_complete(hosts.first)
            self._proxy = Proxy(hosts.second, hosts.addresses[hosts.first])
            settings = {**config, "remote_ranks_port": GATEWAY_PORT}
            with contextlib.closing(self._proxy), starting(hosts, cluster, model, settings) as service:
                yield service

    def strike(self, scene: Scene) -> None:
        """Flip one bit."""
        assert self._proxy is not None
        scene.now()
        self._proxy.flip(self._in_rows)


_FRAME, _ROWS = Flips(in_rows=False), Flips(in_rows=True)

FAULTS = (
    Fault(
        "frame-flipped",
        in_thread(_FRAME.strike),
        "a bit of a frame between hosts is flipped",
        start=_FRAME.start,
        unavailable=cannot_make_hosts,
    ),
    Fault(
        "rows-flipped",
        in_thread(_ROWS.strike),
        "a bit of an output between hosts is flipped",
        start=_ROWS.start,
        unavailable=cannot_make_hosts,
    ),
)
