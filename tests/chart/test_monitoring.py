"""What Prometheus and Grafana find: the metrics port, the rules and the dashboard as they lie in the chart."""

from __future__ import annotations

import json

import pytest
import yaml

from .charts import CHART, Helm, container, front_end, of_kind, only, pod_templates


def test_nothing_of_an_operator_is_made_unless_asked_for(helm: Helm) -> None:
    for kind in ("RayCluster", "StatefulSet", "Single"):
        groups = {document["apiVersion"].split("/")[0] for document in helm.template(*of_kind(kind)).values()}
        assert groups <= {"v1", "apps", "policy", "networking.k8s.io", "ray.io"}


@pytest.mark.parametrize("kind", ["RayCluster", "StatefulSet", "Single"])
def test_a_service_monitor_finds_the_service_of_the_front_end(helm: Helm, kind: str) -> None:
    settings = ("--set", "serviceMonitor.enabled=true,serviceMonitor.interval=5s,serviceMonitor.labels.release=p")
    manifests = helm.template(*of_kind(kind), *settings)
    monitor = only(manifests, "ServiceMonitor")
    assert monitor["metadata"]["labels"]["release"] == "p"
    (endpoint,) = monitor["spec"]["endpoints"]
    assert (endpoint["port"], endpoint["path"], endpoint["interval"]) == ("metrics", "/metrics", "5s")
    labels = monitor["spec"]["selector"]["matchLabels"]
    services = [document for (of, _), document in manifests.items() if of == "Service"]
    (found,) = (service for service in services if labels.items() <= service["metadata"]["labels"].items())
    assert endpoint["port"] in {port["name"] for port in found["spec"]["ports"]}


@pytest.mark.parametrize("kind", ["RayCluster", "StatefulSet", "Single"])
def test_a_pod_monitor_finds_pods_with_a_metrics_port(helm: Helm, kind: str) -> None:
    workers = ("--set", "rayCluster.workers.replicas=1") if kind == "RayCluster" else ()
    manifests = helm.template(*of_kind(kind), "--set", "podMonitor.enabled=true", *workers)
    monitor = only(manifests, "PodMonitor")["spec"]
    labels = monitor["selector"]["matchLabels"]
    found = [
        role
        for role, template in pod_templates(manifests).items()
        if labels.items() <= template["metadata"]["labels"].items()
    ]
    assert found == (["head"] if kind == "RayCluster" else ["server"])
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in container(front_end(manifests))["ports"]}


def test_the_rules_are_those_of_the_charts_files(helm: Helm) -> None:
    rule = only(helm.template("--set", "prometheusRule.enabled=true"), "PrometheusRule")
    written = [
        group
        for name in ("recording", "alerts")
        for group in yaml.safe_load((CHART / "rules" / f"{name}.yaml").read_text())["groups"]
    ]
    assert rule["spec"]["groups"] == written
    assert any("{{ $" in annotation for annotation in json.dumps(written).split('"'))  # Prometheus' templates survive


def test_the_dashboard_is_the_charts_file_with_the_sidecars_label(helm: Helm) -> None:
    settings = ("--set", "dashboards.enabled=true", "--set", "dashboards.annotations.grafana_folder=MoE")
    manifests = helm.template(*settings)
    found = manifests["ConfigMap", "demo-moe-forward-dashboards"]
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert found["metadata"]["annotations"]["grafana_folder"] == "MoE"
    files = {path.name: json.loads(path.read_text()) for path in (CHART / "dashboards").glob("*.json")}
    assert files
    assert {name: json.loads(text) for name, text in found["data"].items()} == files


def test_autoscalers_ask_for_tokens_that_wait(helm: Helm) -> None:
    scaled = helm.template(*of_kind("StatefulSet"), "--set", "autoscaling.enabled=true,autoscaling.queueTokens=100")
    (metric,) = only(scaled, "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "moe_forward_queue_tokens"
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "100"}
    address = "keda.serverAddress=http://prometheus:9090"
    asked = helm.template(*of_kind("StatefulSet"), "--set", "keda.enabled=true", "--set", address)
    (trigger,) = only(asked, "ScaledObject")["spec"]["triggers"]
    assert trigger["metadata"]["threshold"] == "8192"
    assert (
        'moe_forward_queue_tokens{namespace="default",pod=~"demo-moe-forward-[0-9]+"}' in trigger["metadata"]["query"]
    )
