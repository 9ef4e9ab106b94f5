"""The composition: every file it mounts is there, and the service is as closed as in the chart."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_forward.config import load_config
from moe_forward.main import _parser

from .dockerfile import read

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker" / "compose.yaml"
SERVED = ("moe-forward-cpu", "moe-forward-gpu")


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


def expanded(text: str) -> str:
    """With the default of every variable."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def mounts(service: dict[str, Any]) -> list[tuple[str, str]]:
    """Sources and targets of bind mounts."""
    parts = [expanded(volume).split(":") for volume in service.get("volumes", [])]
    return [(source, target) for source, target, *_ in parts if source.startswith((".", "/"))]


def test_what_is_mounted_from_the_repository_exists(services: dict[str, Any]) -> None:
    sources = [source for one in services.values() for source, _ in mounts(one) if source.startswith(".")]
    assert len(sources) == 6
    for source in sources:
        assert (COMPOSE.parent / source).exists(), source


@pytest.mark.parametrize("name", SERVED)
def test_the_service_is_built_from_a_target_and_configured_by_a_file_that_is_valid(
    services: dict[str, Any], name: str
) -> None:
    service = services[name]
    assert service["build"]["target"] in read(ROOT / "docker/Dockerfile")[1]
    ((source, target),) = [mount for mount in mounts(service) if mount[1].startswith("/etc/moe-forward")]
    options = vars(_parser().parse_args(["serve", *map(expanded, service["command"])]))
    assert str(options.pop("config")) == target
    del options["run"]
    config = load_config(COMPOSE.parent / source, options)
    assert config.host == "0.0.0.0"
    assert service["ports"] == [f"127.0.0.1:{config.port}:{config.port}"]
    grace = int(service["stop_grace_period"].removesuffix("s"))
    assert grace > config.drain_timeout_seconds


@pytest.mark.parametrize("name", SERVED)
def test_the_service_is_as_closed_as_in_the_chart(services: dict[str, Any], name: str) -> None:
    service = services[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {line.partition(":")[0] for line in service["tmpfs"]} == {"/tmp", "/var/cache/moe-forward"}


def test_one_profile_starts_by_default(services: dict[str, Any]) -> None:
    (default,) = re.findall(r"^COMPOSE_PROFILES=(\w+)$", (COMPOSE.parent / ".env").read_text(), re.MULTILINE)
    assert [name for name in SERVED if default in services[name]["profiles"]] == ["moe-forward-cpu"]
    assert not any("profiles" in services[name] for name in ("prometheus", "grafana"))


def test_prometheus_and_grafana_find_each_other_and_the_service(services: dict[str, Any]) -> None:
    scrape = yaml.safe_load((ROOT / "deploy/observability/prometheus.yml").read_text())
    (static,) = scrape["scrape_configs"][0]["static_configs"]
    for name in SERVED:
        assert static["targets"][0].split(":")[0] in services[name]["networks"]["default"]["aliases"]
    datasource = next((ROOT / "deploy/observability/grafana/datasources").glob("*.yaml"))
    assert yaml.safe_load(datasource.read_text())["datasources"][0]["url"] == "http://prometheus:9090"
    (rules,) = scrape["rule_files"]
    targets = dict(reversed(mount) for mount in mounts(services["prometheus"]))
    assert f"/etc/prometheus/{rules.partition('/')[0]}" in targets
    provider = next((ROOT / "deploy/observability/grafana/dashboards").glob("*.yaml"))
    path = yaml.safe_load(provider.read_text())["providers"][0]["options"]["path"]
    assert path in dict(reversed(mount) for mount in mounts(services["grafana"]))
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / "helm/moe-forward/dashboards" / Path(home).name).is_file()


def test_nothing_is_published_beyond_loopback(services: dict[str, Any]) -> None:
    published = [port for service in services.values() for port in service["ports"]]
    assert len(published) == 4
    assert all(port.startswith("127.0.0.1:") for port in published)


@pytest.mark.parametrize("name", SERVED)
def test_compose_itself_reads_it(services: dict[str, Any], name: str) -> None:
    (profile,) = services[name]["profiles"]
    docker = shutil.which("docker")
    if docker is None:
        pytest.skip("no docker command")
    if subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode != 0:
        pytest.skip("docker has no compose plugin")
    done = subprocess.run(
        [docker, "compose", "-f", str(COMPOSE), "--profile", profile, "config", "--services"],
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["grafana", name, "prometheus"]
