"""What one GPU has left for the cache once the engine, its weights and its work space are in.

vLLM 0.32.0 (v1/worker/gpu_worker.py, `determine_available_memory`, and utils/mem_utils.py,
`memory_profiling`): cache = ceil(total x utilization) - what free memory has fallen by since the worker began
(weights, workspaces, what PyTorch's allocator keeps) - what a profiling step takes beyond that at its peak
- the CUDA graphs, of which it captures a few to estimate all (v1/worker/gpu/cudagraph_utils.py,
`profile_cudagraph_memory`). The profiling step runs the model on `--max-num-batched-tokens` tokens and
samples for `--max-num-seqs` sequences; its peak is the largest of the three terms in `work_bytes`.

The terms other than graphs were measured with vLLM 0.25.1, which left graphs out of account, on an H100 80GB
(driver 580) and an H200 at 0.9 of memory, one GPU, dummy weights in bf16: Llama-3.1-8B, Mistral-7B and
Qwen3-8B, eager and compiled, with 2,048 and 8,192 tokens and 64 to 1,024 sequences; predicted tokens are
within 0.1% there. With vLLM 0.32.0 nothing has been measured yet; a public log of 0.31.0 has 0.6% fewer
tokens than predicted (``test_memory.py``). Engines on several GPUs have not been measured by us.
"""

from math import ceil

from turboquant_operator.planner.accelerators import Accelerator
from turboquant_operator.planner.engine import EngineSettings
from turboquant_operator.planner.facts import ELEMENT_BYTES, ModelFacts

RUNTIME_BYTES = 286 * 2**20
"""Workspaces outside PyTorch (0.22 GiB in every run), rotary tables and rounding: 257 to 336 million bytes
in the runs above."""

LOGIT_BYTES = 6
"""A logit in the model's dtype and once more in float32, for every sequence and word. With 1,024 sequences
Qwen3-8B (151,936 words) peaks at 0.97 GiB, Gemma-3-1B (262,144) at 1.55."""

GRAPH_BYTES = 7.4 * 2**20
"""What the engine estimates for the CUDA graphs of one layer, of all batch sizes together: a public log of
vLLM 0.31.0 (A100 80GB, one GPU, default flags) has 0.23 GiB for the 32 layers of Llama-3.1-8B."""

COLLECTIVE_BYTES = 1.96 * 2**30
"""NCCL and custom all-reduce buffers of each GPU with tensor parallelism. Public logs of vLLM 0.19.0 have
1.82 to 1.96 GiB more outside PyTorch on two and four H100 than on one, and no more with pipeline stages."""


def weight_bytes_per_gpu(weight_bytes: int, tensor: int, pipeline: int) -> int:
    """The share of each GPU. Norms, replicated on all, are below a thousandth and not counted apart."""
    return ceil(weight_bytes / (tensor * pipeline))


def work_bytes(facts: ModelFacts, settings: EngineSettings, tensor: int, pipeline: int) -> int:
    """Memory of one GPU that is neither weights nor cache."""
    element = ELEMENT_BYTES[facts.dtype]
    hidden = facts.hidden_size or facts.attention_heads * facts.head_dim
    inner = (facts.intermediate_size or 4 * hidden) // tensor
    words = facts.vocab_size or 0
    step = settings.batched_tokens * hidden * element
    # The MLP: gate, up and their product, beside the residual, its norm and the attention's output.
    layer = 3 * step + 3 * settings.batched_tokens * inner * element
    sampler = step + settings.sequences * words * LOGIT_BYTES
    # Compiled models (all but --enforce-eager) hold a second copy of the embedding for a moment: Llama-3.1-8B
    # peaks at 1.01 GiB with 2,048 tokens, of which 0.98 GiB are its embedding.
    embedding = 2 * step + words * hidden * element // tensor if settings.compiled else 0
    graphs = ceil(GRAPH_BYTES * facts.layers / pipeline) if settings.compiled else 0
    collectives = ceil(COLLECTIVE_BYTES) if tensor > 1 else 0
    return RUNTIME_BYTES + max(layer, sampler, embedding) + graphs + collectives


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
