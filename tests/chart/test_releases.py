"""A release is installed, tested, changed, rolled back and removed by a real helm, against a stand-in for the API
server (kubernetes_api.py). It shows that what helm does with the chart works out; not that Kubernetes admits, places
or runs it.
"""

from __future__ import annotations

import base64
import json
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn
import yaml

from .charts import CHART, ROOT, Document, Helm, file_arguments
from .kubernetes_api import Cluster, create_api

SPACE = "experts"


@dataclass(frozen=True)
class Release:
    """A helm that talks to the stand-in."""

    helm: Helm
    cluster: Cluster
    environment: dict[str, str]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.helm.run(*arguments, "--namespace", SPACE, environment=self.environment)

    def done(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def config(self) -> Document:
        found: Document = json.loads(self.cluster.of_kind("ConfigMap")["demo-moe-forward"]["data"]["config.json"])
        return found

    def token(self) -> str:
        return base64.b64decode(self.cluster.of_kind("Secret")["demo-moe-forward-ray"]["data"]["auth_token"]).decode()


@pytest.fixture
def release(each_helm: Helm, tmp_path: Path) -> Iterator[Release]:
    cluster = Cluster()
    settings = uvicorn.Config(
        create_api(cluster), port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
            assert thread.is_alive()
        port = server.servers[0].sockets[0].getsockname()[1]
        one = {"name": "stand-in"}
        kubeconfig = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "stand-in",
            "clusters": [{**one, "cluster": {"server": f"http://127.0.0.1:{port}"}}],
            "contexts": [{**one, "context": {"cluster": "stand-in", "user": "stand-in"}}],
            "users": [{**one, "user": {}}],
        }
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
        folders = {f"HELM_{name}_HOME": str(tmp_path / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
        environment = {"KUBECONFIG": str(tmp_path / "kubeconfig"), "HOME": str(tmp_path), **folders}
        yield Release(each_helm, cluster, environment)
    finally:
        server.should_exit = True
        thread.join(10)


def test_a_raycluster_is_installed_changed_rolled_back_and_removed(release: Release) -> None:
    workers = ("--set", "rayCluster.workers.replicas=1", "--set", "gpu.enabled=true")
    notes = release.done("install", "demo", str(CHART), *workers)
    assert "get raycluster demo-moe-forward" in notes
    (cluster,) = release.cluster.of_kind("RayCluster").values()
    assert [group["replicas"] for group in cluster["spec"]["workerGroupSpecs"]] == [1]
    assert release.config()["ranks"] == 16
    token = release.token()

    release.done("upgrade", "demo", str(CHART), "--set", "config.max_wait_us=300,gpu.enabled=true")
    (cluster,) = release.cluster.of_kind("RayCluster").values()
    assert "workerGroupSpecs" not in cluster["spec"]
    assert (release.config()["ranks"], release.config()["max_wait_us"]) == (8, 300)
    assert release.token() == token  # pods that go on running hold it

    release.done("rollback", "demo", "1")
    assert "max_wait_us" not in release.config()
    assert release.config()["ranks"] == 16
    assert release.token() == token
    history = json.loads(release.done("history", "demo", "-o", "json"))
    assert [entry["status"] for entry in history] == ["superseded", "superseded", "deployed"]

    release.done("uninstall", "demo")
    assert release.cluster.objects == {}


def test_helm_test_runs_both_pods_and_believes_them(release: Release) -> None:
    release.done("install", "demo", str(CHART), *file_arguments(ROOT / "deploy/values/cpu.yaml"))
    said = release.done("test", "demo")
    made = [at.name for change, at, _ in release.cluster.changes if (change, at.kind) == ("ADDED", "Pod")]
    assert made == ["demo-moe-forward-test-ready", "demo-moe-forward-test-forward"]
    assert said.count("Succeeded") == 2
    assert release.cluster.of_kind("Pod") == {}  # they are removed when they went well
    release.cluster.pod_phase = "Failed"
    assert release.run("test", "demo").returncode != 0


def test_a_change_of_kind_replaces_the_workload(release: Release) -> None:
    release.done("install", "demo", str(CHART), "--set", "workload.kind=StatefulSet")
    assert release.cluster.of_kind("Service").keys() == {"demo-moe-forward", "demo-moe-forward-pods"}
    release.done("upgrade", "demo", str(CHART), "--set", "workload.kind=RayCluster")
    assert release.cluster.of_kind("StatefulSet") == {}
    assert [*release.cluster.of_kind("RayCluster")] == ["demo-moe-forward"]
    assert [*release.cluster.of_kind("Service")] == ["demo-moe-forward"]
    assert len(release.token()) >= 32


def test_a_refused_upgrade_leaves_the_release_alone(release: Release) -> None:
    release.done("install", "demo", str(CHART))
    before = {at: document["metadata"]["resourceVersion"] for at, document in release.cluster.objects.items()}
    refused = release.run("upgrade", "demo", str(CHART), "--set", "gpu.enabled=true,config.device=cpu")
    assert refused.returncode != 0
    assert "config.device" in refused.stderr
    assert {at: document["metadata"]["resourceVersion"] for at, document in release.cluster.objects.items()} == before
