"""A stand-in for a Kubernetes API server, as far as helm uses one.

It has discovery, objects that can be made, listed, watched, patched and deleted, and an OpenAPI that says it checks
fields by itself. Nothing is admitted, scheduled or run: a pod is over as soon as it is made, with the phase in
`pod_phase`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from .protobuf import decode_secret

Document = dict[str, Any]

# Group and version -> plural -> kind and whether it lies in a namespace.
KINDS: dict[str, dict[str, tuple[str, bool]]] = {
    "v1": {
        "configmaps": ("ConfigMap", True),
        "events": ("Event", True),
        "namespaces": ("Namespace", False),
        "pods": ("Pod", True),
        "secrets": ("Secret", True),
        "serviceaccounts": ("ServiceAccount", True),
        "services": ("Service", True),
    },
    "apps/v1": {"deployments": ("Deployment", True), "statefulsets": ("StatefulSet", True)},
    "autoscaling/v2": {"horizontalpodautoscalers": ("HorizontalPodAutoscaler", True)},
    "networking.k8s.io/v1": {"networkpolicies": ("NetworkPolicy", True)},
    "policy/v1": {"poddisruptionbudgets": ("PodDisruptionBudget", True)},
    "ray.io/v1": {"rayclusters": ("RayCluster", True)},
    "keda.sh/v1alpha1": {"scaledobjects": ("ScaledObject", True)},
    "monitoring.coreos.com/v1": {
        "podmonitors": ("PodMonitor", True),
        "prometheusrules": ("PrometheusRule", True),
        "servicemonitors": ("ServiceMonitor", True),
    },
}
VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]
WATCH_POLL_SECONDS = 0.02
# By what elements of a list are told apart in a strategic merge patch, where it is not the name.
MERGE_KEYS = {"volumeMounts": "mountPath", "ports": "port"}


@dataclass(frozen=True, slots=True)
class Target:
    """What a path names: a kind of objects, or one of them."""

    version: str
    plural: str
    namespace: str
    name: str

    @property
    def kind(self) -> str:
        return KINDS[self.version][self.plural][0]


@dataclass(slots=True)
class Cluster:
    """The objects there are, and what happened to them, in order."""

    pod_phase: str = "Succeeded"
    objects: dict[Target, Document] = field(default_factory=dict)
    changes: list[tuple[str, Target, Document]] = field(default_factory=list)
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def put(self, target: Target, document: Document) -> Document:
        before = self.objects.get(target)
        number = str(next(self.numbers))
        metadata = document.setdefault("metadata", {})
        kept = before["metadata"] if before else {"uid": f"uid-{number}", "creationTimestamp": "2026-01-01T00:00:00Z"}
        metadata |= {"name": target.name, "resourceVersion": number, "uid": kept["uid"]}
        metadata["creationTimestamp"] = kept["creationTimestamp"]
        if target.namespace:
            metadata["namespace"] = target.namespace
        document |= {"apiVersion": target.version, "kind": target.kind}
        if target.kind == "Pod":
            document["status"] = {"phase": self.pod_phase}
        self.objects[target] = document
        self.changes.append(("MODIFIED" if before else "ADDED", target, document))
        return document

    def delete(self, target: Target) -> Document | None:
        document = self.objects.pop(target, None)
        if document is not None:
            document["metadata"]["resourceVersion"] = str(next(self.numbers))
            self.changes.append(("DELETED", target, document))
        return document

    def of_kind(self, kind: str) -> dict[str, Document]:
        """Objects of a kind by name, without the records that helm keeps of its releases."""
        return {
            target.name: document
            for target, document in self.objects.items()
            if target.kind == kind and document.get("type") != "helm.sh/release.v1"
        }


def create_api(cluster: Cluster) -> FastAPI:
    """The HTTP interface over `cluster`."""
    app = FastAPI(openapi_url=None)
    app.add_api_route("/version", lambda: {"major": "1", "minor": "34", "gitVersion": "v1.34.0"})
    app.add_api_route("/api", lambda: {"kind": "APIVersions", "versions": ["v1"]})
    app.add_api_route("/apis", _groups)
    app.add_api_route("/openapi/v3", _openapi_index)
    app.add_api_route("/openapi/v3/{path:path}", _openapi)

    async def objects(request: Request, path: str) -> Response:
        target = parse(path)
        if target is None:
            return _status(404, "NotFound", f"the stand-in has nothing at {path}")
        if not target.plural:
            return JSONResponse(_resources(target.version))
        return await _answer(cluster, target, request)

    app.add_api_route("/{path:path}", objects, methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
    return app


def parse(path: str) -> Target | None:
    """/api/v1/namespaces/x/pods/y and the like."""
    parts = path.strip("/").split("/")
    version, rest = (parts[1], parts[2:]) if parts[0] == "api" else ("/".join(parts[1:3]), parts[3:])
    if version not in KINDS:
        return None
    namespace = ""
    if len(rest) >= 3 and rest[0] == "namespaces":
        namespace, rest = rest[1], rest[2:]
    plural, name = (*rest, "", "")[:2]
    if plural and plural not in KINDS[version]:
        return None
    return Target(version, plural, namespace, name)


async def _answer(cluster: Cluster, target: Target, request: Request) -> Response:
    if request.method == "GET" and not target.name:
        selected = _selector(
            target, request.query_params.get("labelSelector"), request.query_params.get("fieldSelector")
        )
        if request.query_params.get("watch") in ("true", "1"):
            return StreamingResponse(_watch(cluster, target, selected, request), media_type="application/json")
        items = [document for at, document in cluster.objects.items() if selected(at, document)]
        metadata = {"resourceVersion": str(next(cluster.numbers))}
        return JSONResponse(
            {"apiVersion": target.version, "kind": f"{target.kind}List", "metadata": metadata, "items": items}
        )
    if request.method == "POST":
        document = await _body(request)
        target = Target(target.version, target.plural, target.namespace, document["metadata"]["name"])
        if target in cluster.objects:
            return _status(409, "AlreadyExists", f"{target.plural} {target.name!r} already exists")
        return JSONResponse(cluster.put(target, document), 201)
    before = cluster.objects.get(target)
    media_type = request.headers.get("content-type", "")
    if before is None and media_type != "application/apply-patch+yaml":
        return _status(404, "NotFound", f'{target.plural} "{target.name}" not found')
    if request.method == "GET":
        return JSONResponse(before)
    if request.method == "DELETE":
        return JSONResponse(cluster.delete(target))
    document = await _body(request)
    if request.method == "PATCH" and media_type != "application/apply-patch+yaml":
        assert before is not None
        document = patched(before, document, strategic="strategic" in media_type)
    return JSONResponse(cluster.put(target, document), 200 if before else 201)


async def _body(request: Request) -> Document:
    content = await request.body()
    media_type = request.headers.get("content-type", "")
    if media_type == "application/vnd.kubernetes.protobuf":
        return decode_secret(content)
    document: Document = yaml.safe_load(content) if "yaml" in media_type else json.loads(content)
    return document


def patched(before: Document, patch: Document, strategic: bool) -> Document:
    """`before` after a JSON merge patch (RFC 7386), or a strategic one: lists of named elements are merged, too."""
    result = dict(before)
    for key, value in patch.items():
        if key.startswith("$"):
            continue  # directives about order
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            result[key] = patched(result.get(key) or {}, value, strategic)
        elif strategic and value and isinstance(value[0] if isinstance(value, list) else None, dict):
            result[key] = _merged(result.get(key) or [], value, MERGE_KEYS.get(key, "name"))
        else:
            result[key] = value
    return result


def _merged(before: list[Document], patch: list[Document], key: str) -> list[Document]:
    """Elements that are in both are patched, those with `$patch: delete` go, the others are added."""
    result = list(before)
    for element in patch:
        places = [at for at, there in enumerate(result) if there.get(key) == element.get(key)]
        if element.get("$patch") == "delete":
            result = [there for there in result if there.get(key) != element.get(key)]
        elif places:
            result[places[0]] = patched(result[places[0]], element, strategic=True)
        else:
            result.append(element)
    return result


def _selector(target: Target, labels: str | None, fields: str | None) -> Any:
    wanted = dict(part.split("=", 1) for part in (labels or "").replace("==", "=").split(",") if part)
    name = dict(part.split("=", 1) for part in (fields or "").split(",") if part).get("metadata.name")

    def selected(at: Target, document: Document) -> bool:
        same = (at.version, at.plural) == (target.version, target.plural) and target.namespace in ("", at.namespace)
        has = document["metadata"].get("labels") or {}
        return same and wanted.items() <= has.items() and name in (None, at.name)

    return selected


async def _watch(cluster: Cluster, target: Target, selected: Any, request: Request) -> AsyncIterator[str]:
    """Changes after the version asked for; or everything there is, a bookmark, then what changes (a watch-list)."""
    since, seen = int(request.query_params.get("resourceVersion") or 0), 0
    if request.query_params.get("sendInitialEvents") == "true":
        since, seen = 0, len(cluster.changes)
        for at, document in list(cluster.objects.items()):
            if selected(at, document):
                yield _event("ADDED", document)
        metadata = {"resourceVersion": str(next(cluster.numbers)), "annotations": {"k8s.io/initial-events-end": "true"}}
        yield _event("BOOKMARK", {"apiVersion": target.version, "kind": target.kind, "metadata": metadata})
    while not await request.is_disconnected():
        for change, at, document in cluster.changes[seen:]:
            if selected(at, document) and int(document["metadata"]["resourceVersion"]) > since:
                yield _event(change, document)
        seen = len(cluster.changes)
        await asyncio.sleep(WATCH_POLL_SECONDS)


def _event(change: str, document: Document) -> str:
    return json.dumps({"type": change, "object": document}) + "\n"


def _groups() -> Document:
    groups = []
    for version in KINDS:
        if "/" in version:
            name, short = version.split("/")
            known = {"groupVersion": version, "version": short}
            groups.append({"name": name, "versions": [known], "preferredVersion": known})
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def _resources(version: str) -> Document:
    resources = [
        {"name": plural, "singularName": "", "namespaced": namespaced, "kind": kind, "verbs": VERBS}
        for plural, (kind, namespaced) in KINDS[version].items()
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}


def _openapi_index() -> Document:
    paths = {version: f"apis/{version}" if "/" in version else f"api/{version}" for version in KINDS}
    return {"paths": {path: {"serverRelativeURL": f"/openapi/v3/{path}?hash=0"} for path in paths.values()}}


def _openapi(path: str) -> Document:
    """Says of every kind that PATCH takes `fieldValidation`: so clients leave the checking of fields to the server."""
    version = path.split("/", 1)[1]
    group, _, short = version.rpartition("/")
    paths = {}
    for plural, (kind, namespaced) in KINDS[version].items():
        within = "namespaces/{namespace}/" if namespaced else ""
        paths[f"/{path}/{within}{plural}/{{name}}"] = {
            "patch": {
                "parameters": [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}],
                "responses": {"200": {"description": "OK"}},
                "x-kubernetes-group-version-kind": {"group": group, "version": short, "kind": kind},
            }
        }
    return {"openapi": "3.0.0", "info": {"title": "stand-in", "version": "1"}, "paths": paths}


def _status(code: int, reason: str, message: str) -> JSONResponse:
    status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message}
    return JSONResponse(status | {"code": code}, code)
