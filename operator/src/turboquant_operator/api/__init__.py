"""The API `serving.turboquant.io/v1alpha1`: the types that users write and read.

`spec` and `status` are the single source: the CRD in ``crds/`` is generated from them by `crd`.
"""

GROUP = "serving.turboquant.io"
VERSION = "v1alpha1"
KIND = "TurboQuantDeployment"
PLURAL = "turboquantdeployments"
SINGULAR = "turboquantdeployment"
SHORT_NAME = "tqd"
API_VERSION = f"{GROUP}/{VERSION}"
