"""What the user asked of the cache, as one KV plan, or a refusal in one line.

The first step on the engine's side: `--kv-cache-dtype tq-k4v4` names one format for every attention layer,
`--additional-config '{"turboquant": {...}}'` carries a KV plan with one entry a layer. Both become a `KVPlan`
here, and what this release cannot serve is refused before a weight is read. Pure: no vLLM, no torch; the
adapter of the installed vLLM version hands in plain values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from turboquant_kernels.formats import (
    BF16,
    BLOCK_TOKENS,
    COMPRESSED_FORMATS,
    HEAD_DIMS,
    PAGE_TOKENS,
    RAW_BLOCK_DEVICES,
    TIER_NAMES,
    KVFormat,
    base_format,
)
from turboquant_kernels.plans import PLAN_KEY, KVPlan

CACHE_DTYPES = frozenset((*TIER_NAMES, *(fmt.name for fmt in COMPRESSED_FORMATS)))
"""The values of `--kv-cache-dtype` that this package adds to vLLM's own."""

MIN_COMPUTE_CAPABILITY = (8, 0)
"""Of the GPUs that the kernels are written for: bf16 on tensor cores."""

CUDA_DTYPES = ("bfloat16", "float16")
"""Model dtypes on GPUs: what FlashAttention, the attention of prompts, computes in."""

KV_CONNECTORS = {"cuda": ("OffloadingConnector",)}
"""By device, what may carry pages away: vLLM's own offloading to host memory; the rest is untried."""

_UNCOMPRESSED = "or start with --kv-cache-dtype auto for an uncompressed cache"


class RefusedConfiguration(RuntimeError):
    """A cache that cannot be served as asked. The text is one line: what, and the way out.

    Not a ValueError: pydantic, inside which vLLM checks its configuration, would wrap one in a report of its
    own and bury the line.
    """


@dataclass(frozen=True)
class EngineFacts:
    """What decides whether a model can be served from compressed pages; known before its weights are."""

    device: str
    """`cpu`, `cuda`, `rocm`, ...: the platform that vLLM runs on."""
    compute_capability: tuple[int, int] | None
    """Of a GPU: (9, 0) for Hopper."""
    dtype: str
    """The model's own, `bfloat16`."""
    num_layers: int
    """Layers with attention in the whole model, over all pipeline stages."""
    head_dim: int
    draft_head_dim: int | None
    """Of the draft model, where one speculates."""
    block_size: int
    """Tokens in one block of the engine's block table."""
    draft_tokens: int
    """Tokens that are speculated in a step at most; 0 without speculation."""
    mla: bool
    encoder_decoder: bool
    hybrid: bool
    """Has linear-attention or state-space layers beside attention."""
    chunked_local_attention: bool
    reference_window: bool
    """A sliding window that leaves prompts visible (R-SWA)."""
    bidirectional_modalities: tuple[str, ...]
    """Those that are not switched off and whose tokens see each other in both directions: `image`,
    `video`."""
    context_parallel: bool
    """One sequence's cache is divided among GPUs."""
    dual_batch: bool
    """Two halves of a batch are computed at the same time on one GPU."""
    adaptive_verification: bool
    """Drafts are cut short on the device, where the host does not see it."""
    fast_prefill: bool
    """Layers that share a cache skip the prompt's tokens (`--kv-sharing-fast-prefill`)."""
    kv_connector: str | None
    """vLLM's name of what carries KV pages out of the engine: offloading, disaggregated prefill."""


def attention_layers(num_layers: int, layer_types: Sequence[str] | None) -> tuple[int, ...]:
    """Indices of the layers that have attention, of a model whose config.json names each layer's type, or
    None.

    Names are those of Hugging Face: `linear_attention` and `mamba` have none; `hybrid` has both.
    """
    if layer_types is None:
        return tuple(range(num_layers))
    return tuple(
        index
        for index, name in enumerate(layer_types)
        if name == "hybrid" or (name.endswith("attention") and name != "linear_attention")
    )


def requested_plan(
    cache_dtype: str, additional_config: Mapping[str, Any], num_layers: int, device: str
) -> KVPlan | None:
    """The format of every layer with attention, of which the model has `num_layers`, in an engine on `cpu` or
    `cuda`; None where no format of this package is chosen.

    A KV plan needs a `--kv-cache-dtype` of this package beside it, which vLLM uses to tell compressed layers
    from others; its entries override that format. Entries of the plain bf16 format are layers that keep the
    model's own dtype.

    Raises RefusedConfiguration for a plan that is malformed, does not fit the model, compresses nothing, or
    comes alone.
    """
    document = additional_config.get(PLAN_KEY)
    if cache_dtype not in CACHE_DTYPES:
        if document is not None:
            raise RefusedConfiguration(
                f"a KV plan needs a compressed --kv-cache-dtype, not {cache_dtype!r}: add "
                f"--kv-cache-dtype tq-balanced, or leave {PLAN_KEY!r} out of --additional-config"
            )
        return None
    if document is None:
        return KVPlan.uniform(base_format(cache_dtype, device), num_layers)
    if not isinstance(document, dict):
        raise RefusedConfiguration(
            f"KV plan: {PLAN_KEY!r} in --additional-config is {document!r}, not an object; "
            "kv_plan.schema.json of turboquant-kernels says what it holds"
        )
    try:
        plan = KVPlan.from_dict(document)
    except ValueError as error:
        raise RefusedConfiguration(str(error)) from error
    if len(plan.layers) != num_layers:
        raise RefusedConfiguration(
            f"KV plan: {len(plan.layers)} layers, but the model has {num_layers} attention layers: "
            "make the plan for this model, or leave it out for a uniform format"
        )
    if not any(layer.compressed for layer in plan.layers):
        raise RefusedConfiguration(
            "KV plan: no layer is compressed: start with --kv-cache-dtype auto, or give a layer fewer bits"
        )
    return plan


def check_servable(plan: KVPlan, facts: EngineFacts) -> None:
    """Raises RefusedConfiguration for the first thing that this release cannot serve."""
    _check_device(facts)
    unsupported = {
        "multi-head latent attention (MLA) keeps no keys and values to compress": facts.mla,
        "encoder-decoder models are not supported": facts.encoder_decoder,
        "hybrid models (linear attention or Mamba beside attention) are served on GPUs only": facts.hybrid
        and facts.device == "cpu",
        "chunked local attention is not supported": facts.chunked_local_attention,
        "reference sliding window attention (R-SWA) is not supported": facts.reference_window,
        "context parallelism is not supported: leave it out": facts.context_parallel,
        "dual batch overlap is not supported: leave it out": facts.dual_batch,
        "adaptive verification of drafts is not supported: leave it out": facts.adaptive_verification,
        "--kv-sharing-fast-prefill is not supported: leave it out": facts.fast_prefill,
        f"the KV connector {facts.kv_connector} is not supported on {facts.device}: leave it out": (
            facts.kv_connector is not None and facts.kv_connector not in KV_CONNECTORS.get(facts.device, ())
        ),
    }
    for reason, applies in unsupported.items():
        if applies:
            raise RefusedConfiguration(f"{plan_name(plan)}: {reason}, {_UNCOMPRESSED}")
    if modalities := facts.bidirectional_modalities:
        limits = ", ".join(f'"{name}": 0' for name in modalities)
        raise RefusedConfiguration(
            f"{plan_name(plan)}: bidirectional attention over tokens of {' and '.join(modalities)} is not "
            f"supported: add --limit-mm-per-prompt '{{{limits}}}', {_UNCOMPRESSED}"
        )
    unit = BLOCK_TOKENS if facts.device in RAW_BLOCK_DEVICES else PAGE_TOKENS
    if facts.block_size % unit:
        raise RefusedConfiguration(
            f"--block-size {facts.block_size} is not a multiple of {unit}, the tokens of one "
            "compressed block: leave it out or choose a multiple"
        )
    for index, layer in enumerate(plan.layers):
        _check_layer(index, layer, facts)
        if layer.compressed and facts.device in RAW_BLOCK_DEVICES:
            _check_drafts(layer, facts)
    if facts.draft_head_dim is not None and facts.draft_head_dim not in HEAD_DIMS:
        raise RefusedConfiguration(
            f"{plan_name(plan)}: the draft model's head_dim {facts.draft_head_dim} is not one of "
            f"{', '.join(map(str, HEAD_DIMS))}: leave --speculative-config out, {_UNCOMPRESSED}"
        )


def _check_device(facts: EngineFacts) -> None:
    if facts.device not in ("cpu", "cuda"):
        raise RefusedConfiguration(
            f"compressed caches are served on NVIDIA GPUs and on CPUs, not on {facts.device}: "
            "start with --kv-cache-dtype auto"
        )
    if facts.device == "cpu":
        return
    if facts.compute_capability is not None and facts.compute_capability < MIN_COMPUTE_CAPABILITY:
        raise RefusedConfiguration(
            "compressed caches need a GPU of compute capability {}.{} or newer, this one has {}.{}: ".format(
                *MIN_COMPUTE_CAPABILITY, *facts.compute_capability
            )
            + "start with --kv-cache-dtype auto"
        )
    if facts.dtype not in CUDA_DTYPES:
        raise RefusedConfiguration(
            f"a compressed cache on a GPU needs a model in {' or '.join(CUDA_DTYPES)}, not {facts.dtype}: "
            f"add --dtype {CUDA_DTYPES[0]}, {_UNCOMPRESSED}"
        )


def _check_layer(index: int, layer: KVFormat, facts: EngineFacts) -> None:
    if layer == BF16:
        return
    if not layer.compressed:
        raise RefusedConfiguration(
            f"KV plan: layers[{index}] is {layer.name}, which cannot stand beside compressed layers: "
            "use a compressed format, or 16 bits for both to keep the model's own dtype"
        )
    if layer.anchor and facts.device not in RAW_BLOCK_DEVICES:
        raise RefusedConfiguration(
            f"KV plan: layers[{index}] has an anchor, which is not supported on GPUs yet: set anchor to false"
        )
    try:
        layer.slot_bytes(facts.head_dim)
    except ValueError as error:
        raise RefusedConfiguration(f"{error}: choose another model, {_UNCOMPRESSED}") from error


def _check_drafts(layer: KVFormat, facts: EngineFacts) -> None:
    """A block that drafts complete stays whole, raw, while so many tokens of the next are written."""
    blocks = layer.raw_blocks(facts.head_dim, _ELEMENT_BYTES[facts.dtype])
    # One more than drafts is verified, and one more than that is given to a draft model.
    most = ceil(BLOCK_TOKENS / blocks) - 2
    if facts.draft_tokens > most:
        raise RefusedConfiguration(
            f"{layer.name}: {facts.draft_tokens} tokens are speculated in a step and at most {most} can be: "
            "lower num_speculative_tokens, or choose a format of more bits"
        )


_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def plan_name(plan: KVPlan) -> str:
    """A short name for messages: the format's, or that layers differ."""
    names = {layer.name for layer in plan.layers}
    return names.pop() if len(names) == 1 else "KV plan with mixed formats"
