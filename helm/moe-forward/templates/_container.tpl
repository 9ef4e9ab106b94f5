{{- define "moe-forward.container" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- $ray := ne .role "server" -}}
- name: moe-forward
  image: {{ include "moe-forward.image" $root }}
  imagePullPolicy: {{ $values.image.pullPolicy }}
  {{- if $ray }}
  # As the image does: tini takes in what Ray leaves behind.
  command: ["tini", "--", "/bin/bash", "-c"]
  args:
    - |
      {{- $root.Files.Get (printf "files/start-%s.sh" .role) | trim | nindent 6 }}
  {{- else }}
  args: ["--config", "/etc/moe-forward/config/config.json"]
  {{- end }}
  {{- with concat (include "moe-forward.rayEnv" . | fromYamlArray) $values.extraEnv }}
  env:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  ports:
    {{- if ne .role "worker" }}
    - name: http
      containerPort: {{ int $values.config.port }}
    - name: metrics
      containerPort: {{ int $values.config.metrics_port }}
    {{- end }}
    {{- if eq .role "head" }}
    - name: gcs-server
      containerPort: 6379
    {{- end }}
    {{- if $ray }}
    - name: raylet
      containerPort: {{ include "moe-forward.rayletPort" . }}
    {{- end }}
  {{- include "moe-forward.probes" . | nindent 2 }}
  lifecycle:
    preStop:
      exec:
        # Workers are told to stop together with the head; they stay while it answers what is in flight.
        command: ["sleep", {{ ternary (sub (include "moe-forward.gracePeriodSeconds" $root | int) 25) (int $values.preStopSeconds) (eq .role "worker") | quote }}]
  resources:
    {{- include "moe-forward.resources" . | nindent 4 }}
  securityContext:
    {{- $context := deepCopy $values.securityContext }}
    {{- if and $values.rdma.enabled $values.rdma.ipcLock (eq (include "moe-forward.hasGpus" .) "true") }}
    {{- $capabilities := $context.capabilities | default dict }}
    {{- $_ := set $capabilities "add" (append ($capabilities.add | default list) "IPC_LOCK" | uniq) }}
    {{- $_ := set $context "capabilities" $capabilities }}
    {{- end }}
    {{- toYaml $context | nindent 4 }}
  volumeMounts:
    {{- include "moe-forward.mounts" . | nindent 4 }}
{{- end -}}

{{/* Fixed, so that a probe can ask for it. */}}
{{- define "moe-forward.rayletPort" -}}
6385
{{- end -}}

{{/* KubeRay sets both, too; an operator that does not know authOptions would leave Ray open to everybody. */}}
{{- define "moe-forward.rayEnv" -}}
{{- if ne .role "server" -}}
- name: RAY_AUTH_MODE
  value: token
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ include "moe-forward.rayTokenSecret" .root }}
      key: auth_token
{{- else -}}
[]
{{- end -}}
{{- end -}}

{{- define "moe-forward.resources" -}}
{{- $values := .root.Values -}}
{{- $gpus := eq (include "moe-forward.hasGpus" .) "true" -}}
{{- $resources := deepCopy $values.resources -}}
{{- if and $values.gpu.enabled (not $gpus) $values.rayCluster.headResources -}}
{{- $resources = deepCopy $values.rayCluster.headResources -}}
{{- end -}}
{{- if $gpus -}}
{{- $limits := default (dict) $resources.limits -}}
{{- $_ := set $limits $values.gpu.resourceName (int $values.gpu.count) -}}
{{- if $values.rdma.enabled -}}
{{- $_ := set $limits $values.rdma.resourceName (int $values.rdma.count) -}}
{{- end -}}
{{- $_ := set $resources "limits" $limits -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Writes checkpoints into the pod's own volume, with the rights of the service. */}}
{{- define "moe-forward.download" -}}
{{- $download := .Values.models.download -}}
- name: download
  image: {{ $download.image }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  {{- with $download.command }}
  command:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $download.args }}
  args:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $download.env }}
  env:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  resources:
    requests:
      cpu: 500m
      memory: 512Mi
    limits:
      memory: 4Gi
  securityContext:
    {{- toYaml .Values.securityContext | nindent 4 }}
  volumeMounts:
    - name: models
      mountPath: {{ .Values.models.mountPath }}
    - name: tmp
      mountPath: /tmp
{{- end -}}
