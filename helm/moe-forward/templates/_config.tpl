{{/* Hosts with ranks of one expert pool. */}}
{{- define "moe-forward.rankPods" -}}
{{- if eq .Values.workload.kind "RayCluster" -}}
{{- $workers := mul (int .Values.rayCluster.workers.replicas) (int .Values.rayCluster.workers.numOfHosts) -}}
{{- $head := ternary 0 1 (and .Values.gpu.enabled (not .Values.rayCluster.headGpus)) -}}
{{- add $workers $head -}}
{{- else -}}
1
{{- end -}}
{{- end -}}

{{/* Places for ranks in a pod that has any. */}}
{{- define "moe-forward.ranksPerPod" -}}
{{- ternary .Values.gpu.count .Values.rayCluster.cpuRanks .Values.gpu.enabled | int -}}
{{- end -}}

{{/* The configuration document, with what other values imply; what the operator set himself stays. */}}
{{- define "moe-forward.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- $implied := dict -}}
{{- if .Values.gpu.enabled -}}
{{- $_ := set $implied "device" "cuda" -}}
{{- end -}}
{{- if eq .Values.workload.kind "RayCluster" -}}
{{- $_ := set $implied "ray_address" "auto" -}}
{{- /* Said, not counted at start: workers may join after the head. */ -}}
{{- $_ := set $implied "ranks" (mul (include "moe-forward.rankPods" . | int) (include "moe-forward.ranksPerPod" . | int)) -}}
{{- end -}}
{{- if .Values.apiKeys.existingSecret -}}
{{- $_ := set $implied "api_keys_file" "/etc/moe-forward/api-keys/keys" -}}
{{- else if not (or $config.api_keys_file .Values.tls.clientCA) -}}
{{- /* The NetworkPolicy says who may call; the chart's checks refuse to do without both. */ -}}
{{- $_ := set $implied "allow_anonymous" true -}}
{{- end -}}
{{- if .Values.adminToken.existingSecret -}}
{{- $_ := set $implied "admin_token_file" "/etc/moe-forward/admin/token" -}}
{{- end -}}
{{- if .Values.tls.existingSecret -}}
{{- $_ := set $implied "tls_certificate_file" "/etc/moe-forward/tls/tls.crt" -}}
{{- $_ := set $implied "tls_key_file" "/etc/moe-forward/tls/tls.key" -}}
{{- if .Values.tls.clientCA -}}
{{- $_ := set $implied "tls_client_ca_file" "/etc/moe-forward/tls/ca.crt" -}}
{{- end -}}
{{- end -}}
{{- range $key, $value := $implied -}}
{{- if not (hasKey $config $key) -}}
{{- $_ := set $config $key $value -}}
{{- end -}}
{{- end -}}
{{- toPrettyJson $config -}}
{{- end -}}

{{/* From a pod's leaving the Service to SIGKILL: the preStop pause, the drain, and stopping the ranks. */}}
{{- define "moe-forward.gracePeriodSeconds" -}}
{{- add (int .Values.preStopSeconds) (int (ceil .Values.config.drain_timeout_seconds)) 30 -}}
{{- end -}}
