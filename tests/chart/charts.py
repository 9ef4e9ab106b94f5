"""Rendering the chart with a real helm, and finding things in what comes out."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "moe-forward"
EXAMPLES = sorted((ROOT / "deploy" / "values").glob("*.yaml"))
CI_VALUES = sorted((CHART / "ci").glob("*.yaml"))
VALUES = [None, *EXAMPLES, *CI_VALUES]
# Names of the binaries that .ci/helm.py puts on PATH.
BINARIES = ("helm", "helm3")

Document = dict[str, Any]
Manifests = dict[tuple[str, str], Document]


def named(values: Path | None) -> str:
    return values.stem if values else "defaults"


def file_arguments(values: Path | None) -> tuple[str, ...]:
    return ("-f", str(values)) if values else ()


def of_kind(kind: str) -> tuple[str, str]:
    return ("--set", f"workload.kind={kind}")


@dataclass(frozen=True)
class Helm:
    """A helm binary."""

    binary: str

    @classmethod
    def found(cls, name: str) -> Helm | None:
        binary = shutil.which(name)
        return cls(binary) if binary else None

    def run(self, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.binary, *arguments],
            capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **(environment or {})},
        )  # fmt: skip

    @functools.lru_cache(maxsize=64)  # noqa: B019 - a helm is a value, and there are two
    def _output(self, *arguments: str) -> str:
        done = self.run("template", "demo", str(CHART), *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def template(self, *arguments: str) -> Manifests:
        """Every object that the chart makes, by kind and name."""
        documents = [document for document in yaml.load_all(self._output(*arguments), yaml.CSafeLoader) if document]
        found = {(document["kind"], document["metadata"]["name"]): document for document in documents}
        assert len(found) == len(documents), "two objects of the same kind have the same name"
        return found

    def refusal(self, *arguments: str) -> str:
        """What helm says when it does not render."""
        done = self.run("template", "demo", str(CHART), *arguments)
        assert done.returncode != 0, f"{arguments} was rendered"
        return done.stderr


def only(manifests: Manifests, kind: str) -> Document:
    """The one object of `kind`."""
    (found,) = (document for (of, _), document in manifests.items() if of == kind)
    return found


def pod_templates(manifests: Manifests) -> dict[str, Document]:
    """Pod templates by role: server, or head and worker."""
    found = {}
    for (kind, _), document in manifests.items():
        if kind in ("StatefulSet", "Deployment"):
            found["server"] = document["spec"]["template"]
        if kind == "RayCluster":
            found["head"] = document["spec"]["headGroupSpec"]["template"]
            for group in document["spec"].get("workerGroupSpecs", []):
                found["worker"] = group["template"]
    return found


def front_end(manifests: Manifests) -> Document:
    """The pod that answers HTTP."""
    templates = pod_templates(manifests)
    pod: Document = (templates.get("head") or templates["server"])["spec"]
    return pod


def container(pod: Document) -> Document:
    (found,) = pod["containers"]
    assert isinstance(found, dict)
    return found


def mounts(pod: Document) -> dict[str, Document]:
    """The volumes of a pod's container, by the folder they are mounted at."""
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    return {mount["mountPath"]: volumes[mount["name"]] for mount in container(pod)["volumeMounts"]}


def config(manifests: Manifests) -> Document:
    """The service's configuration document."""
    (text,) = (
        document["data"]["config.json"]
        for document in manifests.values()
        if document["kind"] == "ConfigMap" and "config.json" in document.get("data", {})
    )
    document: Document = json.loads(text)
    return document
