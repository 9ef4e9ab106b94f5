{{- define "moe-forward.probes" -}}
{{- $values := .root.Values -}}
{{- if eq .role "worker" -}}
# Ray's own health routes need the dashboard's agent, which is not installed; the raylet's port tells as much.
startupProbe:
  tcpSocket:
    port: raylet
  periodSeconds: 5
  # Joining takes as long as the head needs to come up.
  failureThreshold: 60
livenessProbe:
  tcpSocket:
    port: raylet
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  tcpSocket:
    port: raylet
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 1
{{- else -}}
startupProbe:
  {{- include "moe-forward.healthCheck" (dict "root" .root "path" "/v2/health/ready") | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 5
  # Loading ends by itself after start_timeout_seconds, and waiting for workers does; the kubelet must not be first.
  {{- $waits := ternary 2 1 (gt (int $values.rayCluster.workers.replicas) 0) }}
  failureThreshold: {{ add (int (ceil (divf (mulf $values.config.start_timeout_seconds $waits) 10))) (ternary 3 9 (eq .role "server")) }}
livenessProbe:
  {{- include "moe-forward.healthCheck" (dict "root" .root "path" "/v2/health/live") | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  {{- include "moe-forward.healthCheck" (dict "root" .root "path" "/v2/health/ready") | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 1
{{- end -}}
{{- end -}}

{{- define "moe-forward.healthCheck" -}}
{{- $values := .root.Values -}}
{{- if $values.tls.clientCA -}}
exec:
  command:
    - python
    - -c
    - |
      {{- .root.Files.Get "files/probe.py" | trim | nindent 6 }}
    - https://127.0.0.1:{{ int $values.config.port }}{{ .path }}
    - /etc/moe-forward/tls
{{- else -}}
httpGet:
  path: {{ .path }}
  port: http
  {{- if $values.tls.existingSecret }}
  scheme: HTTPS
  {{- end }}
{{- end -}}
{{- end -}}
