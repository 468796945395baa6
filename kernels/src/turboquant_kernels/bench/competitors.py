"""The kernels that the project is measured beside: FlashAttention-3, and vLLM's own compressed caches.

Each is called as vLLM 0.32.0's attention backends call it for a decode step, on a cache of random contents in
its own layout with blocks of 16 tokens in random order. Plans that vLLM makes once a step for all layers
(FlashAttention's schedule) are made before the clock starts; what its kernels do in every layer (vLLM rotates
queries outside its attention kernel) is on the clock. vLLM is imported here alone, on use.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from turboquant_kernels.bench.clocks import Call
from turboquant_kernels.bench.rows import Shape
from turboquant_kernels.prefill.attention import Attend, flash_attend

BLOCK_SIZE = 16


@dataclass(frozen=True)
class _Step:
    """What every attention call of a decode step is given."""

    query: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    num_blocks: int

    @classmethod
    def of(cls, shape: Shape, device: torch.device) -> "_Step":
        blocks = -(-shape.context // BLOCK_SIZE)
        order = torch.randperm(shape.batch * blocks, device=device, dtype=torch.int32)
        return cls(
            torch.randn(shape.batch, shape.q_heads, shape.head_dim, device=device, dtype=torch.bfloat16),
            order.view(shape.batch, blocks),
            torch.full((shape.batch,), shape.context, device=device, dtype=torch.int32),
            torch.arange(shape.batch + 1, device=device, dtype=torch.int32),
            shape.batch * blocks,
        )


def _flash_attention(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    """FlashAttention-3, paged: vllm/v1/attention/backends/flash_attn.py, FlashAttentionImpl.forward."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    step = _Step.of(shape, device)
    size = (step.num_blocks, BLOCK_SIZE, shape.kv_heads, shape.head_dim)
    key, value = (torch.randn(size, device=device, dtype=torch.bfloat16).to(dtype) for _ in range(2))
    one = torch.ones(shape.batch, shape.kv_heads, device=device)
    descale = {} if dtype == torch.bfloat16 else {"q_descale": one, "k_descale": one, "v_descale": one}
    schedule = get_scheduler_metadata(
        batch_size=shape.batch,
        max_seqlen_q=1,
        max_seqlen_k=shape.context,
        num_heads_q=shape.q_heads,
        num_heads_kv=shape.kv_heads,
        headdim=shape.head_dim,
        cache_seqlens=step.seq_lens,
        qkv_dtype=dtype,
        cu_seqlens_q=step.query_start_loc,
        page_size=BLOCK_SIZE,
        causal=True,
    )
    query, out = step.query.to(dtype), torch.empty_like(step.query)
    return lambda: flash_attn_varlen_func(
        q=query,
        k=key,
        v=value,
        out=out,
        cu_seqlens_q=step.query_start_loc,
        max_seqlen_q=1,
        seqused_k=step.seq_lens,
        max_seqlen_k=shape.context,
        softmax_scale=shape.head_dim**-0.5,
        causal=True,
        block_table=step.block_table,
        scheduler_metadata=schedule,
        fa_version=3,
        **descale,
    )


def flash_attention() -> Attend:
    """FlashAttention-3 as `prefill.attention.Attend`: what prefill attends to its tiles with."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    return flash_attend(flash_attn_varlen_func, version=3)


def prefill(shape: Shape, chunk: int, context: int, device: torch.device) -> Call:
    """FlashAttention-3 in bf16: `chunk` tokens of one sequence over `context` and themselves, in one call."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    length = context + chunk
    size = (length, shape.kv_heads, shape.head_dim)
    key, value = (torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(2))
    query = torch.randn(chunk, shape.q_heads, shape.head_dim, device=device, dtype=torch.bfloat16)
    query_start_loc = torch.tensor([0, chunk], dtype=torch.int32, device=device)
    key_start_loc = torch.tensor([0, length], dtype=torch.int32, device=device)
    return lambda: flash_attn_varlen_func(
        q=query,
        k=key,
        v=value,
        cu_seqlens_q=query_start_loc,
        max_seqlen_q=chunk,
        cu_seqlens_k=key_start_loc,
        max_seqlen_k=length,
        softmax_scale=shape.head_dim**-0.5,
        causal=True,
        fa_version=3,
    )


def _vllm_turboquant(shape: Shape, device: torch.device) -> Call:
    """vllm/v1/attention/backends/turboquant_attn.py, TurboQuantAttentionImpl._decode_attention."""
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention

    config = TurboQuantConfig.from_cache_dtype("turboquant_4bit_nc", shape.head_dim)
    step = _Step.of(shape, device)
    size = (step.num_blocks, BLOCK_SIZE, shape.kv_heads, config.slot_size_aligned)
    cache = torch.randint(256, size, dtype=torch.uint8, device=device)
    # Norm of the key, scale and zero point of the value: fp16 numbers of about one.
    for end in (config.key_packed_size, config.slot_size - 2, config.slot_size):
        cache[..., end - 1] = 0x3C
    hadamard = torch.ones(1, 1, device=device)
    while len(hadamard) < shape.head_dim:
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
    hadamard = hadamard / math.sqrt(shape.head_dim)
    centroids = get_centroids(shape.head_dim, config.centroid_bits).to(device)
    splits = 32  # attention_config.tq_max_kv_splits_for_cuda_graph's default
    heads = (shape.batch, shape.q_heads)
    partial = torch.empty(*heads, splits, shape.head_dim + 1, device=device)
    out, lse = torch.empty_like(step.query), torch.empty(heads, device=device)
    return lambda: triton_turboquant_decode_attention(
        query=step.query,
        kv_cache=cache,
        block_table=step.block_table,
        seq_lens=step.seq_lens,
        Pi=hadamard,
        centroids=centroids,
        scale=shape.head_dim**-0.5,
        mse_bits=config.key_mse_bits,
        key_packed_size=config.key_packed_size,
        value_quant_bits=config.effective_value_quant_bits,
        key_fp8=config.key_fp8,
        norm_correction=config.norm_correction,
        PiT=hadamard,
        mid_o_buf=partial,
        output_buf=out,
        lse_buf=lse,
        max_num_kv_splits=splits,
    )


def _vllm_int4(shape: Shape, device: torch.device) -> Call:
    """vllm/v1/attention/backends/triton_attn.py, TritonAttentionImpl.forward with int4_per_token_head."""
    from vllm.v1.attention.backends.triton_attn import MIN_LAUNCH_GRID_SIZE_2D, NUM_PAR_SOFTMAX_SEGMENTS
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.v1.kv_cache_interface import KVQuantMode

    step = _Step.of(shape, device)
    # Block, token, head, key or value, and half a byte a coordinate before the fp32 scale.
    size = (step.num_blocks, BLOCK_SIZE, shape.kv_heads, 2, shape.head_dim // 2 + 4)
    cache = torch.randint(256, size, dtype=torch.uint8, device=device)
    scales = cache.view(torch.float32)[..., -1]
    scales.fill_(0.125)
    key, value = cache.unbind(3)
    threshold = MIN_LAUNCH_GRID_SIZE_2D // shape.kv_heads
    segments = (threshold, shape.q_heads, NUM_PAR_SOFTMAX_SEGMENTS)
    out = torch.empty_like(step.query)
    padded = 1 << (shape.head_dim - 1).bit_length()
    buffers = {
        "softmax_segm_output": torch.empty(*segments, padded, device=device),
        "softmax_segm_max": torch.empty(segments, device=device),
        "softmax_segm_expsum": torch.empty(segments, device=device),
    }
    return lambda: unified_attention(
        q=step.query,
        k=key,
        v=value,
        out=out,
        cu_seqlens_q=step.query_start_loc,
        max_seqlen_q=1,
        seqused_k=step.seq_lens,
        max_seqlen_k=shape.context,
        softmax_scale=shape.head_dim**-0.5,
        causal=True,
        window_size=(-1, -1),
        block_table=step.block_table,
        softcap=0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        seq_threshold_3D=threshold,
        num_par_softmax_segments=NUM_PAR_SOFTMAX_SEGMENTS,
        kv_quant_mode=KVQuantMode.INT4_PER_TOKEN_HEAD,
        k_scale_cache=scales[..., 0],
        v_scale_cache=scales[..., 1],
        **buffers,
    )


PREPARE: dict[str, Callable[[Shape, torch.device], Call]] = {
    "fa3_bf16": lambda shape, device: _flash_attention(shape, device, torch.bfloat16),
    "fa3_fp8": lambda shape, device: _flash_attention(shape, device, torch.float8_e4m3fn),
    "vllm_turboquant": _vllm_turboquant,
    "vllm_int4": _vllm_int4,
}
"""By the names of `rows.COMPETITORS`: makes a cache of random contents, returns the call that attends to it.
Each raises ImportError where vLLM or its extension is absent, and what vLLM raises where it does not fit."""
