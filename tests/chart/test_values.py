"""values.yaml and its schema: the code's configuration is in it, everything is described, nothing unknown gets in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from moe_forward.config import Config

from .charts import CHART, CI_VALUES, EXAMPLES, ROOT, Helm, file_arguments, named

# Kubernetes' own objects that pass through the chart whole: its API server and kubernetes-validate know their fields.
KUBERNETES_OWN = {
    "affinity", "claims", "ipBlock", "items", "labelSelector", "limits", "namespaceSelector", "nodeAffinity",
    "podAffinity", "podAntiAffinity", "podSelector", "ports", "requests", "seLinuxOptions", "seccompProfile",
    "appArmorProfile", "windowsOptions", "sysctls", "valueFrom", "extraVolumes", "extraObjects", "global",
}  # fmt: skip

# Values whose whole is described in one comment: below them the keys are Kubernetes' own.
WHOLES = {"resources", "rayCluster.headResources", "podSecurityContext", "securityContext", "affinity"}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
    return document


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return document


def resolved(schema: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    reference = part.get("$ref")
    if reference is None:
        return part
    found: dict[str, Any] = schema["definitions"][reference.removeprefix("#/definitions/")]
    return found


def settings(schema: dict[str, Any], part: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all values that the schema lists, except the configuration's: Config has their descriptions."""
    for key, below in part.get("properties", {}).items():
        if path or key != "global":
            yield (*path, key)
            if ".".join((*path, key)) not in {"config", *WHOLES}:
                yield from settings(schema, resolved(schema, below), (*path, key))


def objects(schema: dict[str, Any], name: str, part: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every part of the schema that admits an object, with the name it is under."""
    part = resolved(schema, part)
    if "object" in part.get("type", ()):
        yield name, part
    for key, below in part.get("properties", {}).items():
        yield from objects(schema, key, below)
    if isinstance(part.get("items"), dict):
        yield from objects(schema, name, part["items"])


def test_the_chart_embeds_the_schema_of_the_configuration(schema: dict[str, Any]) -> None:
    assert schema["properties"]["config"] == Config.model_json_schema(), "run `make schema`"


def test_the_schema_refuses_unknown_keys_at_every_level(schema: dict[str, Any]) -> None:
    open_to_all = [name for name, part in objects(schema, "values", schema) if "additionalProperties" not in part]
    assert set(open_to_all) <= KUBERNETES_OWN
    assert len(list(objects(schema, "values", schema))) > 60


def test_the_default_values_and_every_values_file_satisfy_the_schema(
    schema: dict[str, Any], values: dict[str, Any]
) -> None:
    validator = jsonschema.validators.validator_for(schema)(schema)
    validator.check_schema(schema)
    validator.validate(values)
    assert len(EXAMPLES) >= 3
    assert len(CI_VALUES) >= 4
    for path in (*EXAMPLES, *CI_VALUES):
        validator.validate(yaml.safe_load(path.read_text()))


def test_every_value_the_schema_lists_is_in_the_values_file(schema: dict[str, Any], values: dict[str, Any]) -> None:
    missing = []
    for path in settings(schema, schema):
        where: Any = values
        for key in path:
            where = where.get(key, KeyError) if isinstance(where, dict) else KeyError
        if where is KeyError:
            missing.append(".".join(path))
    assert missing == []
    assert values.keys() == schema["properties"].keys() - {"global"}  # helm adds `global` by itself


def test_the_default_configuration_differs_from_the_service_only_in_its_address(values: dict[str, Any]) -> None:
    Config.model_validate(values["config"] | {"allow_anonymous": True})
    defaults = Config().model_dump()
    assert {key for key, value in values["config"].items() if value != defaults[key]} == {"host"}


def test_every_value_has_a_comment_for_the_reader(schema: dict[str, Any], values: dict[str, Any]) -> None:
    described = set(settings(schema, schema))
    described |= {("config", key) for key in values["config"]}
    groups = {path[:-1] for path in described if path[:-1]} - {("config",)}
    lines = (CHART / "values.yaml").read_text().splitlines()
    here: list[str] = []
    comment, undescribed, seen = False, [], 0
    for line in lines:
        found = re.match(r"( *)([\w.]+):", line)
        if found:
            here = [*here[: len(found[1]) // 2], found[2]]
            path = tuple(here)
            if path in described and (path not in groups or not line.rstrip().endswith(":")):
                seen += 1
                if not comment:
                    undescribed.append(".".join(path))
        comment = bool(re.match(r" *# -- ", line)) or (comment and line.lstrip().startswith("#"))
    assert undescribed == []
    assert seen > 80


def test_rays_version_is_the_one_that_is_tested(values: dict[str, Any]) -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    assert re.search(rf"^ray=={re.escape(values['rayCluster']['version'])}$", constraints, re.MULTILINE)


@pytest.mark.parametrize("path", [None, *EXAMPLES, *CI_VALUES], ids=named)
def test_helm_lints_the_chart(each_helm: Helm, path: Path | None) -> None:
    done = each_helm.run("lint", "--strict", str(CHART), *file_arguments(path))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("config.prot=1", "config"),
        ("config.port=99999", "config/port"),
        ("config.device=tpu", "config/device"),
        ("config.max_queue_tokens=none", "config/max_queue_tokens"),
        ("gpu.count=0", "gpu/count"),
        ("gpu.kind=H200", "gpu"),
        ("replicas=2", "replicas"),
        ("workload.kind=RayService", "workload/kind"),
        ("shmSize=lots", "shmSize"),
        ("image.digest=latest", "image/digest"),
        ("image.pullPolicy=Sometimes", "image/pullPolicy"),
        ("service.port=0", "service/port"),
        ("rayCluster.workers.replicas=-1", "rayCluster/workers/replicas"),
        ("rayCluster.workers.hosts=2", "rayCluster/workers"),
        ("rayCluster.version=latest", "rayCluster/version"),
        ("rayCluster.upgradeStrategy=Rolling", "rayCluster/upgradeStrategy"),
        ("models.mountPath=models", "models/mountPath"),
        ("models.download.size=1TB", "models/download/size"),
        ("rdma.count=0", "rdma/count"),
        ("networkPolicy.clients[0].podSelectors.a=b", "networkPolicy/clients/0"),
        ("serviceMonitor.interval=often", "serviceMonitor/interval"),
        ("keda.serverAddress=prometheus", "keda/serverAddress"),
        ("autoscaling.maxReplicas=0", "autoscaling/maxReplicas"),
        ("podDisruptionBudget.maxUnavailable=half", "podDisruptionBudget/maxUnavailable"),
        ("tolerations[0].effect=Never", "tolerations/0/effect"),
        ("topologySpreadConstraints[0].maxSkew=1", "topologySpreadConstraints/0"),
        ("securityContext.capabilities.remove[0]=ALL", "securityContext/capabilities"),
        ("extraEnv[0].value=1", "extraEnv/0"),
        ("apiKeys.secret=clients", "apiKeys"),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_its_path(helm: Helm, setting: str, named: str) -> None:
    said = helm.refusal("--set", setting)
    assert f"/{named}'" in said or f"'{named}'" in said, said
