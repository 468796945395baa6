"""`status` of a TurboQuantDeployment: what the operator planned and what the running engine has.

Capacities are per replica unless they say total. No floats: ratios are decimal strings.
"""

from typing import Annotated, Literal

from pydantic import Field

from turboquant_operator.api.schema import APIModel

LIST_MAP_BY_TYPE = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}


class Condition(APIModel):
    """metav1.Condition."""

    type: str
    """Ready, Accepted, PlanFits, Progressing, Available or Degraded."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: str
    """Why, in one CamelCase word."""
    message: str
    """Why, in a sentence."""
    observed_generation: int
    """The generation of the object that this was seen on."""
    last_transition_time: Annotated[str, Field(json_schema_extra={"format": "date-time"})]
    """Moved only when `status` changes."""


class ModelStatus(APIModel):
    """What was found out about the model."""

    architecture: str
    """Class name in the model's config.json, such as LlamaForCausalLM."""
    revision: str = ""
    """The commit that the facts were read from, where the source has one."""
    layers: int
    """Attention layers."""
    key_value_heads: int
    """KV heads of a layer."""
    head_dim: int
    """Elements of one head's key."""
    context_length: int
    """The model's own maximum of tokens in a sequence."""
    weight_bytes: int
    """Bytes of all weights as stored."""


class Alternative(APIModel):
    """Another plan that was considered."""

    format: str
    """KV format, by its `--kv-cache-dtype` name."""
    tensor_parallel_size: int
    """GPUs that a layer is split over."""
    predicted_tokens: int
    """Tokens that it would hold."""
    fits: bool
    """Whether it meets the asked capacity."""


class Plan(APIModel):
    """What one replica runs with, and the capacity that this should give."""

    format: str
    """KV format, by its `--kv-cache-dtype` name."""
    key_bits: int
    """Bits of a key coordinate; the rounded mean where a KV plan differs by layer."""
    value_bits: int
    """Bits of a value coordinate, in the same way."""
    tensor_parallel_size: int
    """GPUs that a layer is split over."""
    pipeline_parallel_size: int = 1
    """Groups of GPUs that the layers are split over."""
    accelerator: str = ""
    """The kind of GPU that was planned for, or cpu. `auto` keeps to it while the object asks for the same."""
    gpus_per_replica: int
    """0 on cpu."""
    context_length: int
    """Becomes --max-model-len."""
    weight_bytes_per_gpu: int = Field(alias="weightBytesPerGPU")
    """Bytes of weights on one GPU; on cpu those of the replica."""
    kv_bytes_per_token: int
    """Bytes of keys and values that one more token of context costs a replica, all layers together."""
    baseline_kv_bytes_per_token: int
    """The same with the model's own dtype (bf16)."""
    baseline_tokens: int
    """Tokens that the same memory would hold in the model's own dtype."""
    predicted_tokens: int
    """Tokens that the compressed cache should hold."""
    alternatives: tuple[Alternative, ...] = ()
    """What else was considered."""
    reasons: tuple[str, ...] = ()
    """Why this plan, in sentences."""
    hash: str
    """Changes when the pods must roll."""


class MeasuredCapacity(APIModel):
    """What the ready pods of the present plan report."""

    measured_tokens: int
    """Minimum over the ready pods of the present plan."""
    total_tokens: int
    """Sum over them."""
    gain: str
    """measured / baseline, such as 3.88."""
    prediction_error_percent: str
    """(predicted - measured) / measured x 100, such as 0.0."""
    max_concurrency_at_context: str
    """Sequences of the full context length that fit at once in one replica."""


class TurboQuantDeploymentStatus(APIModel):
    """The operator's account of the object."""

    observed_generation: int | None = None
    """The generation of the object that this status describes."""
    conditions: Annotated[tuple[Condition, ...], Field(json_schema_extra=LIST_MAP_BY_TYPE)] = ()
    """Ready, and what it is made of."""
    replicas: int | None = None
    """Pods that exist."""
    ready_replicas: int | None = None
    """Pods that answer requests."""
    selector: str | None = None
    """Label selector of the pods, for the scale subresource."""
    endpoint: str | None = None
    """http://service.namespace.svc:port/v1"""
    model: ModelStatus | None = None
    plan: Plan | None = None
    capacity: MeasuredCapacity | None = None
