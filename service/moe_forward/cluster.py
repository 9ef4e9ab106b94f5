"""Ray: one of our own on loopback, or one that runs already and that we join."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import ray

from moe_forward.errors import StartError

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 80 << 20
"""Ray's minimum; no tensor ever passes through it."""

SEE_ALL_GPUS = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
"""Set to 1 where a rank runs, it sees every GPU of its host and not only its own."""

NICENESS = "RAY_worker_niceness"
"""Ray gives what it starts 15, so as to get its own turn; but our engine and ranks are what clients wait for."""

REACH_SECONDS = 10.0
"""How long a running cluster may take to answer; ray.init would wait for ever."""

# Asks as somebody without a token would. Ray reads its settings while it is imported, hence a process of its own.
_ASK_WITHOUT_TOKEN = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1])
except AuthenticationError:
    print("refused")
else:
    print("let in")
"""


@contextlib.contextmanager
def own_ray(ranks: int, device: str) -> Iterator[None]:
    """Run a Ray of our own, without dashboard, while the block runs.

    `runtime_folder` made its token and keeps it on loopback.
    device: cpu or cuda; on cuda each rank has a GPU of its own and sees the others, to reach their memory.
    """
    os.environ[SEE_ALL_GPUS] = "1"  # read by the processes that Ray starts
    os.environ.setdefault(NICENESS, "0")
    session: Path | None = None
    try:
        with _sigterm_deferred(), _sigterm_blocked():
            context = ray.init(
                address="local",
                num_cpus=ranks,  # places for actors, not cores
                num_gpus=ranks if device == "cuda" else 0,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level=logging.WARNING,
                configure_logging=False,
            )
            session = Path(context.address_info["session_dir"])  # type: ignore[attr-defined]
        yield
    finally:
        _stop_own_ray()
        if session is not None:
            _remove_session(session)


@contextlib.contextmanager
def joined_ray(address: str, allow_without_token: bool) -> Iterator[None]:
    """Be a driver of a running cluster while the block runs; the cluster goes on afterwards, without our actors.

    address: auto, or host:port of its GCS. allow_without_token: also where everybody may join it.
    Raises: StartError.
    """
    if address != "auto":
        _see_that_somebody_listens(address)
    try:
        with _sigterm_handler_kept():
            ray.init(
                address=address,
                # Names of actors are this service's own, however many services the cluster has.
                namespace=f"moe-forward-{secrets.token_hex(4)}",
                logging_level=logging.WARNING,
                configure_logging=False,
            )
    except Exception as error:  # Ray raises what its many parts raise
        raise StartError(
            f"ray_address {address}: cannot join this Ray cluster: {_first_line(error)} (is this host one of its "
            "nodes, and is the cluster's token in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token?)"
        ) from error
    try:
        _see_that_the_node_is_here(address)
        if not allow_without_token:
            _see_that_a_token_is_asked_for(ray.get_runtime_context().gcs_address)
        yield
    finally:
        ray.shutdown()


def cluster_gpus() -> int:
    """Return how many GPUs the cluster has."""
    return int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]


def _see_that_somebody_listens(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
    except OSError as error:
        raise StartError(f"ray_address {address}: no Ray cluster answers there: {error}") from error


def _see_that_the_node_is_here(address: str) -> None:
    here = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    family = socket.AF_INET6 if ":" in here else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((here, 0))
        except OSError as error:
            raise StartError(
                f"ray_address {address}: Ray takes this process for one of its node {here}, which is not this host "
                f"({error.strerror}): serve runs on a node of the cluster"
            ) from error


def _see_that_a_token_is_asked_for(gcs_address: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK_WITHOUT_TOKEN, gcs_address],
            env=environment | {"RAY_AUTH_MODE": "disabled"},
            capture_output=True,
            text=True,
            timeout=6 * REACH_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise StartError(f"Ray at {gcs_address} does not answer") from error
    if "let in" in done.stdout:
        raise StartError(
            f"Ray at {gcs_address} lets everybody in, who could then run programs on all of its hosts: start it with "
            "RAY_AUTH_MODE=token, or set allow_ray_without_token: true where only the right ones reach it"
        )
    if "refused" not in done.stdout:
        raise StartError(f"cannot find out whether Ray at {gcs_address} asks for a token: {done.stderr.strip()[-500:]}")


@contextlib.contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Start processes that SIGTERM does not end, as Ray does it with SIGINT.

    systemd and `timeout` send it to every process of ours. Ray's would end at once, and the ranks with them, while
    this one still answers what is in flight.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _sigterm_deferred() -> Iterator[None]:
    """Let SIGTERM's handler be called after the block, when the signal comes while it runs.

    In the middle of ray.init its exception would be lost, or leave a Ray that nobody can stop. To block the signal does
    not suffice: any other thread takes it, and Python then calls the handler in this one.
    """
    came: list[int] = []
    handler = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with _sigterm_handler_kept():
            yield
    finally:
        signal.signal(signal.SIGTERM, handler)
    if came:
        signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def _sigterm_handler_kept() -> Iterator[None]:
    """Let nobody replace SIGTERM's handler while the block runs, as ray.init does: by one that exits with 15.

    Prevented and not undone afterwards, since joining a cluster lasts, and the signal may come meanwhile.
    """
    set_handler = signal.signal

    def keep(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number == signal.SIGTERM else set_handler(number, handler)

    with mock.patch.object(signal, "signal", keep):
        yield


def _remove_session(session: Path) -> None:
    """Remove what our own Ray, which has ended, wrote on its disk, and the name it has there for the latest one."""
    shutil.rmtree(session, ignore_errors=True)
    latest = session.parent / "session_latest"
    with contextlib.suppress(OSError):  # not there, or already another's that started since
        if latest.readlink() == session:
            latest.unlink()


def _stop_own_ray() -> None:
    """End Ray and every actor in it; returns when their processes are gone."""
    children = _descendants(os.getpid())
    # Ray ends each of its processes by SIGTERM, which they do not get, and would wait a second for each.
    with mock.patch.object(subprocess.Popen, "terminate", subprocess.Popen.kill):
        ray.shutdown()
    for pidfd in children:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [], REACH_SECONDS)
        os.close(pidfd)


def _descendants(pid: int) -> list[int]:
    """Return a pidfd of every process that `pid` started, and those started in turn."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:  # grows while it is walked
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    pidfds = []
    for child in found[1:]:
        with contextlib.suppress(ProcessLookupError):
            pidfds.append(os.pidfd_open(child))
    return pidfds


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
