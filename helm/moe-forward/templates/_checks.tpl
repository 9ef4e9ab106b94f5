{{/* Combinations that cannot work are refused here, with what to change. One value's own range is the schema's. */}}
{{- define "moe-forward.checks" -}}
{{- $kind := .Values.workload.kind -}}
{{- $config := .Values.config -}}
{{- $workers := mul (int .Values.rayCluster.workers.replicas) (int .Values.rayCluster.workers.numOfHosts) -}}
{{- range $key := list "port" "metrics_port" -}}
{{- if not (get $config $key) -}}
{{- fail (printf "config.%s: expected a port from 1 to 65535, got %v" $key (get $config $key)) -}}
{{- end -}}
{{- end -}}
{{- if eq (int $config.port) (int $config.metrics_port) -}}
{{- fail (printf "config.metrics_port: expected another port than config.port, got %d for both" (int $config.port)) -}}
{{- end -}}
{{- if has $config.host (list "127.0.0.1" "localhost" "::1") -}}
{{- fail (printf "config.host: %s is reached by no probe and no Service; use 0.0.0.0" $config.host) -}}
{{- end -}}
{{- if and $config.ray_address (ne $kind "RayCluster") -}}
{{- fail (printf "config.ray_address: only workload.kind RayCluster joins a running Ray, not %s" $kind) -}}
{{- end -}}
{{- if and (ne $kind "StatefulSet") (ne (int .Values.replicaCount) 1) -}}
{{- fail (printf "replicaCount: a %s is one service, got %d; use workload.kind StatefulSet for more, or rayCluster.workers.replicas for more hosts of one service" $kind (int .Values.replicaCount)) -}}
{{- end -}}
{{- if and (ne $kind "RayCluster") (gt $workers 0) -}}
{{- fail (printf "rayCluster.workers.replicas: only workload.kind RayCluster has workers, not %s" $kind) -}}
{{- end -}}
{{- if and (eq $kind "RayCluster") (not (regexMatch "^[a-z]" (include "moe-forward.fullname" .))) -}}
{{- fail (printf "fullnameOverride: KubeRay wants a name that starts with a letter, got %s" (include "moe-forward.fullname" .)) -}}
{{- end -}}
{{- include "moe-forward.checks.devices" . -}}
{{- include "moe-forward.checks.access" . -}}
{{- include "moe-forward.checks.models" . -}}
{{- include "moe-forward.checks.operators" . -}}
{{- end -}}

{{- define "moe-forward.checks.devices" -}}
{{- $config := .Values.config -}}
{{- if .Values.gpu.enabled -}}
{{- $places := mul (include "moe-forward.rankPods" . | int) (int .Values.gpu.count) -}}
{{- if eq .Values.workload.kind "Single" -}}
{{- fail "gpu.enabled: workload.kind Single runs on CPU; use StatefulSet or RayCluster" -}}
{{- end -}}
{{- if eq (int $places) 0 -}}
{{- fail "rayCluster.workers.replicas: without GPUs in the head pod (rayCluster.headGpus) at least one worker is needed" -}}
{{- end -}}
{{- if gt (int $config.ranks) (int $places) -}}
{{- fail (printf "config.ranks: %d ranks need a GPU each, and the pods have %d" (int $config.ranks) (int $places)) -}}
{{- end -}}
{{- if eq ($config.device | default "auto") "cpu" -}}
{{- fail "config.device: cpu with gpu.enabled leaves the GPUs idle; leave one of them out" -}}
{{- end -}}
{{- else -}}
{{- if eq ($config.device | default "auto") "cuda" -}}
{{- fail "config.device: cuda needs gpu.enabled" -}}
{{- end -}}
{{- range $key, $set := dict "rdma.enabled" .Values.rdma.enabled "hostNetwork" .Values.hostNetwork "placement.nvlinkDomainKey" .Values.placement.nvlinkDomainKey -}}
{{- if $set -}}
{{- fail (printf "%s: only pods with GPUs have it, and gpu.enabled is false" $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and .Values.placement.nvlinkDomain (not .Values.placement.nvlinkDomainKey) -}}
{{- fail "placement.nvlinkDomain: name the node label, too (placement.nvlinkDomainKey)" -}}
{{- end -}}
{{- end -}}

{{- define "moe-forward.checks.access" -}}
{{- $known := or .Values.apiKeys.existingSecret .Values.config.api_keys_file .Values.tls.clientCA -}}
{{- if not (or $known .Values.networkPolicy.enabled .Values.config.allow_anonymous) -}}
{{- fail "apiKeys.existingSecret: anyone who reaches the Service could use it; give keys or tls.clientCA, or leave networkPolicy.enabled true, or say config.allow_anonymous: true" -}}
{{- end -}}
{{- if and .Values.tls.clientCA (not .Values.tls.existingSecret) -}}
{{- fail "tls.clientCA: client certificates need TLS; name its Secret (tls.existingSecret)" -}}
{{- end -}}
{{- end -}}

{{- define "moe-forward.checks.models" -}}
{{- $sources := compact (list .Values.models.existingClaim .Values.models.hostPath .Values.models.download.image) -}}
{{- $mount := .Values.models.mountPath -}}
{{- if gt (len $sources) 1 -}}
{{- fail (printf "models: expected one of existingClaim, hostPath and download.image, got %s" (join ", " $sources)) -}}
{{- end -}}
{{- if and (hasPrefix (printf "%s/" $mount) (.Values.config.model | default "")) (not $sources) (not .Values.extraVolumeMounts) -}}
{{- fail (printf "config.model: nothing is mounted at %s; set models.existingClaim, models.hostPath or models.download.image" $mount) -}}
{{- end -}}
{{- end -}}

{{- define "moe-forward.checks.operators" -}}
{{- range $key := list "autoscaling" "keda" -}}
{{- if and (get (get $.Values $key) "enabled") (ne $.Values.workload.kind "StatefulSet") -}}
{{- fail (printf "%s.enabled: only a StatefulSet has replicas to scale, not a %s" $key $.Values.workload.kind) -}}
{{- end -}}
{{- with get $.Values $key -}}
{{- if gt (int .minReplicas) (int .maxReplicas) -}}
{{- fail (printf "%s.minReplicas: expected at most maxReplicas (%d), got %d" $key (int .maxReplicas) (int .minReplicas)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled .Values.keda.enabled -}}
{{- fail "keda.enabled: two autoscalers of one StatefulSet would fight; leave autoscaling.enabled or keda.enabled out" -}}
{{- end -}}
{{- if and .Values.keda.enabled (not .Values.keda.serverAddress) -}}
{{- fail "keda.serverAddress: expected the URL of a Prometheus, got nothing" -}}
{{- end -}}
{{- if and .Values.serviceMonitor.enabled .Values.podMonitor.enabled -}}
{{- fail "podMonitor.enabled: with serviceMonitor.enabled every pod would be scraped twice; leave one out" -}}
{{- end -}}
{{- if eq (int .Values.service.port) (int .Values.service.metricsPort) -}}
{{- fail (printf "service.metricsPort: expected another port than service.port, got %d for both" (int .Values.service.port)) -}}
{{- end -}}
{{- end -}}
