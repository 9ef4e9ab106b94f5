"""The socket that HTTP connections come in by, and what the kernel does about them."""

from __future__ import annotations

import contextlib
import logging
import resource
import socket
from collections.abc import Iterator

from moe_forward.errors import StartError

log = logging.getLogger(__name__)

BACKLOG_CONNECTIONS = 2048
OTHER_FILES = 1024
"""Descriptors beside HTTP connections: Ray's, the slab, the engine, logs."""
QUIET_SECONDS = 30
PROBE_SECONDS = 10
PROBES = 3


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Bind the HTTP port while the block runs: a port in use is known before anything is started.

    Raises: StartError naming port and host.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _notice_dead_clients(listener)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise StartError(f"port {port} on {host}: {error.strerror}") from error
        listener.listen(BACKLOG_CONNECTIONS)  # only a listening socket keeps others from binding the port
        yield listener


def allow_connections(connections: int) -> None:
    """Raise this process' limit of open files so that `connections` fit, or as far as it is allowed to."""
    wanted = connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if most < wanted:
        log.warning(
            "max_connections needs %d open files, the hard limit of this process is %d: connections beyond it wait",
            *(wanted, hard),
        )
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _notice_dead_clients(listener: socket.socket) -> None:
    """Let the kernel end connections whose other end is gone without a word; accepted sockets inherit the options."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, QUIET_SECONDS)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_SECONDS)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
    milliseconds = 1000 * (QUIET_SECONDS + PROBE_SECONDS * PROBES)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)  # of a reply nobody acknowledges
