"""Who may reach the service: keys, certificates, and a network policy that opens only what is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_forward.config import Config

from .charts import Document, Helm, Manifests, config, container, front_end, mounts, of_kind

SECRETS = [
    ("apiKeys.existingSecret=given,apiKeys.key=mine", "api_keys_file", "mine"),
    ("adminToken.existingSecret=given", "admin_token_file", "token"),
    ("tls.existingSecret=given", "tls_certificate_file", "tls.crt"),
    ("tls.existingSecret=given", "tls_key_file", "tls.key"),
    ("tls.existingSecret=given,tls.clientCA=true", "tls_client_ca_file", "ca.crt"),
]


@pytest.mark.parametrize(("setting", "field", "key"), SECRETS, ids=[field for _, field, _ in SECRETS])
def test_a_secret_is_mounted_where_the_configuration_looks_for_it(
    helm: Helm, setting: str, field: str, key: str
) -> None:
    assert field not in config(helm.template())
    manifests = helm.template("--set", setting)
    file = Path(config(manifests)[field])
    volume = mounts(front_end(manifests))[str(file.parent)]
    assert volume["secret"]["secretName"] == "given"
    assert {"key": key, "path": file.name} in volume["secret"]["items"]
    Config.model_validate(config(manifests))


def test_callers_without_keys_are_let_in_only_behind_a_network_policy(helm: Helm) -> None:
    assert config(helm.template())["allow_anonymous"] is True
    assert "allow_anonymous" not in config(helm.template("--set", "apiKeys.existingSecret=keys"))
    mutual = helm.template("--set", "tls.existingSecret=certificates,tls.clientCA=true")
    assert "allow_anonymous" not in config(mutual)
    assert "apiKeys.existingSecret" in helm.refusal("--set", "networkPolicy.enabled=false")
    said = helm.template("--set", "networkPolicy.enabled=false,config.allow_anonymous=true")
    assert not [kind for kind, _ in said if kind == "NetworkPolicy"]


def test_what_the_operator_configures_stays(helm: Helm) -> None:
    settings = "apiKeys.existingSecret=keys,config.api_keys_file=/mine,config.ranks=1,config.ray_address=10.0.0.1:6379"
    found = config(helm.template("--set", settings))
    assert (found["api_keys_file"], found["ranks"], found["ray_address"]) == ("/mine", 1, "10.0.0.1:6379")


def test_probes_speak_tls_where_the_service_does(helm: Helm) -> None:
    probed = container(front_end(helm.template("--set", "tls.existingSecret=certificates")))
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert probed[probe]["httpGet"]["scheme"] == "HTTPS"


def test_probes_show_a_certificate_where_clients_must(helm: Helm) -> None:
    probed = container(front_end(helm.template("--set", "tls.existingSecret=certificates,tls.clientCA=true")))
    command = probed["readinessProbe"]["exec"]["command"]
    assert command[:2] == ["python", "-c"]
    assert command[3:] == ["https://127.0.0.1:8000/v2/health/ready", "/etc/moe-forward/tls"]
    assert probed["livenessProbe"]["exec"]["command"][3].endswith("/v2/health/live")


def only_test_labels(manifests: Manifests) -> dict[str, str]:
    (labels,) = {tuple(pod["metadata"]["labels"].items()) for (of, _), pod in manifests.items() if of == "Pod"}
    return dict(labels)


def ingress(policy: Document, port: int | None) -> list[Any]:
    """Peers that may open `port`; None: any port."""
    found = []
    for rule in policy["spec"]["ingress"]:
        ports = {entry["port"] for entry in rule.get("ports", [])}
        if (port in ports) if port else not ports:
            found += rule["from"]
    return found


@pytest.mark.parametrize("kind", ["RayCluster", "StatefulSet", "Single"])
def test_each_port_is_open_to_whom_it_is_for(helm: Helm, kind: str) -> None:
    manifests = helm.template(*of_kind(kind))
    policy = manifests["NetworkPolicy", "demo-moe-forward"]
    own = {"app.kubernetes.io/name": "moe-forward", "app.kubernetes.io/instance": "demo"}
    test_pods = [pod["metadata"]["labels"] for (of, _), pod in manifests.items() if of == "Pod"]
    assert policy["spec"]["podSelector"] == {"matchLabels": own}
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    # Ray's ports, the exchange's and the links': between the release's pods, and nowhere else.
    assert ingress(policy, None) == [{"podSelector": {"matchLabels": own}}]
    clients = ingress(policy, 8000)
    assert clients == [{"podSelector": {}}, {"podSelector": {"matchLabels": test_pods[0]}}]
    (monitoring,) = ingress(policy, 9400)
    assert monitoring == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    outside = [rule for rule in policy["spec"]["egress"] if rule["to"] != [{"podSelector": {"matchLabels": own}}]]
    (dns,) = outside
    assert {(port["port"], port["protocol"]) for port in dns["ports"]} == {(53, "UDP"), (53, "TCP")}
    assert dns["to"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "kube-system"}


def test_the_pods_of_helm_test_reach_the_front_end_and_nothing_else(helm: Helm) -> None:
    manifests = helm.template("--set", "config.port=8111")
    policy = manifests["NetworkPolicy", "demo-moe-forward-test"]["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= only_test_labels(manifests).items()
    front, dns = policy["egress"]
    assert front["ports"] == [{"port": 8111}]
    assert front["to"] == manifests["NetworkPolicy", "demo-moe-forward"]["spec"]["ingress"][0]["from"]
    assert {port["port"] for port in dns["ports"]} == {53}
    assert "ingress" not in policy
    assert policy["policyTypes"] == ["Ingress", "Egress"]


def test_nobody_is_a_list_of_nobody(helm: Helm) -> None:
    settings = ("--set-json", "networkPolicy.clients=[]", "--set-json", "networkPolicy.monitoring=[]")
    manifests = helm.template(*settings, "--set-json", "networkPolicy.dns=[]")
    policy = manifests["NetworkPolicy", "demo-moe-forward"]
    (test_pods,) = ingress(policy, 8000)
    assert test_pods["podSelector"]["matchLabels"]["app.kubernetes.io/name"] == "moe-forward-test"
    assert ingress(policy, 9400) == []
    assert len(policy["spec"]["egress"]) == 1
