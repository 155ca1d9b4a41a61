{{/* Labels that select the pods of a release; with a component, one kind of them. */}}
{{- define "pshare.selector" -}}
app.kubernetes.io/name: pshare-jax
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "pshare.labels" -}}
{{ include "pshare.selector" . }}
app.kubernetes.io/part-of: pshare-jax
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* preStop, server.drain_seconds, and what ends thereafter. */}}
{{- define "pshare.grace" -}}
{{ add (int .Values.config.server.drain_seconds) 20 }}
{{- end }}

{{- define "pshare.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "pshare.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Pods are spread over nodes; takes the component. */}}
{{- define "pshare.spread" -}}
- maxSkew: 1
  topologyKey: kubernetes.io/hostname
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels:
      {{- include "pshare.selector" .root | nindent 6 }}
      app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* Mounts and volumes of all pods. */}}
{{- define "pshare.mounts" -}}
- {name: config, mountPath: /etc/pshare, readOnly: true}
- {name: control, mountPath: /run/secrets/pshare-control, readOnly: true}
- {name: checkpoints, mountPath: /checkpoints, readOnly: true}
- {name: cache, mountPath: /var/cache/pshare}
- {name: tmp, mountPath: /tmp}
{{- end }}

{{- define "pshare.volumes" -}}
- name: config
  configMap: {name: {{ .Release.Name }}-config}
- name: control
  secret: {secretName: {{ .Values.secrets.control }}, defaultMode: 0440}
- name: checkpoints
  persistentVolumeClaim: {claimName: {{ .Values.checkpoints.claim }}, readOnly: true}
- name: cache
  emptyDir: {}
- name: tmp
  emptyDir: {}
{{- end }}
