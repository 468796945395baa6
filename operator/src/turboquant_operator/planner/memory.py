"""What one GPU has left for the cache once the engine, its weights and its work space are in.

vLLM 0.25.1 (v1/worker/gpu_worker.py, `determine_available_memory`): cache = ceil(total x utilization)
- weights - peak of a profiling step - memory outside PyTorch - CUDA graphs. The peak and the rest are
modelled here; each constant names the measurement that it comes from.
"""

from math import ceil

from turboquant_operator.planner.accelerators import Accelerator
from turboquant_operator.planner.engine import EngineSettings
from turboquant_operator.planner.facts import ELEMENT_BYTES, ModelFacts

RUNTIME_BYTES = 400 * 2**20
"""CUDA context growth, cuBLAS workspaces and graphs."""

SAMPLER_BYTES_PER_LOGIT = 2
COLLECTIVE_BYTES = 600 * 2**20
"""NCCL and custom all-reduce buffers of each GPU with tensor or pipeline parallelism."""


def weight_bytes_per_gpu(weight_bytes: int, tensor: int, pipeline: int) -> int:
    """The share of each GPU. Norms, replicated on all, are below a thousandth and not counted apart."""
    return ceil(weight_bytes / (tensor * pipeline))


def work_bytes(facts: ModelFacts, settings: EngineSettings, tensor: int, pipeline: int) -> int:
    """Memory of one GPU that is neither weights nor cache: activations, sampler, graphs, communication."""
    element = ELEMENT_BYTES[facts.dtype]
    hidden = facts.hidden_size or facts.attention_heads * facts.head_dim
    width = 2 * hidden + 3 * (facts.intermediate_size or 4 * hidden) // tensor
    activations = settings.batched_tokens * width * element
    logits = settings.sequences * (facts.vocab_size or 0) * (element + SAMPLER_BYTES_PER_LOGIT)
    collectives = COLLECTIVE_BYTES if tensor * pipeline > 1 else 0
    return RUNTIME_BYTES + max(activations, logits) + collectives


def cache_bytes(
    gpu: Accelerator,
    utilization_percent: int,
    facts: ModelFacts,
    settings: EngineSettings,
    tensor: int,
    pipeline: int,
) -> int:
    """Bytes of one GPU for the cache; negative where not even the weights fit. Needs `weight_bytes`."""
    assert facts.weight_bytes is not None
    granted = ceil(gpu.total_bytes * utilization_percent / 100)
    weights = weight_bytes_per_gpu(facts.weight_bytes, tensor, pipeline)
    return granted - weights - work_bytes(facts, settings, tensor, pipeline)
