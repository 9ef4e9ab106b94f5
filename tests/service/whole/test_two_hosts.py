"""Ranks on another host, over a Ray that runs already: the same bits, and a cable that can be pulled out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import CONFIG
from .forwards import Forward, as_safetensors, post, read_output
from .hosts import Hosts, RayCluster, make_hosts, network_of, on_host, visiting
from .local import Local
from .processes import listening
from .running import Service

pytestmark = pytest.mark.service

CPUS = 2
RANKS = 3
STEP_TIMEOUT_SECONDS = 20.0
ALIVE_ACTORS = "sum(actor['State'] == 'ALIVE' for actor in actors().values())"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with closing(make_hosts()) as made:
        yield made


@pytest.fixture(scope="module")
def cluster(hosts: Hosts) -> Iterator[RayCluster]:
    with closing(RayCluster(hosts, CPUS)) as made:
        made.wait_complete(hosts.first)
        yield made


def serve(hosts: Hosts, cluster: RayCluster, model: Path, ranks: int, **config: Any) -> Service:
    settings = {**CONFIG, "ray_address": cluster.address, "step_timeout_seconds": STEP_TIMEOUT_SECONDS, **config}
    return Service(model, ranks, settings, environment=cluster.environment, runner=on_host(hosts.first, []))


@pytest.fixture(scope="module")
def spread(hosts: Hosts, cluster: RayCluster, tiny: Path) -> Iterator[Service]:
    """A service on the first host; its ranks do not fit there."""
    with closing(serve(hosts, cluster, tiny, RANKS)) as service, visiting(hosts.first):
        yield service.wait_ready()


def forwards() -> list[Forward]:
    generator = torch.Generator().manual_seed(8)
    return [Forward(1 + n % 3, torch.randn(tokens, 256, generator=generator)) for n, tokens in enumerate((1, 7, 300))]


def answers_right(service: Service, local: Local) -> bool:
    sent = forwards()
    replies = [post(service.url, as_safetensors(forward)) for forward in sent]
    outputs = [read_output(reply) for reply in replies]
    return all(torch.equal(mine, served) for mine, served in zip(local.outputs(sent), outputs, strict=True))


def test_ranks_of_two_hosts_give_the_bits_of_one_process(spread: Service, local: Local) -> None:
    networks = [network_of(pid) for pid in spread.rank_pids()]
    mine = network_of(spread.process.pid)
    assert len(set(networks)) == 2
    assert networks == sorted(networks, key=lambda network: network != mine), "a host's ranks are not consecutive"
    assert answers_right(spread, local)


def test_the_door_for_the_other_host_is_on_one_address(spread: Service, hosts: Hosts, cluster: RayCluster) -> None:
    (gateway,) = [pid for pid, line in cluster.processes().items() if line.startswith("ray::GatewayProcess")]
    addresses = [str(address) for address, _ in listening(gateway)]
    assert addresses.count(hosts.addresses[hosts.first]) == 1
    assert len(addresses) == 2, "the other one is Ray's own, of every worker"


def test_a_second_service_of_the_same_ray_disturbs_nothing(
    spread: Service, hosts: Hosts, cluster: RayCluster, tiny: Path, local: Local
) -> None:
    generation, pids = spread.get("/v1/placement").json()["generation"], spread.rank_pids()
    with closing(serve(hosts, cluster, tiny, 1)) as other:
        other.wait_ready()
        assert answers_right(other, local)
        assert answers_right(spread, local)
        assert other.terminate() == 0, other.log
    assert answers_right(spread, local)
    assert spread.get("/v1/placement").json()["generation"] == generation
    assert spread.rank_pids() == pids


def test_a_pulled_cable_is_a_lost_rank_and_the_service_comes_back(spread: Service, hosts: Hosts, local: Local) -> None:
    before = spread.get("/v1/placement").json()["generation"]
    hosts.plug(False)
    try:
        started = time.monotonic()
        reply = post(spread.url, as_safetensors(forwards()[1]))
        assert reply.status_code == 503
        assert reply.json()["code"] == "rank_lost"
        assert int(reply.headers["retry-after"]) >= 1
        assert time.monotonic() - started < STEP_TIMEOUT_SECONDS, "the step's timeout noticed it, not the connection"
        assert spread.get("/v2/health/live").status_code == 200
    finally:
        hosts.plug(True)
    spread.wait_ready_again()
    assert spread.get("/v1/placement").json()["generation"] > before
    assert answers_right(spread, local)


def test_the_ray_goes_on_without_actors_of_ours(spread: Service, hosts: Hosts, cluster: RayCluster) -> None:
    assert int(cluster.ask(hosts.first, ALIVE_ACTORS)) >= RANKS + 2
    assert spread.terminate() == 0, spread.log
    assert spread.runtime_folders == []
    assert "Traceback" not in spread.log, spread.log
    deadline = time.monotonic() + 30.0
    while (alive := cluster.ask(hosts.first, ALIVE_ACTORS)) != "0":
        assert time.monotonic() < deadline, alive
    assert cluster.ask(hosts.first, "sum(node['Alive'] for node in ray.nodes())") == "2"
