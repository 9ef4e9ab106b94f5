{{/* Name of every resource: the release's, with the chart's unless it is in there already. */}}
{{- define "moe-forward.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "moe-forward.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "moe-forward.labels" -}}
{{ include "moe-forward.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "moe-forward.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "moe-forward.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "moe-forward.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{/* The configuration document, with what other values imply. */}}
{{- define "moe-forward.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- range $key := list "port" "metrics_port" -}}
{{- if not (get $config $key) -}}
{{- fail (printf "config.%s: expected a port from 1 to 65535, got %v" $key (get $config $key)) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.gpu.enabled (not (hasKey $config "device")) -}}
{{- $_ := set $config "device" "cuda" -}}
{{- end -}}
{{- if .Values.adminToken.existingSecret -}}
{{- $_ := set $config "admin_token_file" "/etc/moe-forward/admin/token" -}}
{{- end -}}
{{- toPrettyJson $config -}}
{{- end -}}

{{/* From a pod's leaving the Service to SIGKILL: the preStop pause, the drain, and stopping the ranks. */}}
{{- define "moe-forward.gracePeriodSeconds" -}}
{{- add (int .Values.preStopSeconds) (int (ceil .Values.config.drain_timeout_seconds)) 30 -}}
{{- end -}}
