"""Values that are each in range and cannot work together are refused, with the value to change."""

from __future__ import annotations

import pytest

from .charts import Helm

STATEFUL = "workload.kind=StatefulSet"
GPUS = "gpu.enabled=true,gpu.count=8"

REFUSED = {
    "config.port=0": "config.port: expected a port",
    "config.metrics_port=8000": "config.metrics_port: expected another port",
    "service.metricsPort=8000": "service.metricsPort: expected another port",
    "config.host=127.0.0.1": "config.host: 127.0.0.1 is reached by no probe",
    f"{STATEFUL},config.ray_address=auto": "config.ray_address: only workload.kind RayCluster",
    "replicaCount=2": "replicaCount: a RayCluster is one service",
    "workload.kind=Single,replicaCount=0": "replicaCount: a Single is one service",
    f"{STATEFUL},rayCluster.workers.replicas=1": "rayCluster.workers.replicas: only workload.kind RayCluster",
    "fullnameOverride=8x": "fullnameOverride: KubeRay wants",
    f"{GPUS},workload.kind=Single": "gpu.enabled: workload.kind Single runs on CPU",
    f"{GPUS},rayCluster.headGpus=false": "rayCluster.workers.replicas: without GPUs in the head",
    f"{GPUS},config.ranks=9": "config.ranks: 9 ranks need a GPU each, and the pods have 8",
    f"{GPUS},rayCluster.workers.replicas=1,config.ranks=17": "config.ranks: 17 ranks",
    f"{GPUS},config.device=cpu": "config.device: cpu with gpu.enabled",
    "config.device=cuda": "config.device: cuda needs gpu.enabled",
    "rdma.enabled=true": "rdma.enabled: only pods with GPUs",
    "hostNetwork=true": "hostNetwork: only pods with GPUs",
    "placement.nvlinkDomainKey=clique": "placement.nvlinkDomainKey: only pods with GPUs",
    f"{GPUS},placement.nvlinkDomain=seven": "placement.nvlinkDomain: name the node label",
    "networkPolicy.enabled=false": "apiKeys.existingSecret: anyone",
    "tls.clientCA=true": "tls.clientCA: client certificates need TLS",
    "models.existingClaim=a,models.hostPath=/b": "models: expected one of",
    "config.model=/models/m": "config.model: nothing is mounted at /models",
    "autoscaling.enabled=true": "autoscaling.enabled: only a StatefulSet",
    "keda.enabled=true": "keda.enabled: only a StatefulSet",
    f"{STATEFUL},autoscaling.enabled=true,autoscaling.minReplicas=5": "autoscaling.minReplicas: expected at most",
    f"{STATEFUL},keda.enabled=true": "keda.serverAddress: expected the URL",
    f"{STATEFUL},keda.enabled=true,keda.serverAddress=http://p,autoscaling.enabled=true": "keda.enabled: two",
    "serviceMonitor.enabled=true,podMonitor.enabled=true": "podMonitor.enabled: with serviceMonitor.enabled",
}


@pytest.mark.parametrize(("settings", "said"), REFUSED.items(), ids=REFUSED)
def test_a_combination_that_cannot_work_is_refused(helm: Helm, settings: str, said: str) -> None:
    assert said in helm.refusal("--set", settings)
