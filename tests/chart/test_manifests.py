"""Every object of every values file against the schemas of Kubernetes, strictly, and of the operators' resources."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils

from .charts import VALUES, Document, Helm, file_arguments, named, of_kind, pod_templates

# The oldest of them is older than any that is supported still; the schemas of all are in the package.
KUBERNETES_VERSIONS = ("1.29", "1.31", "1.34", "1.37")
SCHEMAS = Path(__file__).parent / "schemas"
OPERATORS = {
    "RayCluster": "raycluster",
    "ServiceMonitor": "monitor",
    "PodMonitor": "monitor",
    "PrometheusRule": "prometheusrule",
    "ScaledObject": "scaledobject",
}


@pytest.fixture(scope="module", autouse=True)
def each_schema_is_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "schema_contents", functools.cache(utils.schema_contents))
        yield


def problems_of(document: Document) -> list[str]:
    """What is wrong with an operator's resource."""
    schema = yaml.safe_load((SCHEMAS / f"{OPERATORS[document['kind']]}.yaml").read_text())
    validator = jsonschema.Draft7Validator(schema)
    validator.check_schema(schema)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def kubernetes_own(documents: list[Document]) -> Iterator[Document]:
    """Kubernetes' objects, and those that lie within operators' resources, as objects of their own."""
    for document in documents:
        if document["kind"] not in OPERATORS:
            yield document
        if document["kind"] == "RayCluster":
            yield {"apiVersion": "v1", "kind": "Service", **document["spec"]["headGroupSpec"]["headService"]}
            for template in pod_templates({("RayCluster", ""): document}).values():
                yield {"apiVersion": "v1", "kind": "PodTemplate", "template": template}


@pytest.mark.parametrize("path", VALUES, ids=named)
def test_every_object_is_valid_in_every_version(helm: Helm, path: Path | None) -> None:
    documents = list(helm.template(*file_arguments(path)).values())
    checked = list(kubernetes_own(documents))
    assert len(checked) >= 7
    for version in KUBERNETES_VERSIONS:
        for document in checked:
            assert kubernetes_validate.validate(document, version, strict=True) == version
    for document in documents:
        if document["kind"] in OPERATORS:
            assert problems_of(document) == []


@pytest.mark.parametrize("path", VALUES, ids=named)
def test_helm_3_makes_the_same_objects_as_helm_4(helm: Helm, each_helm: Helm, path: Path | None) -> None:
    # The token of a chart that makes one is random.
    settled = (*file_arguments(path), "--set", "rayCluster.existingTokenSecret=token")
    assert each_helm.template(*settled) == helm.template(*settled)


def test_together_the_values_files_make_every_kind_of_object(helm: Helm) -> None:
    made = {kind for path in VALUES for kind, _ in helm.template(*file_arguments(path))}
    assert made >= {
        *OPERATORS, "StatefulSet", "Deployment", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy",
        "Secret", "ConfigMap", "Service", "ServiceAccount", "Pod",
    }  # fmt: skip


PLANTED: list[tuple[str, tuple[str, ...], Any]] = [
    ("RayCluster", ("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 3),
    ("RayCluster", ("spec", "headGroupSpec", "rayStartParams", "dashboard-host"), "0.0.0.0"),
    ("RayCluster", ("spec", "workerGroups"), []),
    ("RayCluster", ("spec", "authOptions", "mode"), "basic"),
    ("RayCluster", ("metadata", "name"), "9-lives"),
    ("ServiceMonitor", ("spec", "podMetricsEndpoints"), [{"port": "metrics"}]),
    ("ServiceMonitor", ("spec", "endpoints"), [{"port": 9400}]),
    ("PrometheusRule", ("spec", "groups"), [{"name": "g", "rules": [{"expr": "up"}]}]),
    ("ScaledObject", ("spec", "maxReplicaCount"), "many"),
    ("ScaledObject", ("spec", "triggers"), [{"type": "prometheus", "metadata": {"threshold": 8}}]),
]


@pytest.mark.parametrize(("kind", "where", "what"), PLANTED, ids=[f"{k}-{'.'.join(w)}" for k, w, _ in PLANTED])
def test_the_schemas_notice_a_mistake(helm: Helm, kind: str, where: tuple[str, ...], what: Any) -> None:
    settings = "serviceMonitor.enabled=true,prometheusRule.enabled=true,keda.enabled=true,keda.serverAddress=http://p"
    manifests = helm.template(*of_kind("StatefulSet"), "--set", settings) | helm.template()
    (document,) = (yaml.safe_load(yaml.safe_dump(found)) for (of, _), found in manifests.items() if of == kind)
    assert problems_of(document) == []
    part = document
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = what
    assert problems_of(document) != []
