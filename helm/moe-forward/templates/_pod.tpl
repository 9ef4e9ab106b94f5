{{/*
A pod, for every kind of workload: (dict "root" $ "role" "server|head|worker").
A server is a whole service; a head is Ray's head node with the service on it; a worker holds ranks and nothing else.
*/}}
{{- define "moe-forward.pod" -}}
{{- $root := .root -}}
{{- $gpus := eq (include "moe-forward.hasGpus" .) "true" -}}
metadata:
  labels:
    {{- include "moe-forward.selectorLabels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .role }}
    {{- with merge (dict) $root.Values.podLabels $root.Values.commonLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/config: {{ include "moe-forward.config" $root | sha256sum }}
    {{- with merge (dict) $root.Values.podAnnotations $root.Values.commonAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "moe-forward.serviceAccountName" $root }}
  automountServiceAccountToken: false
  # A Service named moe-forward would put MOE_FORWARD_PORT and the like into the environment.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "moe-forward.gracePeriodSeconds" $root }}
  {{- if and $gpus $root.Values.hostNetwork }}
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  {{- end }}
  securityContext:
    {{- toYaml $root.Values.podSecurityContext | nindent 4 }}
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $root.Values.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $root.Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- if $root.Values.models.download.image }}
  initContainers:
    {{- include "moe-forward.download" $root | nindent 4 }}
  {{- end }}
  containers:
    {{- include "moe-forward.container" . | nindent 4 }}
  volumes:
    {{- include "moe-forward.volumes" . | nindent 4 }}
  {{- with include "moe-forward.placement" . | fromYaml }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "moe-forward.hasGpus" -}}
{{- $values := .root.Values -}}
{{- and $values.gpu.enabled (or (ne .role "head") $values.rayCluster.headGpus) -}}
{{- end -}}

{{/* Where the pod may run: as the values say, and pods with GPUs in one NVLink domain. */}}
{{- define "moe-forward.placement" -}}
{{- $values := .root.Values -}}
{{- $key := $values.placement.nvlinkDomainKey -}}
{{- $selector := deepCopy $values.nodeSelector -}}
{{- $affinity := deepCopy $values.affinity -}}
{{- if and $key (eq (include "moe-forward.hasGpus" .) "true") -}}
{{- if $values.placement.nvlinkDomain -}}
{{- $_ := set $selector $key $values.placement.nvlinkDomain -}}
{{- else if eq $values.workload.kind "RayCluster" -}}
{{- $roles := ternary (list "head" "worker") (list "worker") $values.rayCluster.headGpus -}}
{{- $ranks := dict "key" "app.kubernetes.io/component" "operator" "In" "values" $roles -}}
{{- $labels := include "moe-forward.selectorLabels" .root | fromYaml -}}
{{- $term := dict "topologyKey" $key "labelSelector" (dict "matchLabels" $labels "matchExpressions" (list $ranks)) -}}
{{- $pods := $affinity.podAffinity | default dict -}}
{{- $terms := append ($pods.requiredDuringSchedulingIgnoredDuringExecution | default list) $term -}}
{{- $_ := set $affinity "podAffinity" (set $pods "requiredDuringSchedulingIgnoredDuringExecution" $terms) -}}
{{- end -}}
{{- end -}}
{{- $placement := dict "nodeSelector" $selector "affinity" $affinity "tolerations" $values.tolerations -}}
{{- $_ := set $placement "topologySpreadConstraints" $values.topologySpreadConstraints -}}
{{- range $field, $value := $placement -}}
{{- if $value }}
{{ toYaml (dict $field $value) }}
{{- end -}}
{{- end -}}
{{- end -}}
