{{/*
The Secrets of the front end: name of the volume, its Secret, its folder under /etc/moe-forward, and the keys in it.
Workers have none of them.
*/}}
{{- define "moe-forward.secrets" -}}
{{- with .Values.apiKeys -}}
{{- if .existingSecret }}
- name: api-keys
  secretName: {{ .existingSecret }}
  folder: api-keys
  items:
    - key: {{ .key }}
      path: keys
{{- end }}
{{- end }}
{{- with .Values.adminToken -}}
{{- if .existingSecret }}
- name: admin-token
  secretName: {{ .existingSecret }}
  folder: admin
  items:
    - key: {{ .key }}
      path: token
{{- end }}
{{- end }}
{{- with .Values.tls -}}
{{- if .existingSecret }}
- name: tls
  secretName: {{ .existingSecret }}
  folder: tls
  items:
    - key: tls.crt
      path: tls.crt
    - key: tls.key
      path: tls.key
    {{- if .clientCA }}
    - key: ca.crt
      path: ca.crt
    {{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "moe-forward.hasModels" -}}
{{- with .Values.models -}}
{{- if or .existingClaim .hostPath .download.image -}}
true
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "moe-forward.volumes" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- if ne .role "worker" -}}
- name: config
  configMap:
    name: {{ include "moe-forward.fullname" $root }}
{{- range include "moe-forward.secrets" $root | fromYamlArray }}
- name: {{ .name }}
  secret:
    secretName: {{ .secretName }}
    items:
      {{- toYaml .items | nindent 6 }}
{{- end }}
{{ end -}}
{{- if $values.models.existingClaim -}}
- name: models
  persistentVolumeClaim:
    claimName: {{ $values.models.existingClaim }}
    readOnly: true
{{ else if $values.models.hostPath -}}
- name: models
  hostPath:
    path: {{ $values.models.hostPath }}
    type: Directory
{{ else if $values.models.download.image -}}
- name: models
  emptyDir:
    sizeLimit: {{ $values.models.download.size }}
{{ end -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ $values.tmpSize }}
- name: cache
  emptyDir:
    sizeLimit: {{ $values.cacheSize }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ $values.shmSize }}
{{- with $values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "moe-forward.mounts" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- if ne .role "worker" -}}
- name: config
  mountPath: /etc/moe-forward/config
  readOnly: true
{{- range include "moe-forward.secrets" $root | fromYamlArray }}
- name: {{ .name }}
  mountPath: /etc/moe-forward/{{ .folder }}
  readOnly: true
{{- end }}
{{ end -}}
{{- if eq (include "moe-forward.hasModels" $root) "true" -}}
- name: models
  mountPath: {{ $values.models.mountPath }}
  readOnly: true
{{ end -}}
- name: tmp
  mountPath: /tmp
- name: cache
  mountPath: /var/cache/moe-forward
- name: shm
  mountPath: /dev/shm
{{- with $values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}
