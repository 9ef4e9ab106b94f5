"""What every pod has, whichever workload it belongs to: locked down, probed, drained, restarted by a change."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from moe_forward.config import Config

from .charts import ROOT, Document, Helm, config, container, front_end, mounts, of_kind, only, pod_templates

KINDS = ("RayCluster", "StatefulSet", "Single")
WITH_A_WORKER = ("--set", "rayCluster.workers.replicas=1")


def every_pod(helm: Helm) -> dict[str, Document]:
    """A pod of each role."""
    templates = pod_templates(helm.template(*WITH_A_WORKER)) | pod_templates(helm.template(*of_kind("StatefulSet")))
    assert templates.keys() == {"head", "worker", "server"}
    return {role: template["spec"] for role, template in templates.items()}


def test_every_pod_is_locked_down_and_has_what_the_service_writes_to(helm: Helm) -> None:
    for pod in every_pod(helm).values():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        context = container(pod)["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {"/tmp", "/var/cache/moe-forward"} <= mounts(pod).keys()
        assert mounts(pod)["/dev/shm"]["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("kind", KINDS)
def test_probes_ask_the_health_routes_and_allow_for_loading(helm: Helm, kind: str) -> None:
    pod = front_end(helm.template(*of_kind(kind), "--set", "config.start_timeout_seconds=95"))
    probed = container(pod)
    assert probed["livenessProbe"]["httpGet"] == {"path": "/v2/health/live", "port": "http"}
    assert probed["readinessProbe"]["httpGet"] == {"path": "/v2/health/ready", "port": "http"}
    startup = probed["startupProbe"]
    assert startup["httpGet"]["path"] == "/v2/health/ready"
    assert startup["periodSeconds"] * startup["failureThreshold"] > 95


@pytest.mark.parametrize("drain_seconds", [0, 30, 90.5])
def test_the_grace_period_is_longer_than_the_drain(helm: Helm, drain_seconds: float) -> None:
    settings = ("--set-json", f"config.drain_timeout_seconds={drain_seconds}", "--set", "preStopSeconds=7")
    templates = pod_templates(helm.template(*settings, *WITH_A_WORKER))
    head, worker = (templates[role]["spec"] for role in ("head", "worker"))
    assert container(head)["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]
    assert head["terminationGracePeriodSeconds"] == 7 + math.ceil(drain_seconds) + 30
    # A worker is told to stop at the same moment, and the head's last requests need its ranks.
    (_, stays) = container(worker)["lifecycle"]["preStop"]["exec"]["command"]
    assert 7 + drain_seconds < int(stays) < worker["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_rendered_configuration_is_one_the_service_accepts(helm: Helm, kind: str) -> None:
    loaded = Config.model_validate(config(helm.template(*of_kind(kind), "--set", "config.max_body_bytes=1073741824")))
    assert (loaded.host, loaded.max_body_bytes) == ("0.0.0.0", 1 << 30)
    cpu = helm.template("-f", str(ROOT / "deploy/values/cpu.yaml"))
    assert (only(cpu, "Deployment")["spec"]["replicas"], Config.model_validate(config(cpu)).ranks) == (1, 2)


def test_ports_of_services_and_container_follow_the_configuration(helm: Helm) -> None:
    settings = ("--set", "config.port=8111", "--set", "config.metrics_port=9555", "--set", "service.port=80")
    manifests = helm.template(*settings, *of_kind("StatefulSet"))
    ports = {port["name"]: port["containerPort"] for port in container(front_end(manifests))["ports"]}
    assert ports == {"http": 8111, "metrics": 9555}
    served = manifests["Service", "demo-moe-forward"]["spec"]["ports"]
    assert {port["name"]: (port["port"], port["targetPort"]) for port in served} == {
        "http": (80, "http"),
        "metrics": (9400, "metrics"),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_services_select_the_front_end_and_nothing_else(helm: Helm, kind: str) -> None:
    workers = WITH_A_WORKER if kind == "RayCluster" else ()
    manifests = helm.template(*of_kind(kind), *workers)
    labels = {role: template["metadata"]["labels"] for role, template in pod_templates(manifests).items()}
    labels |= {name: pod["metadata"]["labels"] for (of, name), pod in manifests.items() if of == "Pod"}
    selector = manifests["Service", "demo-moe-forward"]["spec"]["selector"]
    selected = {role for role, has in labels.items() if selector.items() <= has.items()}
    assert selected == ({"head"} if kind == "RayCluster" else {"server"})
    assert len(labels) == (4 if kind == "RayCluster" else 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_the_configuration_restarts_the_pods(helm: Helm, kind: str) -> None:
    def checksums(*arguments: str) -> set[str]:
        templates = pod_templates(helm.template(*of_kind(kind), *arguments))
        return {template["metadata"]["annotations"]["checksum/config"] for template in templates.values()}

    assert checksums() == checksums("--set", "service.port=81")
    assert not checksums() & checksums("--set", "config.max_wait_us=300")


def test_gpus_are_asked_for_only_when_enabled(helm: Helm) -> None:
    without = helm.template(*of_kind("StatefulSet"))
    assert "nvidia.com/gpu" not in container(front_end(without))["resources"]["limits"]
    assert "device" not in config(without)
    enabled = helm.template(*of_kind("StatefulSet"), "--set", "gpu.enabled=true", "--set", "gpu.count=4")
    assert container(front_end(enabled))["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert config(enabled)["device"] == "cuda"


@pytest.mark.parametrize(
    ("settings", "volume"),
    [
        ("models.existingClaim=weights", {"persistentVolumeClaim": {"claimName": "weights", "readOnly": True}}),
        ("models.hostPath=/srv/models", {"hostPath": {"path": "/srv/models", "type": "Directory"}}),
        ("models.download.image=fetch:1", {"emptyDir": {"sizeLimit": "500Gi"}}),
    ],
)
def test_every_pod_with_ranks_reads_the_checkpoints_and_cannot_write_them(
    helm: Helm, settings: str, volume: Document
) -> None:
    manifests = helm.template("--set", settings, "--set", "config.model=/models/m", *WITH_A_WORKER)
    for template in pod_templates(manifests).values():
        found = mounts(template["spec"])["/models"]
        assert {key: value for key, value in found.items() if key != "name"} == volume
        (mount,) = (m for m in container(template["spec"])["volumeMounts"] if m["mountPath"] == "/models")
        assert mount["readOnly"] is True


def test_a_download_runs_before_the_service_with_the_same_rights(helm: Helm) -> None:
    settings = "models.download.image=fetch:1,models.download.command={fetch,-q},models.download.args={to,/models}"
    pod = front_end(helm.template("--set", settings))
    (download,) = pod["initContainers"]
    assert (download["image"], download["command"], download["args"]) == ("fetch:1", ["fetch", "-q"], ["to", "/models"])
    assert download["securityContext"] == container(pod)["securityContext"]
    (mount,) = (m for m in download["volumeMounts"] if m["name"] == "models")
    assert (mount["mountPath"], mount.get("readOnly", False)) == ("/models", False)


def test_names_digests_labels_and_annotations_reach_every_object(helm: Helm, tmp_path: Path) -> None:
    digest = f"sha256:{'ab' * 32}"
    settings = f"commonLabels.team=inference,commonAnnotations.owner=us,image.digest={digest},fullnameOverride=experts"
    monitors = "prometheusRule.enabled=true,podMonitor.enabled=true,dashboards.enabled=true"
    manifests = helm.template("--set", settings, "--set", monitors, *WITH_A_WORKER)
    assert len(manifests) >= 12
    metadata = [document["metadata"] for document in manifests.values()]
    metadata += [template["metadata"] for template in pod_templates(manifests).values()]
    for found in metadata:
        assert found["labels"]["team"] == "inference", found
        assert found["annotations"]["owner"] == "us", found
        assert found.get("name", "experts").startswith("experts")
    assert container(front_end(manifests))["image"] == f"moe-forward@{digest}"


def test_extra_objects_volumes_and_variables_are_taken_over(helm: Helm) -> None:
    values = ROOT / "helm/moe-forward/ci"
    extra = helm.template("-f", str(values / "raycluster-values.yaml"))
    assert {("ConfigMap", "extra-of-a-map"), ("ConfigMap", "demo-extra-of-a-template")} <= extra.keys()
    pod = front_end(helm.template("-f", str(values / "single-values.yaml")))
    assert {"name": "OMP_NUM_THREADS", "value": "1"} in container(pod)["env"]
    assert mounts(pod)["/scratch"] == {"name": "scratch", "emptyDir": {}}


def test_replicas_of_a_statefulset_are_left_to_an_autoscaler(helm: Helm) -> None:
    two = helm.template(*of_kind("StatefulSet"), "--set", "replicaCount=2")
    assert only(two, "StatefulSet")["spec"]["replicas"] == 2
    scaled = helm.template(*of_kind("StatefulSet"), "--set", "autoscaling.enabled=true")
    assert "replicas" not in only(scaled, "StatefulSet")["spec"]
    target = only(scaled, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("StatefulSet", "demo-moe-forward")
