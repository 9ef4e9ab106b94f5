"""A bad network between two hosts, each with a rank: network namespaces with a cable, and Ray over it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...service.whole.hosts import Hosts, RayCluster, on_host, visiting
from ...service.whole.running import Service
from ..scene import CONFIG, Fault, Scene, in_thread

RANKS = 2
CPUS = 1
"""Places for ranks on each host: one."""
BAD_SECONDS = 8.0
NOTICE_SECONDS = 30.0


@contextlib.contextmanager
def on_two_hosts(model: Path, config: Mapping[str, Any]) -> Iterator[Service]:
    """Run a service with a rank on each of two hosts; this thread's sockets are on the first one meanwhile."""
    with contextlib.closing(Hosts()) as hosts, contextlib.closing(RayCluster(hosts, CPUS)) as cluster:
        cluster.wait_complete(hosts.first)
        with starting(hosts, cluster, model, config) as service:
            yield service


@contextlib.contextmanager
def starting(hosts: Hosts, cluster: RayCluster, model: Path, config: Mapping[str, Any]) -> Iterator[Service]:
    """Run a service over a Ray of two hosts."""
    settings = {**CONFIG, "ray_address": cluster.address, **config}
    service = Service(model, RANKS, settings, environment=cluster.environment, runner=on_host(hosts.first, []))
    with contextlib.closing(service), visiting(hosts.first):
        yield service.wait_ready()


def other_host(scene: Scene) -> tuple[str, str]:
    """Return the host of the last rank, and its end of the cable."""
    pid = scene.service.rank_pids()[-1]
    host = _run("ip", "netns", "identify", str(pid)).strip()
    links = _run("ip", "-n", host, "-br", "link").splitlines()
    (cable,) = [line.split("@")[0] for line in links if "@" in line]
    return host, cable


def pull_the_cable(scene: Scene) -> None:
    """Pull it out until that is noticed."""
    host, cable = other_host(scene)
    scene.undo.callback(_run, "ip", "-n", host, "link", "set", cable, "up")
    scene.now()
    _run("ip", "-n", host, "link", "set", cable, "down")
    give_up = time.monotonic() + NOTICE_SECONDS
    while scene.service.get("/v2/health/ready").status_code == 200:
        assert time.monotonic() < give_up, f"a pulled cable was not noticed in {NOTICE_SECONDS:g} s"
        time.sleep(0.05)
    _run("ip", "-n", host, "link", "set", cable, "up")


def losing(share: float) -> Callable[[Scene], None]:
    """Drop a share of the packets on the cable, either way, for some seconds."""

    def strike(scene: Scene) -> None:
        host, cable = other_host(scene)
        drop = ("-m", "statistic", "--mode", "random", "--probability", str(share), "-j", "DROP")
        rules = (("INPUT", "-i", cable, *drop), ("OUTPUT", "-o", cable, *drop))
        scene.now()
        for rule in rules:
            _run(*on_host(host, ["iptables", "-A", *rule]))
        time.sleep(BAD_SECONDS)
        for rule in rules:
            _run(*on_host(host, ["iptables", "-D", *rule]))

    return strike


def cannot_make_hosts() -> str | None:
    """Return why there can be no two hosts here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "iptables") if shutil.which(program) is None]
    return f"needs {' and '.join(missing)}" if missing else None


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


FAULTS = (
    Fault(
        "cable-pulled",
        in_thread(pull_the_cable),
        "the cable between two hosts is pulled out",
        start=on_two_hosts,
        unavailable=cannot_make_hosts,
    ),
    *(
        Fault(
            f"packets-lost-{percent}",
            in_thread(losing(percent / 100)),
            f"{percent} % of the packets between two hosts are lost, for {BAD_SECONDS:g} s",
            after="either",
            start=on_two_hosts,
            unavailable=cannot_make_hosts,
        )
        for percent in (5, 30)
    ),
)
