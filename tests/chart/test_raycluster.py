"""A RayCluster: one service in the head pod, ranks on every host, found and joined through KubeRay."""

from __future__ import annotations

import base64

import pytest

from .charts import CHART, Document, Helm, Manifests, config, container, mounts, only, pod_templates

GPUS = ("--set", "gpu.enabled=true", "--set", "gpu.count=8")


def workers(replicas: int, hosts: int = 1) -> tuple[str, str]:
    return "--set", f"rayCluster.workers.replicas={replicas},rayCluster.workers.numOfHosts={hosts}"


def spec(manifests: Manifests) -> Document:
    found: Document = only(manifests, "RayCluster")["spec"]
    return found


def start_parameters(manifests: Manifests) -> dict[str, dict[str, str]]:
    """`ray start`'s parameters of head and workers."""
    cluster = spec(manifests)
    groups = cluster.get("workerGroupSpecs", [])
    return {"head": cluster["headGroupSpec"]["rayStartParams"]} | {g["groupName"]: g["rayStartParams"] for g in groups}


def test_it_is_the_default(helm: Helm) -> None:
    manifests = helm.template()
    assert [kind for kind, _ in manifests if kind in ("RayCluster", "StatefulSet", "Deployment")] == ["RayCluster"]
    assert "workerGroupSpecs" not in spec(manifests)


@pytest.mark.parametrize(
    ("settings", "head", "ranks", "total"),
    [
        ((), ("2", "0"), None, 2),
        (workers(1), ("2", "0"), ("2", "0"), 4),
        (GPUS, ("8", "8"), None, 8),
        ((*GPUS, *workers(1)), ("8", "8"), ("8", "8"), 16),
        ((*GPUS, *workers(2, 2), "--set", "rayCluster.headGpus=false"), ("0", "0"), ("8", "8"), 32),
    ],
    ids=["cpu", "cpu-and-worker", "1x8", "2x8", "cpu-head-4x8"],
)
def test_there_is_a_place_for_every_rank_and_no_more(
    helm: Helm, settings: tuple[str, ...], head: tuple[str, str], ranks: tuple[str, str] | None, total: int
) -> None:
    manifests = helm.template(*settings)
    parameters = start_parameters(manifests)
    found = {role: (given["num-cpus"], given["num-gpus"]) for role, given in parameters.items()}
    assert found == {"head": head} | ({"ranks": ranks} if ranks else {})
    # Said and not left to be counted: a head that starts first would count its own GPUs only.
    assert config(manifests)["ranks"] == total
    asked = [
        container(template["spec"])["resources"]["limits"].get("nvidia.com/gpu", 0)
        for template in pod_templates(manifests).values()
    ]
    assert asked == [int(gpus) for _, gpus in found.values()]


def test_ranks_can_be_fewer_than_gpus(helm: Helm) -> None:
    assert config(helm.template(*GPUS, "--set", "config.ranks=4"))["ranks"] == 4


def test_the_number_of_hosts_is_fixed(helm: Helm) -> None:
    (group,) = spec(helm.template(*GPUS, *workers(2, 4)))["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"], group["numOfHosts"]) == (2, 2, 2, 4)
    assert spec(helm.template())["enableInTreeAutoscaling"] is False


def test_the_service_joins_the_ray_of_its_pod(helm: Helm) -> None:
    manifests = helm.template(*workers(1))
    templates = pod_templates(manifests)
    assert config(manifests)["ray_address"] == "auto"
    assert only(manifests, "RayCluster")["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"
    scripts = {role: container(template["spec"])["args"][0] for role, template in templates.items()}
    commands = [container(template["spec"])["command"] for template in templates.values()]
    assert commands == [["tini", "--", "/bin/bash", "-c"]] * 2
    assert scripts == {role: (CHART / "files" / f"start-{role}.sh").read_text().strip() + "\n" for role in scripts}


def test_the_head_waits_for_workers_that_bring_gpus(helm: Helm) -> None:
    def files(*settings: str) -> set[str]:
        return {*helm.template(*settings)["ConfigMap", "demo-moe-forward"]["data"]}

    assert files(*GPUS, *workers(1)) == {"config.json", "wait_for_gpus.py"}
    assert files(*GPUS) == files(*workers(1)) == {"config.json"}


def test_rays_dashboard_is_off_and_loopback_only(helm: Helm) -> None:
    head = start_parameters(helm.template())["head"]
    assert (head["include-dashboard"], head["dashboard-host"]) == ("false", "127.0.0.1")
    assert all(isinstance(value, str) for value in head.values())


def test_workers_find_a_head_that_is_not_ready(helm: Helm) -> None:
    service = spec(helm.template())["headGroupSpec"]["headService"]["spec"]
    assert (service["publishNotReadyAddresses"], service["clusterIP"], service["type"]) == (True, "None", "ClusterIP")


def test_every_ray_process_needs_the_token(helm: Helm) -> None:
    manifests = helm.template(*workers(1), "--set", "rayCluster.existingTokenSecret=ours")
    assert spec(manifests)["authOptions"] == {"mode": "token", "secretName": "ours"}
    assert ("Secret", "demo-moe-forward-ray") not in manifests
    for template in pod_templates(manifests).values():
        environment = {entry["name"]: entry for entry in container(template["spec"])["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        reference = environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert reference == {"name": "ours", "key": "auth_token"}


def test_a_token_is_made_where_none_is_given(helm: Helm) -> None:
    manifests = helm.template()
    token = base64.b64decode(manifests["Secret", "demo-moe-forward-ray"]["data"]["auth_token"])
    assert len(token) >= 32
    assert spec(manifests)["authOptions"]["secretName"] == "demo-moe-forward-ray"


def test_workers_hold_no_secret_of_the_front_end(helm: Helm) -> None:
    secrets = "apiKeys.existingSecret=a,adminToken.existingSecret=b,tls.existingSecret=c"
    templates = pod_templates(helm.template(*workers(1), "--set", secrets))
    held = {
        role: {volume["secret"]["secretName"] for volume in template["spec"]["volumes"] if "secret" in volume}
        for role, template in templates.items()
    }
    assert held == {"head": {"a", "b", "c"}, "worker": set()}
    assert "/etc/moe-forward/config" not in mounts(templates["worker"]["spec"])


def test_a_worker_is_probed_at_its_raylet(helm: Helm) -> None:
    manifests = helm.template(*workers(1))
    worker = container(pod_templates(manifests)["worker"]["spec"])
    ports = {port["name"]: str(port["containerPort"]) for port in worker["ports"]}
    assert ports["raylet"] == start_parameters(manifests)["ranks"]["node-manager-port"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert worker[probe]["tcpSocket"] == {"port": "raylet"}


def test_pods_with_gpus_share_a_named_nvlink_domain(helm: Helm) -> None:
    key = "placement.nvlinkDomainKey=nvidia.com/gpu.clique"
    templates = pod_templates(helm.template(*GPUS, *workers(2), "--set", key, "--set", "rayCluster.headGpus=false"))
    assert "affinity" not in templates["head"]["spec"]
    (term,) = templates["worker"]["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "nvidia.com/gpu.clique"
    (role,) = term["labelSelector"]["matchExpressions"]
    assert role["values"] == ["worker"]
    # The first pod has no other to be near: it must match its own term, or none would ever be placed.
    labels = templates["worker"]["metadata"]["labels"]
    assert term["labelSelector"]["matchLabels"].items() <= labels.items()
    assert labels[role["key"]] in role["values"]


def test_a_domain_that_is_named_is_a_node_selector(helm: Helm) -> None:
    settings = "placement.nvlinkDomainKey=clique,placement.nvlinkDomain=7,nodeSelector.pool=gpu"
    for template in pod_templates(helm.template(*GPUS, *workers(1), "--set-string", settings)).values():
        assert template["spec"]["nodeSelector"] == {"clique": "7", "pool": "gpu"}
        assert "affinity" not in template["spec"]


def test_rdma_devices_and_locked_memory_go_to_pods_with_gpus(helm: Helm) -> None:
    settings = ("--set", "rdma.enabled=true,rdma.resourceName=rdma/ib,rdma.count=2,rayCluster.headGpus=false")
    templates = pod_templates(helm.template(*GPUS, *workers(1), *settings))
    head, worker = (container(templates[role]["spec"]) for role in ("head", "worker"))
    assert worker["resources"]["limits"]["rdma/ib"] == 2
    assert worker["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert "rdma/ib" not in head["resources"]["limits"]
    assert "add" not in head["securityContext"]["capabilities"]


def test_the_hosts_network_is_an_option_for_pods_with_gpus(helm: Helm) -> None:
    templates = pod_templates(helm.template(*GPUS, *workers(1), "--set", "hostNetwork=true,rayCluster.headGpus=false"))
    assert "hostNetwork" not in templates["head"]["spec"]
    assert templates["worker"]["spec"]["hostNetwork"] is True
    assert templates["worker"]["spec"]["dnsPolicy"] == "ClusterFirstWithHostNet"


@pytest.mark.parametrize(("unavailable", "available"), [(1, 2), (0, 3), (9, 0)])
def test_a_disruption_budget_counts_the_pods_of_the_cluster(helm: Helm, unavailable: int, available: int) -> None:
    settings = ("--set", f"podDisruptionBudget.maxUnavailable={unavailable}")
    budget = only(helm.template(*GPUS, *workers(2), *settings), "PodDisruptionBudget")["spec"]
    assert budget["minAvailable"] == available
    assert "maxUnavailable" not in budget
