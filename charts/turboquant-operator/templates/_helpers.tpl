{{/* Name of every object of the release: the release's own where it already says what this is. */}}
{{- define "turboquant-operator.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Name of what is not in a namespace: two releases may have the same name in different ones. */}}
{{- define "turboquant-operator.clusterName" -}}
{{ include "turboquant-operator.name" . }}:{{ .Release.Namespace }}
{{- end -}}

{{/* What finds the operator's pod. A Deployment's selector can never change. */}}
{{- define "turboquant-operator.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "turboquant-operator.labels" -}}
{{ include "turboquant-operator.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: operator
app.kubernetes.io/part-of: turboquant
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{/* Where the operator's Lease is: it must be in a namespace that the operator watches. */}}
{{- define "turboquant-operator.leaseNamespace" -}}
{{ first .Values.watchNamespaces | default .Release.Namespace }}
{{- end -}}

{{/* What the operator does in a namespace that it watches. No Secrets: pods are handed them by name. */}}
{{- define "turboquant-operator.rules" -}}
- apiGroups: [serving.turboquant.io]
  resources: [turboquantdeployments]
  verbs: [get, list, watch]
- apiGroups: [serving.turboquant.io]
  resources: [turboquantdeployments/status]
  verbs: [patch]
- apiGroups: [serving.turboquant.io]
  resources: [turboquantdeployments/finalizers] # to own children, where the API server asks for this right
  verbs: [update]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [services, configmaps, persistentvolumeclaims, pods]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [events]
  verbs: [list, watch, create] # what the kubelet says of volumes stands in events alone
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  resourceNames: [turboquant-operator]
  verbs: [list, watch]
{{- end -}}
