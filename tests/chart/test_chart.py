"""The chart: its schema is the code's, its defaults are valid, and a real helm renders what the values say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from moe_forward.config import Config

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "moe-forward"
EXAMPLE_VALUES = sorted((ROOT / "deploy" / "values").glob("*.yaml"))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
    return document


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return document


@pytest.fixture(scope="module")
def helm() -> str:
    binary = shutil.which("helm")
    if binary is None:
        pytest.skip("no helm on PATH; .ci/helm.py gets one")
    return binary


def run(helm: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([helm, *arguments], capture_output=True, text=True, timeout=60, check=False)


def render(helm: str, *arguments: str) -> dict[tuple[str, str], dict[str, Any]]:
    done = run(helm, "template", "demo", str(CHART), *arguments)
    assert done.returncode == 0, done.stderr
    documents = [document for document in yaml.safe_load_all(done.stdout) if document]
    return {(document["kind"], document["metadata"]["name"]): document for document in documents}


def server(manifests: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    pod: dict[str, Any] = manifests["StatefulSet", "demo-moe-forward"]["spec"]["template"]["spec"]
    return pod


def config(manifests: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(manifests["ConfigMap", "demo-moe-forward"]["data"]["config.json"])
    return document


def test_the_chart_embeds_the_schema_of_the_configuration(schema: dict[str, Any]) -> None:
    assert schema["properties"]["config"] == Config.model_json_schema(), "run `make schema`"


def test_the_schema_refuses_unknown_keys_at_every_level_it_describes(schema: dict[str, Any]) -> None:
    described = [schema, *(part for part in schema["properties"].values() if "properties" in part)]
    assert len(described) > 5
    assert all(part["additionalProperties"] is False for part in described)


def test_the_default_values_and_the_examples_satisfy_the_schema(schema: dict[str, Any], values: dict[str, Any]) -> None:
    validator = jsonschema.validators.validator_for(schema)(schema)
    validator.check_schema(schema)
    validator.validate(values)
    assert EXAMPLE_VALUES
    for example in EXAMPLE_VALUES:
        validator.validate(yaml.safe_load(example.read_text()))


def test_every_value_the_schema_knows_is_in_the_values_file(schema: dict[str, Any], values: dict[str, Any]) -> None:
    assert schema["properties"].keys() - {"global"} == values.keys()  # helm adds `global` by itself
    for key, part in schema["properties"].items():
        if "properties" in part and key != "config":
            assert part["properties"].keys() == values[key].keys(), key


def test_the_default_configuration_differs_from_the_service_only_in_its_address(values: dict[str, Any]) -> None:
    Config.model_validate(values["config"])
    defaults = Config().model_dump()
    assert {key for key, value in values["config"].items() if value != defaults[key]} == {"host"}


def test_every_value_has_a_comment_for_the_reader(schema: dict[str, Any]) -> None:
    # A group has its comments inside; below a commented key (resources, security contexts) keys are Kubernetes' own.
    groups = {key for key, part in schema["properties"].items() if "properties" in part} - {"config"}
    lines = (CHART / "values.yaml").read_text().splitlines()
    undescribed = []
    group = ""
    for before, line in zip(["", *lines], lines, strict=False):
        found = re.match(r"( {2})?(\w+):", line)
        if found is None:
            continue
        indented, key = found.groups()
        group = group if indented else key
        optional = key in groups if not indented else group not in {*groups, "config"}
        if not optional and not before.lstrip().startswith("# -- "):
            undescribed.append(line)
    assert undescribed == []


@pytest.mark.parametrize("example", [None, *EXAMPLE_VALUES], ids=lambda path: path.stem if path else "defaults")
def test_helm_lints_the_chart(helm: str, example: Path | None) -> None:
    done = run(helm, "lint", "--strict", str(CHART), *(["-f", str(example)] if example else []))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_pod_is_locked_down_and_has_what_the_service_writes_to(helm: str) -> None:
    pod = server(render(helm))
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert pod["automountServiceAccountToken"] is False
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert {"/tmp", "/var/cache/moe-forward"} <= mounts.keys()
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"


def test_probes_ask_the_health_routes_and_allow_for_loading(helm: str) -> None:
    (container,) = server(render(helm, "--set", "config.start_timeout_seconds=95"))["containers"]
    assert container["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"
    assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] > 95


@pytest.mark.parametrize("drain_seconds", [0, 30, 90.5])
def test_the_grace_period_is_longer_than_the_drain(helm: str, drain_seconds: float) -> None:
    pod = server(
        render(helm, "--set-json", f"config.drain_timeout_seconds={drain_seconds}", "--set", "preStopSeconds=7")
    )
    assert pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]
    assert pod["terminationGracePeriodSeconds"] > 7 + drain_seconds


def test_the_rendered_configuration_is_one_the_service_accepts(helm: str) -> None:
    manifests = render(helm, "-f", str(ROOT / "deploy/values/cpu.yaml"), "--set", "config.max_body_bytes=1073741824")
    loaded = Config.model_validate(config(manifests))
    assert (loaded.device, loaded.ranks, loaded.max_body_bytes) == ("cpu", 2, 1 << 30)


def test_ports_of_services_and_container_follow_the_configuration(helm: str) -> None:
    manifests = render(
        helm, "--set", "config.port=8111", "--set", "config.metrics_port=9555", "--set", "service.port=80"
    )
    (container,) = server(manifests)["containers"]
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == {"http": 8111, "metrics": 9555}
    ports = manifests["Service", "demo-moe-forward"]["spec"]["ports"]
    assert {port["name"]: (port["port"], port["targetPort"]) for port in ports} == {
        "http": (80, "http"),
        "metrics": (9400, "metrics"),
    }


def test_a_change_of_the_configuration_restarts_the_pods(helm: str) -> None:
    def checksum(*arguments: str) -> str:
        template = render(helm, *arguments)["StatefulSet", "demo-moe-forward"]["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/config"])

    assert checksum() == checksum("--set", "replicaCount=3")
    assert checksum() != checksum("--set", "config.max_wait_us=300")


def test_gpus_are_asked_for_only_when_enabled(helm: str) -> None:
    without = render(helm)
    assert "nvidia.com/gpu" not in server(without)["containers"][0]["resources"]["limits"]
    assert "device" not in config(without)
    enabled = render(helm, "--set", "gpu.enabled=true", "--set", "gpu.count=4")
    assert server(enabled)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert config(enabled)["device"] == "cuda"


def test_the_admin_token_comes_from_a_secret(helm: str) -> None:
    assert "admin_token_file" not in config(render(helm))
    manifests = render(helm, "--set", "adminToken.existingSecret=operators")
    (container,) = server(manifests)["containers"]
    (secret,) = (volume for volume in server(manifests)["volumes"] if "secret" in volume)
    assert secret["secret"]["secretName"] == "operators"
    (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == secret["name"])
    file = Path(mount["mountPath"]) / secret["secret"]["items"][0]["path"]
    assert config(manifests)["admin_token_file"] == str(file)


def test_services_select_the_server_and_not_the_test_pod(helm: str) -> None:
    manifests = render(helm)
    test_labels = manifests["Pod", "demo-moe-forward-test-ready"]["metadata"]["labels"]
    pod_labels = manifests["StatefulSet", "demo-moe-forward"]["spec"]["template"]["metadata"]["labels"]
    for name in ("demo-moe-forward", "demo-moe-forward-pods"):
        selector = manifests["Service", name]["spec"]["selector"]
        assert selector.items() <= pod_labels.items()
        assert not selector.items() <= test_labels.items()


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("config.prot=1", "prot"),
        ("config.port=99999", "port"),
        ("config.port=0", "config.port"),
        ("config.device=tpu", "device"),
        ("gpu.count=0", "count"),
        ("replicas=2", "replicas"),
        ("shmSize=lots", "shmSize"),
    ],
)
def test_a_wrong_value_is_refused_by_name(helm: str, setting: str, named: str) -> None:
    done = run(helm, "template", "demo", str(CHART), "--set", setting)
    assert done.returncode != 0
    assert named in done.stderr
