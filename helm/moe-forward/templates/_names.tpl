{{/* Name of every resource: the release's, with the chart's unless it is in there already. KubeRay takes 53 letters. */}}
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

{{/* What every pod of the release has, and test pods have not. */}}
{{- define "moe-forward.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* What pods with a front end have: a RayCluster's head, or any pod of the other kinds. */}}
{{- define "moe-forward.frontEndLabels" -}}
{{ include "moe-forward.selectorLabels" . }}
{{- if eq .Values.workload.kind "RayCluster" }}
app.kubernetes.io/component: head
{{- end }}
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

{{/* metadata of a resource: (dict "root" $ "suffix" "-pods" "name" "" "labels" (dict) "annotations" (dict)); root is needed. */}}
{{- define "moe-forward.metadata" -}}
{{- $root := .root -}}
name: {{ .name | default (printf "%s%s" (include "moe-forward.fullname" $root) (.suffix | default "")) }}
namespace: {{ $root.Release.Namespace }}
labels:
  {{- include "moe-forward.labels" $root | nindent 2 }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with merge (dict) (.annotations | default dict) $root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "moe-forward.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "moe-forward.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "moe-forward.rayTokenSecret" -}}
{{- default (printf "%s-ray" (include "moe-forward.fullname" .)) .Values.rayCluster.existingTokenSecret -}}
{{- end -}}

{{- define "moe-forward.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{/* Where a client inside the cluster finds the front end. */}}
{{- define "moe-forward.url" -}}
{{- $scheme := ternary "https" "http" (ne .Values.tls.existingSecret "") -}}
{{- printf "%s://%s.%s.svc:%d" $scheme (include "moe-forward.fullname" .) .Release.Namespace (int .Values.service.port) -}}
{{- end -}}
