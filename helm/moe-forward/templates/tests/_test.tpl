{{/* Not the Service's labels: these pods serve nothing. */}}
{{- define "moe-forward.testLabels" -}}
app.kubernetes.io/name: moe-forward-test
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* A pod of `helm test`: (dict "root" $ "name" "ready" "arguments" (list)). It is given a key only if it posts. */}}
{{- define "moe-forward.testPod" -}}
{{- $root := .root -}}
apiVersion: v1
kind: Pod
metadata:
  name: {{ include "moe-forward.fullname" $root }}-test-{{ .name }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "moe-forward.testLabels" $root | nindent 4 }}
    {{- with $root.Values.commonLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    helm.sh/hook: test
    helm.sh/hook-weight: {{ .weight | quote }}
    helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
    {{- with $root.Values.commonAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  restartPolicy: Never
  automountServiceAccountToken: false
  enableServiceLinks: false
  securityContext:
    {{- toYaml $root.Values.podSecurityContext | nindent 4 }}
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ .name }}
      image: {{ include "moe-forward.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      command: ["python", "-c"]
      args:
        - |
          {{- $root.Files.Get "files/test.py" | trim | nindent 10 }}
        - {{ include "moe-forward.url" $root }}
        {{- range .arguments }}
        - {{ . }}
        {{- end }}
      resources:
        requests:
          cpu: 50m
          memory: 64Mi
        limits:
          memory: 128Mi
      securityContext:
        {{- toYaml $root.Values.securityContext | nindent 8 }}
      {{- $secrets := list }}
      {{- range include "moe-forward.secrets" $root | fromYamlArray }}
      {{- if or (eq .name "tls") (and (eq .name "api-keys") (eq $.name "forward")) }}
      {{- $secrets = append $secrets . }}
      {{- end }}
      {{- end }}
      {{- with $secrets }}
      volumeMounts:
        {{- range . }}
        - name: {{ .name }}
          mountPath: /etc/moe-forward/{{ .folder }}
          readOnly: true
        {{- end }}
      {{- end }}
  {{- with $secrets }}
  volumes:
    {{- range . }}
    - name: {{ .name }}
      secret:
        secretName: {{ .secretName }}
        items:
          {{- toYaml .items | nindent 10 }}
    {{- end }}
  {{- end }}
{{- end -}}
