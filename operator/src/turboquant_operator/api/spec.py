"""`spec` of a TurboQuantDeployment: what a user asks for. Only `model.uri` is needed.

Parsed once, at the edge of a reconcile; every rule that can be decided from the object alone is a CEL
rule here, so that the API server refuses the object and names the field and the way out.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from turboquant_kernels.formats import FORMAT_NAMES, QUALITIES, TIER_NAMES
from turboquant_operator.api import GROUP
from turboquant_operator.api.schema import AnyObject, APIModel, Quantity, Resources, Tensor, rule, rules

NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
Name = Annotated[
    str,
    Field(
        max_length=253,
        json_schema_extra=rules(
            rule(
                "self.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$')",
                "must be the name of an object: lower-case letters, digits, '-' and '.'",
            )
        ),
    ),
]
Labels = Annotated[dict[str, str], Field(json_schema_extra={"maxProperties": 64})]

_MODEL_URI = (
    r"^(hf://[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?"
    r"|pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[A-Za-z0-9_./-]*)?"
    r"|s3://.+|oci://.+)$"
)

OWNED_FLAGS = {
    "--model": "spec.model.uri",
    "--revision": "spec.model.revision",
    "--served-model-name": "spec.model.servedName",
    "--trust-remote-code": "spec.model.trustRemoteCode",
    "--no-trust-remote-code": "spec.model.trustRemoteCode",
    "--kv-cache-dtype": "spec.kvCache.format",
    "--kv-cache-dtype-skip-layers": "spec.kvCache.skipLayers",
    "--kv-cache-memory-bytes": "spec.kvCache.memory",
    "--num-gpu-blocks-override": "spec.kvCache.memory",
    "--additional-config": "spec.kvCache.planRef",
    "--max-model-len": "spec.capacity.contextLength",
    "--tensor-parallel-size": "spec.parallelism.tensor",
    "-tp": "spec.parallelism.tensor",
    "--pipeline-parallel-size": "spec.parallelism.pipeline",
    "-pp": "spec.parallelism.pipeline",
    "--data-parallel-size": "spec.replicas",
    "-dp": "spec.replicas",
    "--gpu-memory-utilization": "spec.engine.gpuMemoryUtilizationPercent",
    "--device-memory-utilization": "spec.engine.gpuMemoryUtilizationPercent",
    "--api-key": "spec.service.apiKeySecretRef",
    "--port": "spec.service.port",
    "--host": "the operator (all addresses of the pod)",
}
"""Engine flags that a field of the API owns, each with its owner: refused in `engine.args`."""

OWNED_ENV = {
    "VLLM_ENGINE_READY_TIMEOUT_S": "spec.engine.startupTimeoutSeconds",
    "VLLM_CPU_KVCACHE_SPACE": "spec.kvCache.memory",
    "VLLM_API_KEY": "spec.service.apiKeySecretRef",
    "HF_TOKEN": "spec.model.credentialsSecretRef",
    "HF_HOME": "spec.model.cache",
    "HOME": "the operator (the one writable folder)",
}
"""Environment variables that a field of the API owns: refused in `engine.env`."""


def _owned_flag_rule(flag: str, owner: str) -> dict[str, Any]:
    # vLLM reads --a-b and --a_b alike, takes any unambiguous beginning of a flag for the flag, and the value
    # after "=" or (fields of JSON values) after ".".
    return rule(
        "self.map(arg, arg.find('^--?[A-Za-z][^=. ]*').replace('_', '-'))"
        f".all(name, name == '' || !'{flag}'.startsWith(name))",
        f"{flag} (in full or shortened) is set by {owner}: remove it from engine.args",
    )


class SecretReference(APIModel):
    """A Secret in the object's namespace."""

    name: Name
    """Name of the Secret."""


class ConfigMapReference(APIModel):
    """A ConfigMap in the object's namespace."""

    name: Name
    """Name of the ConfigMap."""


class ModelCache(APIModel):
    """Where downloaded weights stay between pods; without it they live in the pod (emptyDir)."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "has(self.size) || !has(self.storageClassName)",
                "storageClassName is of a claim that the operator makes: set size too, or remove it",
                fieldPath=".storageClassName",
            )
        )
    )

    claim_name: Name
    """A PersistentVolumeClaim. It must exist, unless `size` is given."""
    size: Quantity | None = None
    """Let the operator make the claim, of this size. It is deleted with the object: it holds only copies."""
    storage_class_name: Name | None = None
    """Storage class of the claim that the operator makes; the cluster's default when unset."""
    access_mode: Literal["ReadWriteOnce", "ReadWriteMany"] = "ReadWriteOnce"
    """Access mode of the claim that the operator makes. Pods on several nodes need ReadWriteMany."""


class Architecture(APIModel):
    """Facts about the model, for when its config.json cannot be read. What is given here wins."""

    layers: PositiveInt | None = None
    """Number of attention layers."""
    attention_heads: PositiveInt | None = None
    """Query heads."""
    key_value_heads: PositiveInt | None = None
    """KV heads."""
    head_dim: PositiveInt | None = None
    """Elements of one head's key."""
    context_length: PositiveInt | None = None
    """The model's own maximum of tokens in a sequence."""
    weight_bytes: PositiveInt | None = None
    """Bytes of all weights as the engine loads them."""


class Model(APIModel):
    """Which model is served, and how it is reached."""

    uri: Annotated[
        str,
        Field(
            max_length=512,
            json_schema_extra=rules(
                rule(
                    f"self.matches('{_MODEL_URI}') && !self.contains('..')",
                    "must be hf://organisation/name, pvc://claim/path, s3://bucket/path or oci://image",
                )
            ),
        ),
    ]
    """hf://organisation/name, pvc://claim/path, s3://bucket/path or oci://image. A change rolls the pods."""
    revision: Annotated[str, Field(max_length=128)] = ""
    """Branch, tag or commit of a hub model; the hub's default branch when empty. The commit that it names
    when the model is first read is served until uri or revision change: a branch that moves rolls nothing."""
    served_name: Annotated[str, Field(max_length=128)] = ""
    """The model name in the OpenAI API; the object's name when empty."""
    credentials_secret_ref: SecretReference | None = None
    """Secret with the key `token` for hf://, the usual AWS names for s3://."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository ships."""
    architecture: Architecture = Architecture()
    cache: ModelCache | None = None


class KVCache(APIModel):
    """How keys and values are stored."""

    format: Literal["auto", *TIER_NAMES, *FORMAT_NAMES] = "auto"  # type: ignore[valid-type]
    """auto, bf16, fp8, a tier such as tq-balanced, which gives each layer its own bits, or a TurboQuant
    format for all layers alike: `--kv-cache-dtype` names."""
    quality: Literal[tuple(QUALITIES)] = "balanced"  # type: ignore[valid-type]
    """The lowest tier that format auto may use."""
    plan_ref: ConfigMapReference | None = None
    """ConfigMap whose key `plan.json` is a KV plan: bits per layer."""
    skip_layers: Annotated[
        tuple[NonNegativeInt, ...], Field(max_length=256, json_schema_extra={"x-kubernetes-list-type": "set"})
    ] = ()
    """Indices of layers kept in the model's own dtype."""
    memory: Quantity | None = None
    """Cache memory per GPU (on cpu per replica, and needed there); wins over the memory utilization."""


class Capacity(APIModel):
    """What the user needs. The plan meets it or the object says why it cannot."""

    context_length: PositiveInt | None = None
    """Tokens in one sequence, prompt and answer together; the model's maximum when unset."""
    concurrent_sequences: PositiveInt = 1
    """Sequences of that length that must fit at once. A promise of capacity, not a batch limit."""


class Accelerator(APIModel):
    """The hardware of one replica."""

    type: Annotated[
        str,
        Field(
            max_length=63,
            json_schema_extra=rules(
                rule(
                    "self.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$')",
                    "must be auto, cpu or a name such as nvidia-h100-80gb: lower-case letters, digits, "
                    "'-' and '.'",
                )
            ),
        ),
    ] = "auto"
    """A name from the catalogue such as nvidia-h100-80gb, auto for what the nodes' labels say, cpu to try."""


class Parallelism(APIModel):
    """How one replica is spread over GPUs: tensor x pipeline of them."""

    tensor: Tensor = "auto"
    """Tensor-parallel size: auto, or an integer that divides the attention heads."""
    pipeline: PositiveInt = 1
    """Pipeline-parallel size."""


class EnvVar(APIModel):
    """One environment variable of the engine's container."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!(has(self.value) && has(self.valueFrom))",
                "value and valueFrom exclude each other: remove one of the two",
            )
        )
    )

    name: Annotated[str, Field(min_length=1, max_length=256)]
    """Name of the variable."""
    value: Annotated[str, Field(max_length=4096)] | None = None
    """Its value."""
    value_from: AnyObject | None = None
    """Where its value is read from, as in a container: `secretKeyRef`, `configMapKeyRef`, `fieldRef`."""


class Engine(APIModel):
    """The vLLM server itself."""

    image: Annotated[str, Field(max_length=512)] = ""
    """Runtime image; the operator's own default when empty."""
    args: Annotated[
        tuple[Annotated[str, Field(max_length=512)], ...],
        Field(
            max_length=64,
            json_schema_extra=rules(
                *(_owned_flag_rule(flag, owner) for flag, owner in OWNED_FLAGS.items()),
                rule(
                    "!self.exists(arg, arg == '--config' || arg.startsWith('--config='))",
                    "--config reads flags that nobody can check: list them in engine.args instead",
                ),
            ),
        ),
    ] = ()
    """Further engine flags, such as --max-num-seqs=64."""
    env: Annotated[
        tuple[EnvVar, ...],
        Field(
            max_length=64,
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
                **rules(
                    *(
                        rule(f"self.all(e, e.name != '{n}')", f"{n} is set by {o}: remove it from engine.env")
                        for n, o in OWNED_ENV.items()
                    )
                ),
            },
        ),
    ] = ()
    """Further environment variables of the engine."""
    gpu_memory_utilization_percent: Annotated[int, Field(ge=1, le=99)] = 90
    """Share of each GPU's memory that the engine may use."""
    startup_timeout_seconds: Annotated[int, Field(ge=30, le=86400)] = 1800
    """Time from container start to ready: startup probe, engine timeout and progress deadline alike."""


class Service(APIModel):
    """The OpenAI-compatible endpoint."""

    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port of the Service."""
    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    """How the Service is reached from outside the cluster, if at all."""
    annotations: Labels = {}
    """Annotations of the Service."""
    api_key_secret_ref: SecretReference | None = None
    """Secret whose key `api-key` clients must send as bearer token."""


class Pod(APIModel):
    """Placement of the engine's pods: typed fields of the pod, no free template."""

    labels: Annotated[
        dict[str, str],
        Field(
            json_schema_extra={
                "maxProperties": 64,
                **rules(
                    rule(
                        f"!self.exists(k, k.startsWith('app.kubernetes.io/') || k.startsWith('{GROUP}/'))",
                        f"labels that begin with app.kubernetes.io/ or {GROUP}/ are the operator's: "
                        "remove them from pod.labels",
                    )
                ),
            }
        ),
    ] = {}
    """Further labels of the pods."""
    annotations: Labels = {}
    """Further annotations of the pods."""
    node_selector: Labels = {}
    """Labels that a node must have."""
    tolerations: Annotated[tuple[AnyObject, ...], Field(max_length=64)] = ()
    """Taints of nodes that the pods put up with."""
    affinity: AnyObject | None = None
    """Node and pod affinity."""
    priority_class_name: Name | None = None
    """PriorityClass of the pods."""
    runtime_class_name: Name | None = None
    """RuntimeClass of the pods."""
    resources: Resources | None = None
    """Requests and limits of the engine's container; the operator adds the GPUs."""
    volumes: Annotated[tuple[AnyObject, ...], Field(max_length=64)] = ()
    """Further volumes of the pods."""
    volume_mounts: Annotated[tuple[AnyObject, ...], Field(max_length=64)] = ()
    """Where the engine's container mounts them."""
    image_pull_secrets: Annotated[tuple[SecretReference, ...], Field(max_length=16)] = ()
    """Secrets for the registry of `engine.image`."""
    service_account_name: Name | None = None
    """ServiceAccount of the pods; the namespace's default one when unset. Its token is never mounted."""


class TurboQuantDeploymentSpec(APIModel):
    """A model served by vLLM on a compressed KV cache."""

    model: Model
    kv_cache: KVCache = KVCache()
    capacity: Capacity = Capacity()
    accelerator: Accelerator = Accelerator()
    parallelism: Parallelism = Parallelism()
    replicas: Annotated[int, Field(ge=0, json_schema_extra={"format": "int32"})] = 1
    """Replicas; an autoscaler writes it through the scale subresource."""
    engine: Engine = Engine()
    service: Service = Service()
    pod: Pod = Pod()
    suspend: bool = False
    """Give the GPUs back and keep everything else."""
    plan_only: bool = False
    """Plan into status and create no pod."""


SPEC_RULES = rules(
    rule(
        "self.accelerator.type != 'cpu' || has(self.kvCache.memory)",
        "kvCache.memory is needed with accelerator.type cpu: set it, for example to 4Gi",
        reason="FieldValueRequired",
        fieldPath=".kvCache.memory",
    ),
    rule(
        "self.accelerator.type != 'cpu' || self.parallelism.pipeline == 1 && "
        "(type(self.parallelism.tensor) == string || self.parallelism.tensor == 1)",
        "parallelism.tensor and parallelism.pipeline are 1 with accelerator.type cpu: remove them",
        fieldPath=".parallelism",
    ),
    rule(
        "!has(self.kvCache.planRef) || self.kvCache.format == 'auto'",
        "kvCache.format must be auto where kvCache.planRef names the bits per layer: remove one of the two",
        fieldPath=".kvCache.format",
    ),
    rule(
        "!has(self.model.revision) || self.model.revision == '' || self.model.uri.startsWith('hf://')",
        "model.revision is the branch, tag or commit of a hf:// model: remove it",
        fieldPath=".model.revision",
    ),
    rule(
        "!has(self.model.cache) || !self.model.uri.startsWith('pvc://')",
        "model.cache is not used with pvc://, where the weights already are: remove it",
        fieldPath=".model.cache",
    ),
    rule(
        "!has(self.model.credentialsSecretRef) || !self.model.uri.startsWith('pvc://')",
        "model.credentialsSecretRef is not used with pvc://: remove it",
        fieldPath=".model.credentialsSecretRef",
    ),
)
"""Rules that join two fields of the spec."""

NAME_RULE = rule(
    "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$') && size(self.metadata.name) <= 52",
    "metadata.name names the Service and the pods: use at most 52 lower-case letters, digits and '-', "
    "with a letter first",
)
"""Rule on the root of the object. 63 characters of a label, less the longest suffix of a child's name."""
