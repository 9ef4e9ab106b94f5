"""Hosts of the tests' own on this machine: network namespaces with a cable between them, and a Ray node in each."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from .processes import alive, find_marked

MARK = "MOE_FORWARD_TEST_CLUSTER"
START_SECONDS = 60.0
GCS_PORT = 6401

_CLONE_NEWNET = 0x40000000
_SAME_NETWORK = Path("/proc/thread-self/ns/net")
_NETWORKS = Path("/run/netns")


class Hosts:
    """Two hosts, `first` and `second`, with addresses of their own and one cable between them."""

    def __init__(self) -> None:
        tag = secrets.token_hex(3)
        self.first, self.second = f"moe-{tag}-1", f"moe-{tag}-2"
        self.addresses = {self.first: "10.213.77.1", self.second: "10.213.77.2"}
        self._cables = {self.first: f"mf{tag}1", self.second: f"mf{tag}2"}
        try:
            for host in self.addresses:
                _ip("netns", "add", host)
            one, other = self._cables.values()
            _ip("link", "add", one, "netns", self.first, "type", "veth", "peer", "name", other, "netns", self.second)
            for host, address in self.addresses.items():
                _ip("-n", host, "addr", "add", f"{address}/24", "dev", self._cables[host])
                _ip("-n", host, "link", "set", "lo", "up")
                _ip("-n", host, "link", "set", self._cables[host], "up")
            for host, other in ((self.first, self.second), (self.second, self.first)):
                # Ray finds its own address by the way to the internet, and looks names up for seconds where is none.
                _ip("-n", host, "route", "add", "default", "via", self.addresses[other])
        except subprocess.CalledProcessError as error:
            self.close()
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")

    def plug(self, connected: bool) -> None:
        """Put the cable between the hosts in, or pull it out."""
        _ip("-n", self.second, "link", "set", self._cables[self.second], "up" if connected else "down")

    def close(self) -> None:
        """Remove them; processes in them keep a network that leads nowhere."""
        for host in self.addresses:
            subprocess.run(["ip", "netns", "delete", host], capture_output=True, check=False)


def make_hosts() -> Hosts:
    """Make two hosts; skips the test where that is not permitted."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the program ip (iproute2)")
    return Hosts()


def on_host(host: str, command: list[str]) -> list[str]:
    """Return the command line that runs `command` on a host."""
    return ["ip", "netns", "exec", host, *command]


@contextlib.contextmanager
def visiting(host: str) -> Iterator[None]:
    """Make this thread's new sockets on a host."""
    libc = ctypes.CDLL(None, use_errno=True)
    with _SAME_NETWORK.open() as home, (_NETWORKS / host).open() as there:
        _enter(libc, there.fileno())
        try:
            yield
        finally:
            _enter(libc, home.fileno())


def network_of(pid: int) -> str:
    """Return what two processes of the same host have in common."""
    return os.readlink(f"/proc/{pid}/ns/net")


class RayCluster:
    """A Ray that an operator started on the hosts. cpus: places for ranks on each host."""

    def __init__(self, hosts: Hosts, cpus: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))
        self.address = f"{hosts.addresses[hosts.first]}:{GCS_PORT}"
        self._mark = uuid.uuid4().hex
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
        common = [f"--num-cpus={cpus}", "--object-store-memory=80000000", "--disable-usage-stats", "--block"]
        self._nodes = [
            self._node(hosts, hosts.first, ["--head", f"--port={GCS_PORT}", "--include-dashboard=false", *common]),
            self._node(hosts, hosts.second, [f"--address={self.address}", *common]),
        ]

    def wait_complete(self, host: str) -> None:
        """Wait until both nodes are there; `host` is one of theirs."""
        deadline = time.monotonic() + START_SECONDS
        while self.ask(host, "sum(node['Alive'] for node in ray.nodes())") != "2":
            assert time.monotonic() < deadline, self.log
            time.sleep(0.5)

    def ask(self, host: str, expression: str) -> str:
        """Evaluate a Python expression in a driver on a host; empty where it cannot join the cluster."""
        script = (
            "import ray; from ray._private.state import actors\n"
            f"ray.init(address={self.address!r}, logging_level='ERROR', log_to_driver=False); print({expression})"
        )
        done = subprocess.run(
            on_host(host, [sys.executable, "-c", script]),
            env={**_environment(), **self.environment},
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )
        return done.stdout.strip()

    def processes(self) -> dict[int, str]:
        """Every living process of it, workers too: pid -> command line."""
        return find_marked(MARK, self._mark)

    @property
    def log(self) -> str:
        """What the nodes said."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        """End every process of it."""
        for node in self._nodes:
            node.terminate()
        for pid in self.processes():
            if alive(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for node in self._nodes:
            node.wait(START_SECONDS)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _node(self, hosts: Hosts, host: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        address = hosts.addresses[host]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={address}"]
        with (self.folder / f"{address}.log").open("wb") as log:
            return subprocess.Popen(
                on_host(host, [*ray, f"--temp-dir={self.folder / address}", *arguments]),
                env={**_environment(), **self.environment, MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )


def _environment() -> dict[str, str]:
    """This process' variables, but for the one by which other tests keep gloo on loopback."""
    return {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)


def _enter(libc: ctypes.CDLL, network: int) -> None:
    if libc.setns(network, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
